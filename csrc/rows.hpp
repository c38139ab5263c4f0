// The samples that a loader reads, and how a batch of them is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "transform.hpp"

namespace fastvae {

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

    // Writes rows[0], ..., rows[n - 1], each in [0, n_rows), one after another to `out`, which is aligned to a
    // cache line. A RowWriter does it for one row that lies or was made somewhere.
    virtual void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const = 0;

    // How the rows lie before a RowWriter has them, which decides what a form can ask for.
    virtual RowLayout layout() const = 0;
    // Bytes that `gather` reads for these rows; none where they are made.
    virtual std::int64_t bytes_of([[maybe_unused]] const std::int64_t* rows, [[maybe_unused]] std::int64_t n) const {
        return 0;
    }
    // Called as a pass begins, which will tell or not what it is to read. Throws where the samples are no longer those
    // that were opened.
    virtual void begin([[maybe_unused]] bool tells) const {}
    // Whether it is of use to tell which rows will be gathered soon, and which not for a while.
    virtual bool on_disk() const { return false; }
    virtual void expect([[maybe_unused]] std::int64_t first, [[maybe_unused]] std::int64_t count) const {}
    virtual void forget([[maybe_unused]] std::int64_t first, [[maybe_unused]] std::int64_t count) const {}
    // Bytes of other memory that rows may be read into before they are gathered; 0 where they are gathered as they lie.
    virtual std::size_t room() const { return 0; }
    // Reads rows, ascending, into `memory`, which begins at a page and has `bytes`: theirs in whole pages, and a
    // page, at least; or leaves them where they are. Row rows[i] lies at addresses[i] then.
    virtual void read([[maybe_unused]] const std::int64_t* rows, [[maybe_unused]] std::int64_t n,
                      [[maybe_unused]] std::byte* memory, [[maybe_unused]] std::size_t bytes,
                      [[maybe_unused]] const std::byte** addresses) const {}
    // `gather` of rows that were read.
    virtual void gather_read([[maybe_unused]] const std::int64_t* rows,
                             [[maybe_unused]] const std::byte* const* addresses, [[maybe_unused]] std::int64_t n,
                             [[maybe_unused]] const Form& form, [[maybe_unused]] std::byte* out) const {}

private:
    const std::int64_t n_rows_;
    const std::vector<std::int64_t> item_shape_;
};

// Writes rows of a layout as a form asks for. Made by each thread for each batch, which costs next to nothing.
class RowWriter {
public:
    // Throws std::invalid_argument for a form that such rows cannot have.
    RowWriter(const RowLayout& layout, const Form& form);

    // Row number `number`, which lies at `row`, to `out`.
    void operator()(const std::byte* row, std::int64_t number, std::byte* out) const {
        kernel_(task_, row, number, {0, task_.layout.pixels}, out);
    }
    // Whether a row may be written in parts.
    bool divides() const { return !task_.transform.any(); }
    void operator()(const std::byte* row, std::int64_t number, Part part, std::byte* out) const {
        kernel_(task_, row, number, part, out);
    }
    // Bytes that a row takes at its destination.
    std::size_t bytes() const { return bytes_; }

private:
    std::unique_ptr<std::byte[]> moved_;
    RowTask task_;
    RowKernel kernel_;
    std::size_t bytes_;
};

// The rows of an array. It belongs to the caller and must outlive this.
class DenseRows final : public Rows {
public:
    DenseRows(const std::byte* data, const RowLayout& layout, std::int64_t n_rows,
              std::vector<std::int64_t> item_shape)
        : Rows(n_rows, std::move(item_shape)), data_(data), layout_(layout) {}

    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override;
    RowLayout layout() const override { return layout_; }
    std::int64_t bytes_of(const std::int64_t*, std::int64_t n) const override {
        return n * static_cast<std::int64_t>(layout_.bytes());
    }

    const std::byte* data() const { return data_; }
    const std::byte* at(std::int64_t row) const { return data_ + static_cast<std::size_t>(row) * layout_.bytes(); }
    // `gather` with a writer; it has nothing to destroy, and may be left by a jump. addresses: of rows elsewhere.
    void write(const RowWriter& writer, const std::int64_t* rows, const std::byte* const* addresses, std::int64_t n,
               std::byte* out) const;

private:
    const std::byte* const data_;
    const RowLayout layout_;
};

}  // namespace fastvae
