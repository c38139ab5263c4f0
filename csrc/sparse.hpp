// Rows of a sparse matrix of counts, dense only in a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "rows.hpp"

namespace fastvae {

enum class Number { uint8, uint16, int32, int64, float32, float64 };

// A matrix in compressed sparse rows: row r has values[k] in column columns[k] for starts[r] <= k < starts[r + 1].
// The arrays belong to the caller.
struct Csr {
    const std::byte* values;  // [n_values]
    Number number;
    const std::byte* columns;  // [n_values], int64 where `wide`, else int32
    const std::byte* starts;   // [n_rows + 1], as wide
    bool wide;
    std::int64_t n_values;
    std::int64_t n_rows;
    std::int64_t n_columns;
};

// Samples of float32, zeros where there is no value. A count c of a row whose counts sum to s may become
// c * target / s, or log(1 + c), or the logarithm of the former; a row of zeros stays one.
class SparseRows final : public Rows {
public:
    // Reads everything once. Throws std::invalid_argument, which names the place, for what is no such matrix: starts
    // that do not rise from 0 to at most n_values, a column outside the matrix or twice in a row, and a value that
    // is not finite in float32.
    explicit SparseRows(const Csr& csr);

    // The same rows, and what is to become of a count. Throws std::invalid_argument for negative counts and for a row
    // that cannot be brought to the target, which is to be finite and above 0.
    SparseRows(const SparseRows& rows, std::optional<double> target, bool log1p);

    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override;
    RowLayout layout() const override { return {Element::float32, csr_.n_columns, 1}; }
    std::int64_t bytes_of(const std::int64_t* rows, std::int64_t n) const override;

    // The sum of each row's values, float64 [n_rows].
    void sums(double* out) const;
    // The smallest and the largest value, as they are kept; 0 and 0 without any.
    std::pair<double, double> range() const { return {low_, high_}; }

private:
    const Csr csr_;
    double low_ = 0.0;
    double high_ = 0.0;
    std::vector<float> factors_;  // of each row, where it is brought to a target
    bool log1p_ = false;
};

}  // namespace fastvae
