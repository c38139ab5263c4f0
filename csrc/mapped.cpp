#include "mapped.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "buffers.hpp"
#include "guard.hpp"

namespace fastvae {
namespace {

// What the kernel reads ahead for one call, at least.
constexpr std::size_t kAdvised = std::size_t{1} << 17;
// What one page fault may map, at the most.
constexpr std::size_t kAround = std::size_t{1} << 21;
// Rows that are checked and then written from the cache.
constexpr std::size_t kChecked = std::size_t{1} << 16;

// NaN and infinity, by their exponent.
inline bool is_finite(float x) { return (std::bit_cast<std::uint32_t>(x) & 0x7f800000U) != 0x7f800000U; }

template <typename T, typename Fits>
std::int64_t find_unfit(const std::byte* row, std::int64_t n, Fits fits) {
    const T* const x = reinterpret_cast<const T*>(row);
    bool all = true;
    for (std::int64_t i = 0; i < n; ++i) all &= fits(x[i]);
    if (all) return -1;
    const T* const found = std::find_if_not(x, x + n, fits);
    return found == x + n ? -1 : found - x;
}

struct stat state_of(int descriptor) {
    struct stat state {};
    static_cast<void>(fstat(descriptor, &state));
    return state;
}

bool equal(const struct timespec& a, const struct timespec& b) {
    return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

int open_to_watch(const std::string& path, const std::string& name) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw DataError(name + ": " + std::strerror(errno) + "; expected the file that is mapped");
    return descriptor;
}

}  // namespace

WatchedFile::WatchedFile(std::string path, std::string name, bool changes_are_ours)
    : path_(std::move(path)),
      name_(std::move(name)),
      changes_are_ours_(changes_are_ours),
      descriptor_(open_to_watch(path_, name_)),
      opened_(state_of(descriptor_)),
      shows_what_is_cached_(opened_.st_uid == geteuid() || faccessat(AT_FDCWD, path_.c_str(), W_OK, AT_EACCESS) == 0),
      direct_(open_direct()) {}

WatchedFile::~WatchedFile() {
    close(descriptor_);
    if (direct_ >= 0) close(direct_);
}

int WatchedFile::open_direct() const {
    const int descriptor = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (descriptor < 0) return -1;
    const struct stat found = state_of(descriptor);
    if (found.st_dev == opened_.st_dev && found.st_ino == opened_.st_ino) return descriptor;
    close(descriptor);
    return -1;
}

std::size_t WatchedFile::read(std::size_t offset, std::size_t bytes, std::byte* out) const {
    int descriptor = direct_;
    std::size_t done = 0;
    while (done < bytes) {
        const ssize_t some = pread(descriptor, out + done, bytes - done, static_cast<off_t>(offset + done));
        if (some > 0) {
            done += static_cast<std::size_t>(some);
        } else if (some < 0 && errno == EINVAL && descriptor == direct_) {
            descriptor = descriptor_;  // where the file system wants other multiples
        } else if (some == 0 || errno != EINTR) {
            break;
        }
    }
    return done;
}

void WatchedFile::copy(const std::byte* mapped, std::size_t bytes, std::byte* out) const {
    struct Copy {
        const std::byte* from;
        std::size_t bytes;
        std::byte* to;
    } copy{mapped, bytes, out};
    take_sigbus();
    const auto move = [](void* argument) {
        const Copy& given = *static_cast<Copy*>(argument);
        std::memcpy(given.to, given.from, given.bytes);
    };
    const std::byte* const lost = guarded_read(mapped, bytes, move, &copy);
    const std::string change = this->change();
    if (!change.empty()) throw DataError(name_ + ": changed while in use: " + change + "; open it again when it is whole");
    if (lost != nullptr) {
        throw DataError(name_ + ": byte " + std::to_string(lost - mapped) + " of " + std::to_string(bytes) +
                        " could not be read from the disk; check it, or copy the file to another");
    }
}

std::int64_t WatchedFile::size() const {
    struct stat now {};
    return fstat(descriptor_, &now) == 0 ? now.st_size : 0;
}

std::string WatchedFile::change() const {
    struct stat now {};
    if (fstat(descriptor_, &now) != 0) return std::string("cannot be looked at: ") + std::strerror(errno);
    if (now.st_size != opened_.st_size) {
        return std::to_string(now.st_size) + " bytes, was opened with " + std::to_string(opened_.st_size);
    }
    if (!changes_are_ours_ && !equal(now.st_mtim, opened_.st_mtim)) return "was written to since it was opened";
    return {};
}

std::string WatchedFile::replacement() const {
    struct stat now {};
    if (stat(path_.c_str(), &now) != 0) return std::strerror(errno);
    if (now.st_dev != opened_.st_dev || now.st_ino != opened_.st_ino) return "another file now";
    return {};
}

MappedRows::MappedRows(std::shared_ptr<const DenseRows> rows, std::shared_ptr<const WatchedFile> file,
                       std::int64_t offset, std::vector<std::int64_t> row_shape, bool shared, std::size_t room)
    : Rows(rows->n_rows(), rows->item_shape()),
      rows_(std::move(rows)),
      file_(std::move(file)),
      offset_(offset),
      row_shape_(std::move(row_shape)),
      shared_(shared),
      room_(room) {
    take_sigbus();
}

struct MappedRows::Writing {
    const MappedRows* self;
    const RowWriter* writer;
    const std::int64_t* rows;
    const std::byte* const* addresses;
    std::int64_t n;
    std::byte* out;
    bool binarizes;
    std::int64_t bad_row = -1;
    std::int64_t bad_value = -1;
};

// Within a guarded read: nothing that has to be destroyed.
void MappedRows::write(void* argument) {
    Writing& writing = *static_cast<Writing*>(argument);
    const DenseRows& dense = *writing.self->rows_;
    const std::size_t bytes = writing.writer->bytes();
    const bool checks = dense.layout().element != Element::uint8;
    const auto in_cache = static_cast<std::int64_t>(std::max<std::size_t>(1, kChecked / dense.layout().bytes()));
    const std::int64_t together = checks ? in_cache : writing.n;
    for (std::int64_t i = 0; i < writing.n; i += together) {
        const std::int64_t end = std::min(writing.n, i + together);
        const std::byte* const* const addresses = writing.addresses ? writing.addresses + i : nullptr;
        for (std::int64_t k = i; checks && k < end; ++k) {
            const std::byte* const row = addresses ? addresses[k - i] : dense.at(writing.rows[k]);
            writing.bad_value = writing.self->first_unfit(row, writing.binarizes);
            if (writing.bad_value >= 0) {
                writing.bad_row = writing.rows[k];
                return;
            }
        }
        dense.write(*writing.writer, writing.rows + i, addresses, end - i,
                    writing.out + static_cast<std::size_t>(i) * bytes);
    }
}

void MappedRows::gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const {
    gather_read(rows, nullptr, n, form, out);
}

// addresses: null for rows where they are mapped.
void MappedRows::gather_read(const std::int64_t* rows, const std::byte* const* addresses, std::int64_t n,
                             const Form& form, std::byte* out) const {
    const RowWriter writer(layout(), form);
    Writing writing{this, &writer, rows, addresses, n, out, form.transform.binarize};
    const std::byte* const lost =
        guarded_read(rows_->data(), static_cast<std::size_t>(n_rows()) * layout().bytes(), write, &writing);
    const std::string change = file_->change();
    if (!change.empty()) throw_changed(change, n > 0 ? rows[0] : 0);
    if (lost != nullptr) throw_lost((lost - rows_->data()) / static_cast<std::int64_t>(layout().bytes()));
    if (writing.bad_row >= 0) {
        std::string place;
        std::int64_t rest = writing.bad_value;
        for (auto size = row_shape_.rbegin(); size != row_shape_.rend(); ++size) {
            place.insert(0, ", " + std::to_string(rest % *size));
            rest /= *size;
        }
        place = " at [" + std::to_string(writing.bad_row) + place + "]; expected ";
        throw DataError(file_->name() + (writing.binarizes ? ": no probability" + place + "values in [0, 1] to binarize"
                                                           : ": NaN or infinite" + place + "finite float32"));
    }
}

// Large reads past the page cache into large pages: by pages of 4 KiB, as the cache has them, the kernel takes two to
// three times as long, and as much again to free those that they push out.
void MappedRows::read(const std::int64_t* rows, std::int64_t n, std::byte* memory, std::size_t bytes,
                      const std::byte** addresses) const {
    const auto [lowest, highest] = std::minmax_element(rows, rows + n);  // indices come in any order
    const std::byte* const begin = rows_->at(*lowest);
    const auto extent = static_cast<std::size_t>(rows_->at(*highest + 1) - begin);
    const std::size_t offset = static_cast<std::size_t>(offset_) + static_cast<std::size_t>(begin - rows_->data());
    const std::size_t before = offset % page_size();
    const std::size_t pages = (before + extent + page_size() - 1) / page_size() * page_size();
    const bool far_apart = pages > bytes;
    if (far_apart || is_cached(begin, extent)) {
        for (std::int64_t i = 0; i < n; ++i) {
            addresses[i] = rows_->at(rows[i]);
            if (far_apart) expect(rows[i], 1);
        }
        return;
    }
    const std::size_t had = file_->read(offset - before, pages, memory);
    const std::string change = file_->change();
    if (!change.empty()) throw_changed(change, rows[0]);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::size_t place = before + static_cast<std::size_t>(rows_->at(rows[i]) - begin);
        if (place + layout().bytes() > had) throw_lost(rows[i]);
        addresses[i] = memory + place;
    }
}

