#include "rows.hpp"

#include <algorithm>

namespace fastvae {
namespace {

constexpr std::size_t kCacheLine = 64;

inline void prefetch(const std::byte* begin, std::size_t bytes) {
    const std::byte* const end = begin + bytes;
    for (; begin < end; begin += kCacheLine) __builtin_prefetch(begin);
    __builtin_prefetch(end - 1);
}

}  // namespace

void DenseRows::gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const {
    write(RowWriter(layout_, form), rows, nullptr, n, out);
}

// Rows lie anywhere, and the hardware is slow to follow each: some pieces of rows are fetched while an earlier one is
// written, never more at once than a core can wait for.
void DenseRows::write(const RowWriter& writer, const std::int64_t* rows, const std::byte* const* addresses,
                      std::int64_t n, std::byte* out) const {
    constexpr std::size_t kWhole = 1024;
    constexpr std::size_t kPiece = 512;
    constexpr std::size_t kBytesAhead = 6144;
    const std::int64_t pixels = layout_.pixels;
    const std::size_t pixel_bytes = layout_.bytes() / static_cast<std::size_t>(pixels);
    const bool whole = !writer.divides() || layout_.bytes() <= kWhole;
    const std::int64_t step = whole ? pixels : static_cast<std::int64_t>(kPiece / pixel_bytes);
    const std::size_t step_bytes = static_cast<std::size_t>(step) * pixel_bytes;
    const std::size_t ahead = std::clamp<std::size_t>(kBytesAhead / step_bytes + 1, 1, 16);

    struct Place {
        std::int64_t row = 0;
        std::int64_t first = 0;
    };
    const auto move_on = [&](Place& at) {
        at.first += step;
        if (at.first >= pixels) at = {at.row + 1, 0};
    };
    const auto part = [&](const Place& at) { return Part{at.first, std::min(step, pixels - at.first)}; };
    const auto row = [&](const Place& at) { return addresses ? addresses[at.row] : this->at(rows[at.row]); };
    const auto fetch = [&](const Place& at) {
        if (at.row >= n) return;
        prefetch(row(at) + static_cast<std::size_t>(at.first) * pixel_bytes,
                 static_cast<std::size_t>(part(at).count) * pixel_bytes);
    };
    Place next;
    for (std::size_t i = 0; i < ahead; ++i, move_on(next)) fetch(next);
    for (Place at; at.row < n; move_on(at), move_on(next)) {
        fetch(next);
        writer(row(at), rows[at.row], part(at), out + static_cast<std::size_t>(at.row) * writer.bytes());
    }
}

}  // namespace fastvae
