// The samples that a loader reads, and how a batch of them is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace fastvae {

enum class Element { uint8, float32, float64 };

// What a batch is to be like, beside which rows are in it. Whatever is random in a row is a function of the two
// keys and of the row's number, never of its place in the batch or of the thread.
struct Form {
    std::uint64_t seed = 0;
    std::uint64_t epoch = 0;
};

// Samples by number, each of `item_shape`. Immutable, so that any number of threads may gather from it.
class Rows {
public:
    Rows(std::int64_t n_rows, std::vector<std::int64_t> item_shape)
        : n_rows_(n_rows), item_shape_(std::move(item_shape)) {}
    virtual ~Rows() = default;
    Rows(const Rows&) = delete;
    Rows& operator=(const Rows&) = delete;

    std::int64_t n_rows() const { return n_rows_; }
    const std::vector<std::int64_t>& item_shape() const { return item_shape_; }
    std::int64_t features() const {
        return std::accumulate(item_shape_.begin(), item_shape_.end(), std::int64_t{1}, std::multiplies<>());
    }

    // Writes rows[0], ..., rows[n - 1], each in [0, n_rows), one after another to `out`, float32 [n, features],
    // which is aligned to a cache line. A RowWriter does it for one row that lies or was made somewhere.
    virtual void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const = 0;

private:
    const std::int64_t n_rows_;
    const std::vector<std::int64_t> item_shape_;
};

// How a row lies in memory: [pixels, channels], which comes out as [channels, pixels].
struct RowLayout {
    Element element;  // uint8 becomes x / 255
    std::int64_t pixels;
    std::int64_t channels;

    std::size_t bytes() const;
};

// Writes rows of a layout as a form asks for. Made for each batch; it costs nothing.
class RowWriter {
public:
    // Throws std::invalid_argument for a number of channels other than 1, 3 and 4.
    RowWriter(const RowLayout& layout, const Form& form);

    // Row number `number`, which lies at `row`, to `out`.
    void operator()(const std::byte* row, std::int64_t number, std::byte* out) const {
        static_cast<void>(number);
        kernel_(row, reinterpret_cast<float*>(out), pixels_);
    }
    // Bytes that a row takes at its destination.
    std::size_t bytes() const { return bytes_; }

    using Kernel = void (*)(const std::byte* row, float* out, std::int64_t pixels);

private:
    Kernel kernel_;
    std::int64_t pixels_;
    std::size_t bytes_;
};

// The rows of an array. It belongs to the caller and must outlive this.
class DenseRows final : public Rows {
public:
    DenseRows(const std::byte* data, const RowLayout& layout, std::int64_t n_rows,
              std::vector<std::int64_t> item_shape)
        : Rows(n_rows, std::move(item_shape)), data_(data), layout_(layout) {}

    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override;

private:
    const std::byte* const data_;
    const RowLayout layout_;
};

}  // namespace fastvae