bool MappedRows::is_cached(const std::byte* begin, std::size_t bytes) const {
    if (!file_->shows_what_is_cached()) return false;
    const std::size_t before = reinterpret_cast<std::uintptr_t>(begin) % page_size();
    std::vector<unsigned char> pages((before + bytes + page_size() - 1) / page_size());
    if (mincore(const_cast<std::byte*>(begin - before), before + bytes, pages.data()) != 0) return false;
    return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

void MappedRows::throw_lost(std::int64_t row) const {
    throw DataError(file_->name() + ": row " + std::to_string(row) +
                    " could not be read from the disk; check it, or copy the file to another");
}

void MappedRows::throw_changed(const std::string& change, std::int64_t row) const {
    const auto bytes = static_cast<std::int64_t>(rows_->layout().bytes());
    const std::int64_t whole = std::max<std::int64_t>(0, file_->size() - offset_) / bytes;
    const std::string place = whole < n_rows() ? "; rows from " + std::to_string(whole) + " on are gone"
                                               : "; seen at row " + std::to_string(row);
    throw DataError(file_->name() + ": changed while in use: " + change + place + "; open it again when it is whole");
}

void MappedRows::begin(bool tells) const {
    take_sigbus();  // where it was taken from us since
    const std::string replacement = file_->replacement();
    if (!replacement.empty()) {
        throw DataError(file_->name() + ": is not the file that was opened: " + replacement + "; open it again");
    }
    const std::string change = file_->change();
    if (!change.empty()) throw_changed(change, 0);
    // Where a page is missing that was asked for, as many as the kernel would like to read with it push out others; and
    // of more than the memory, they are gone before they are of use.
    const auto data = reinterpret_cast<std::uintptr_t>(rows_->data());
    const std::uintptr_t first = data / page_size() * page_size();
    const std::size_t bytes = data - first + static_cast<std::size_t>(n_rows()) * layout().bytes();
    const int advice = tells || room_ > 0 ? MADV_RANDOM : MADV_NORMAL;
    static_cast<void>(madvise(reinterpret_cast<void*>(first), bytes, advice));
}

void MappedRows::expect(std::int64_t first, std::int64_t count) const {
    const std::size_t row_bytes = rows_->layout().bytes();
    const std::byte* const begin = rows_->data() + static_cast<std::size_t>(first) * row_bytes;
    const std::size_t before = reinterpret_cast<std::uintptr_t>(begin) % page_size();
    const std::size_t bytes = before + static_cast<std::size_t>(count) * row_bytes;
    // in pieces, as the kernel leaves out what is more than it would read ahead at once
    for (std::size_t done = 0; done < bytes; done += kAdvised) {
        auto* const piece = const_cast<std::byte*>(begin - before + done);
        static_cast<void>(madvise(piece, std::min(kAdvised, bytes - done), MADV_WILLNEED));
    }
}

void MappedRows::forget(std::int64_t first, std::int64_t count) const {
    if (!shared_) return;
    const std::size_t row_bytes = rows_->layout().bytes();
    const auto data = reinterpret_cast<std::uintptr_t>(rows_->data());
    const std::uintptr_t end_of_data = data + static_cast<std::size_t>(n_rows()) * row_bytes;
    // A fault brings the pages around it too, up to a huge one. What else is in use here comes back by itself.
    const std::uintptr_t from = (data + static_cast<std::size_t>(first) * row_bytes) / kAround * kAround;
    const std::uintptr_t to = (data + static_cast<std::size_t>(first + count) * row_bytes) / kAround * kAround + kAround;
    const std::uintptr_t begin = std::max(from, data / page_size() * page_size());
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), std::min(to, end_of_data) - begin, MADV_DONTNEED));
}

std::int64_t MappedRows::first_unfit(const std::byte* row, bool binarizes) const {
    const RowLayout layout = rows_->layout();
    const std::int64_t n = layout.pixels * layout.channels;
    const auto find = [&](auto fits) {
        return layout.element == Element::float32 ? find_unfit<float>(row, n, fits) : find_unfit<double>(row, n, fits);
    };
    if (binarizes) return find([](auto x) { return (x >= 0) & (x <= 1); });
    return find([](auto x) { return is_finite(static_cast<float>(x)); });
}

}  // namespace fastvae
