#include "sparse.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simd.hpp"

namespace fastvae {
namespace {

class ChangedError : public std::runtime_error {
public:
    ChangedError() : std::runtime_error("the sparse matrix has changed since it was handed over; hand over a copy") {}
};

std::string shown(double number) {
    std::array<char, 32> text;
    std::snprintf(text.data(), text.size(), "%g", number);
    return text.data();
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

template <typename T>
struct Type {
    using type = T;
};

// Calls `use` with the type of the values and that of the indices.
template <typename Use>
decltype(auto) with_types(const Csr& csr, Use use) {
    const auto indexed = [&](auto value) -> decltype(auto) {
        return csr.wide ? use(value, Type<std::int64_t>{}) : use(value, Type<std::int32_t>{});
    };
    switch (csr.number) {
        case Number::uint8: return indexed(Type<std::uint8_t>{});
        case Number::uint16: return indexed(Type<std::uint16_t>{});
        case Number::int32: return indexed(Type<std::int32_t>{});
        case Number::int64: return indexed(Type<std::int64_t>{});
        case Number::float32: return indexed(Type<float>{});
        case Number::float64: return indexed(Type<double>{});
    }
    refuse("data has an unknown type");
}

// The arrays of a matrix as what they are.
template <typename T, typename I>
struct Arrays {
    explicit Arrays(const Csr& csr)
        : values(reinterpret_cast<const T*>(csr.values)),
          columns(reinterpret_cast<const I*>(csr.columns)),
          starts(reinterpret_cast<const I*>(csr.starts)) {}

    const T* values;
    const I* columns;
    const I* starts;
};

template <typename I>
void check_starts(const Csr& csr, const I* starts) {
    if (starts[0] != 0) refuse("indptr[0] is " + std::to_string(starts[0]) + ", expected 0");
    for (std::int64_t r = 0; r < csr.n_rows; ++r) {
        if (starts[r + 1] < starts[r]) {
            refuse("indptr[" + std::to_string(r + 1) + "] is " + std::to_string(starts[r + 1]) +
                   ", expected at least the " + std::to_string(starts[r]) + " before it");
        }
    }
    if (starts[csr.n_rows] > csr.n_values) {
        refuse("indptr ends with " + std::to_string(starts[csr.n_rows]) + ", expected at most " +
               std::to_string(csr.n_values) + ", the number of values");
    }
}

// The columns of one row: inside the matrix, and none twice. They need not be in order.
template <typename I>
void check_columns(const I* begin, const I* end, std::int64_t row, std::int64_t n_columns, std::vector<I>& sorted) {
    bool rising = true;
    for (const I* column = begin; column < end; ++column) {
        if (*column < 0 || *column >= n_columns) {
            refuse("a column of row " + std::to_string(row) + " is " + std::to_string(*column) +
                   ", expected 0 <= column < " + std::to_string(n_columns));
        }
        rising = rising && (column == begin || column[-1] < *column);
    }
    if (rising) return;
    sorted.assign(begin, end);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
        refuse("row " + std::to_string(row) + " has column " + std::to_string(*twice) +
               " twice; sum them first, as scipy's sum_duplicates() does");
    }
}

inline void prefetch(const std::byte* begin, const std::byte* end) {
    constexpr std::ptrdiff_t kLine = 64;
    constexpr std::ptrdiff_t kEnough = 1024;
    end = begin + std::min(end - begin, kEnough);
    for (; begin < end; begin += kLine) __builtin_prefetch(begin);
}

constexpr std::int64_t kLanes = Lanes<float>::count;

// The arrays are the caller's, who may have changed them since they were checked: not a word outside the row.
template <typename I>
inline void put(float* out, std::uint64_t features, I column, float x) {
    if (static_cast<std::uint64_t>(column) >= features) throw ChangedError();
    out[column] = x;
}

// The values of one row, each times `factor`, and its log1p where asked, to a row of zeros.
template <typename T, typename I>
void write_row(const T* values, const I* columns, std::int64_t n, float factor, bool log1p_too, float* out,
               std::uint64_t features) {
    std::array<float, kLanes> lanes{};
    for (std::int64_t k = 0; k < n; k += kLanes) {
        const auto some = static_cast<std::size_t>(std::min(kLanes, n - k));
        for (std::size_t i = 0; i < some; ++i) lanes[i] = static_cast<float>(values[i]);
        f32x16 x = load<float>(lanes.data()) * factor;
        if (log1p_too) x = log1p(x);
        store<float>(lanes.data(), x);
        for (std::size_t i = 0; i < some; ++i) put(out, features, columns[i], lanes[i]);
        values += some;
        columns += some;
    }
}

template <typename T, typename I>
void write_plain_row(const T* values, const I* columns, std::int64_t n, float* out, std::uint64_t features) {
    for (std::int64_t k = 0; k < n; ++k) put(out, features, columns[k], static_cast<float>(values[k]));
}

}  // namespace

SparseRows::SparseRows(const Csr& csr) : Rows(csr.n_rows, {csr.n_columns}), csr_(csr) {
    with_types(csr, [&](auto value, auto index) {
        using T = typename decltype(value)::type;
        using I = typename decltype(index)::type;
        const Arrays<T, I> arrays(csr);
        check_starts(csr, arrays.starts);
        std::vector<I> sorted;
        for (std::int64_t r = 0; r < csr.n_rows; ++r) {
            const std::int64_t begin = arrays.starts[r], end = arrays.starts[r + 1];
            check_columns(arrays.columns + begin, arrays.columns + end, r, csr.n_columns, sorted);
            for (std::int64_t k = begin; k < end; ++k) {
                const auto x = static_cast<double>(arrays.values[k]);
                if (!std::isfinite(static_cast<float>(x))) {
                    refuse("the value in row " + std::to_string(r) + ", column " +
                           std::to_string(arrays.columns[k]) + " is " + shown(x) +
                           ", expected a finite float32");
                }
                low_ = std::min(low_, x);
                high_ = std::max(high_, x);
            }
        }
    });
}

SparseRows::SparseRows(const SparseRows& rows, std::optional<double> target, bool log1p)
    : Rows(rows.n_rows(), rows.item_shape()), csr_(rows.csr_), low_(rows.low_), high_(rows.high_), log1p_(log1p) {
    if ((target || log1p) && low_ < 0) {
        refuse("the smallest count is " + shown(low_) + ", expected none below 0 to normalize or to take log1p");
    }
    if (!target) return;
    if (!(*target > 0) || !std::isfinite(static_cast<float>(*target))) {
        refuse("the sum to normalize to is " + shown(*target) + ", expected a finite number above 0");
    }
    std::vector<double> sum(static_cast<std::size_t>(n_rows()));
    sums(sum.data());
    factors_.reserve(sum.size());
    for (std::size_t r = 0; r < sum.size(); ++r) {
        const auto factor = static_cast<float>(sum[r] > 0 ? *target / sum[r] : 1.0);
        if (!std::isnormal(factor)) {
            refuse("row " + std::to_string(r) + " sums to " + shown(sum[r]) + ", which cannot be brought to " +
                   shown(*target));
        }
        factors_.push_back(factor);
    }
}

void SparseRows::sums(double* out) const {
    with_types(csr_, [&](auto value, auto index) {
        const Arrays<typename decltype(value)::type, typename decltype(index)::type> arrays(csr_);
        for (std::int64_t r = 0; r < csr_.n_rows; ++r) {
            const std::int64_t begin = arrays.starts[r], end = arrays.starts[r + 1];
            if (begin < 0 || end > csr_.n_values) throw ChangedError();
            double sum = 0.0;
            for (std::int64_t k = begin; k < end; ++k) sum += static_cast<double>(arrays.values[k]);
            out[r] = sum;
        }
    });
}

std::int64_t SparseRows::bytes_of(const std::int64_t* rows, std::int64_t n) const {
    std::int64_t values = 0, bytes_of_value = 0;
    with_types(csr_, [&](auto value, auto index) {
        using T = typename decltype(value)::type;
        using I = typename decltype(index)::type;
        const Arrays<T, I> arrays(csr_);
        for (std::int64_t i = 0; i < n; ++i) values += arrays.starts[rows[i] + 1] - arrays.starts[rows[i]];
        bytes_of_value = sizeof(T) + sizeof(I);
    });
    return values * bytes_of_value;
}

void SparseRows::gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const {
    const bool in_place = form.element == Element::float32 && !form.transform.any();
    std::vector<float> row(in_place ? 0 : static_cast<std::size_t>(csr_.n_columns));
    const RowWriter write(layout(), form);
    with_types(csr_, [&](auto value, auto index) {
        using T = typename decltype(value)::type;
        using I = typename decltype(index)::type;
        const Arrays<T, I> arrays(csr_);
        // Where a row lies is itself to be waited for, so that it is asked for sooner.
        constexpr std::int64_t kAhead = 16;
        const auto locate = [&](std::int64_t i) {
            if (i < n) __builtin_prefetch(arrays.starts + rows[i]);
        };
        const auto fetch = [&](std::int64_t i) {
            if (i >= n) return;
            const I begin = arrays.starts[rows[i]], end = arrays.starts[rows[i] + 1];
            prefetch(reinterpret_cast<const std::byte*>(arrays.values + begin),
                     reinterpret_cast<const std::byte*>(arrays.values + end));
            prefetch(reinterpret_cast<const std::byte*>(arrays.columns + begin),
                     reinterpret_cast<const std::byte*>(arrays.columns + end));
        };
        for (std::int64_t i = 0; i < 2 * kAhead; ++i) locate(i);
        for (std::int64_t i = 0; i < kAhead; ++i) fetch(i);
        const auto features = static_cast<std::size_t>(csr_.n_columns);
        for (std::int64_t i = 0; i < n; ++i, out += write.bytes()) {
            locate(i + 2 * kAhead);
            fetch(i + kAhead);
            const std::int64_t begin = arrays.starts[rows[i]], count = arrays.starts[rows[i] + 1] - begin;
            if (begin < 0 || count < 0 || count > csr_.n_values - begin) throw ChangedError();
            const T* values = arrays.values + begin;
            const I* columns = arrays.columns + begin;
            float* const x = in_place ? reinterpret_cast<float*>(out) : row.data();
            std::memset(x, 0, features * sizeof(float));
            if (factors_.empty() && !log1p_) {
                write_plain_row(values, columns, count, x, features);
            } else {
                const float factor = factors_.empty() ? 1.0f : factors_[static_cast<std::size_t>(rows[i])];
                write_row(values, columns, count, factor, log1p_, x, features);
            }
            if (!in_place) write(reinterpret_cast<const std::byte*>(x), rows[i], out);
        }
    });
}

}  // namespace fastvae
