// Rows of a file that is mapped into memory, which may be larger than the memory, and change while it is read.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.hpp"

namespace fastvae {

// What was read is not what was opened, or not numbers; one line for the user.
class DataError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A file, held open to see whether it stays as it is.
class WatchedFile {
public:
    // name: for messages. With changes_are_ours, only its size has to stay. Throws DataError where it cannot be opened.
    WatchedFile(std::string path, std::string name, bool changes_are_ours);
    ~WatchedFile();
    WatchedFile(const WatchedFile&) = delete;
    WatchedFile& operator=(const WatchedFile&) = delete;

    const std::string& name() const { return name_; }
    // Empty, or what has happened to the file that was opened.
    std::string change() const;
    // Empty, or what has become of its path.
    std::string replacement() const;
    std::int64_t size() const;
    // Whether it is known what of it is in the page cache: the kernel tells those who may write to it.
    bool shows_what_is_cached() const { return shows_what_is_cached_; }
    // Whether the file system reads past the page cache.
    bool reads_directly() const { return direct_ >= 0; }
    // So reads [offset, offset + bytes), in whole pages like `out`, and answers how much of it: less beyond the end, or
    // where the disk fails.
    std::size_t read(std::size_t offset, std::size_t bytes, std::byte* out) const;
    // Copies bytes of a mapping of it. Throws DataError where it has changed, or its disk fails.
    void copy(const std::byte* mapped, std::size_t bytes, std::byte* out) const;

private:
    int open_direct() const;

    const std::string path_;
    const std::string name_;
    const bool changes_are_ours_;
    const int descriptor_;
    const struct stat opened_;
    const bool shows_what_is_cached_;
    const int direct_;  // the same file past the page cache, or -1
};

// The rows of an array in a mapped file. Where it was cut, changed, or its disk fails, `gather` throws DataError, and
// what it has written is not to be used; so it does for a float that is NaN or infinite, as these rows are not looked at
// before.
class MappedRows final : public Rows {
public:
    // offset: where the array begins in the file. row_shape: of a row of the array, for messages. Pages of a mapping
    // that is not `shared` may be ones that its owner has changed, and are never given back. room: see Rows.
    MappedRows(std::shared_ptr<const DenseRows> rows, std::shared_ptr<const WatchedFile> file, std::int64_t offset,
               std::vector<std::int64_t> row_shape, bool shared, std::size_t room);

    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override;
    RowLayout layout() const override { return rows_->layout(); }
    std::int64_t bytes_of(const std::int64_t* rows, std::int64_t n) const override { return rows_->bytes_of(rows, n); }
    void begin(bool tells) const override;
    bool on_disk() const override { return true; }
    void expect(std::int64_t first, std::int64_t count) const override;
    void forget(std::int64_t first, std::int64_t count) const override;
    std::size_t room() const override { return file_->reads_directly() ? room_ : 0; }
    void read(const std::int64_t* rows, std::int64_t n, std::byte* memory, std::size_t bytes,
              const std::byte** addresses) const override;
    void gather_read(const std::int64_t* rows, const std::byte* const* addresses, std::int64_t n, const Form& form,
                     std::byte* out) const override;

private:
    struct Writing;

    static void write(void* writing);
    // The first value of a row that is not finite in float32, or not a probability to binarize by; or -1.
    std::int64_t first_unfit(const std::byte* row, bool binarizes) const;
    bool is_cached(const std::byte* begin, std::size_t bytes) const;
    [[noreturn]] void throw_lost(std::int64_t row) const;
    [[noreturn]] void throw_changed(const std::string& change, std::int64_t row) const;

    const std::shared_ptr<const DenseRows> rows_;
    const std::shared_ptr<const WatchedFile> file_;
    const std::int64_t offset_;
    const std::vector<std::int64_t> row_shape_;
    const bool shared_;
    const std::size_t room_;
};

}  // namespace fastvae
