#include "rows.hpp"

#include <algorithm>

namespace fastvae {
namespace {

constexpr std::size_t kCacheLine = 64;

// The hardware follows a row once it has begun, but cannot guess where the next one lies.
inline void prefetch(const std::byte* row, std::size_t bytes) {
    constexpr std::size_t kEnough = 16384;
    const std::byte* const end = row + std::min(bytes, kEnough);
    for (; row < end; row += kCacheLine) __builtin_prefetch(row);
    __builtin_prefetch(end - 1);
}

}  // namespace

void DenseRows::gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const {
    write(RowWriter(layout_, form), rows, n, out);
}

void DenseRows::write(const RowWriter& writer, const std::int64_t* rows, std::int64_t n, std::byte* out) const {
    constexpr std::size_t kBytesAhead = 6144;
    const std::size_t bytes = layout_.bytes();
    const auto ahead = static_cast<std::int64_t>(std::clamp<std::size_t>(kBytesAhead / bytes + 1, 1, 16));
    const auto row = [&](std::int64_t i) { return data_ + static_cast<std::size_t>(rows[i]) * bytes; };
    for (std::int64_t i = 0; i < std::min(ahead, n); ++i) prefetch(row(i), bytes);
    for (std::int64_t i = 0; i < n; ++i, out += writer.bytes()) {
        if (i + ahead < n) prefetch(row(i + ahead), bytes);
        writer(row(i), rows[i], out);
    }
}

}  // namespace fastvae
