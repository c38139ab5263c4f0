// A row from its source to its batch, channels first: one source for every instruction set.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "elements.hpp"
#include "philox.hpp"
#include "transform.hpp"

namespace fastvae {
namespace {

// x / 255, correctly rounded, without a division: 1/255 = 257/65536 + rest, and an 8-bit x times 257/65536 is
// exact in float32, so that the sum rounds once.
inline float unit(std::uint8_t x) {
    constexpr double head = 257.0 / 65536.0;
    constexpr double rest = 1.0 / 255.0 - head;
    const auto v = static_cast<float>(static_cast<std::int32_t>(x));
    return v * static_cast<float>(head) + v * static_cast<float>(rest);
}
inline float unit(float x) { return x; }
inline float unit(double x) { return static_cast<float>(x); }

template <class To, class T>
inline To convert(T x) {
    if constexpr (std::is_same_v<To, T>) {
        return x;
    } else {
        return narrow<To>(unit(x));
    }
}

// [n, C] to C planes that begin `pitch` after one another.
template <class T, int C, class To>
inline void deinterleave(const T* __restrict from, std::int64_t n, To* __restrict to, std::int64_t pitch) {
    for (std::int64_t p = 0; p < n; ++p) {
        for (int c = 0; c < C; ++c) to[c * pitch + p] = convert<To>(from[p * C + c]);
    }
}

template <class T, class To>
inline void affine(const T* __restrict from, std::int64_t n, double scale, double shift, To* __restrict to) {
    for (std::int64_t i = 0; i < n; ++i) {
        to[i] = narrow<To>(static_cast<float>(static_cast<double>(from[i]) * scale + shift));
    }
}

// Where a row is cropped and whether it is flipped, by the words of its first block.
struct Place {
    std::int64_t top, left;
    bool flip;
};

// A whole number in [0, n), each equally likely but for 2^-32.
inline std::int64_t below(std::uint32_t word, std::int64_t n) {
    return static_cast<std::int64_t>((static_cast<std::uint64_t>(word) * static_cast<std::uint64_t>(n)) >> 32);
}

inline Place place(const RowTask& task, std::int64_t number) {
    const Transform& transform = task.transform;
    const std::int64_t down = task.layout.height + 2 * transform.padding - task.height;
    const std::int64_t right = task.layout.width + 2 * transform.padding - task.width;
    const bool anywhere = !transform.center && (down > 0 || right > 0);
    Place at{down / 2, right / 2, false};
    if (anywhere || transform.hflip) {
        const auto row = static_cast<std::uint64_t>(number);
        const Block w = philox(
            Block{0, 0, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32)},
            static_cast<std::uint32_t>(task.key), static_cast<std::uint32_t>(task.key >> 32));
        at.flip = transform.hflip && (w[0] >> 31) != 0;
        if (anywhere) at = {below(w[1], down + 1), below(w[2], right + 1), at.flip};
    }
    at.top -= transform.padding;
    at.left -= transform.padding;
    return at;
}

// Lines are short: eight pixels at a time, some of them twice where they do not fit.
template <class T>
inline void copy_line(const T* from, std::int64_t n, bool flip, T* to) {
    constexpr std::int64_t piece = 8;
    using Piece = std::array<T, piece>;
    if (n < piece) {
        for (std::int64_t i = 0; i < n; ++i) to[flip ? n - 1 - i : i] = from[i];
        return;
    }
    for (std::int64_t i = 0; i < n; i += piece) {
        const std::int64_t at = std::min(i, n - piece);
        Piece pixels;
        std::memcpy(&pixels, from + at, sizeof(pixels));
        if (flip) {
            if constexpr (sizeof(T) == 1) {
                pixels = std::bit_cast<Piece>(__builtin_bswap64(std::bit_cast<std::uint64_t>(pixels)));
            } else {
                std::reverse(pixels.begin(), pixels.end());
            }
        }
        std::memcpy(to + (flip ? n - piece - at : at), &pixels, sizeof(pixels));
    }
}

// The crop of a row, flipped or not, its channels first.
template <class T, int C>
void move(const RowTask& task, const Place& at, const std::byte* row, T* out) {
    const std::int64_t plane = task.height * task.width;
    const std::int64_t first = std::clamp<std::int64_t>(-at.left, 0, task.width);
    const std::int64_t last = std::clamp<std::int64_t>(task.layout.width - at.left, first, task.width);
    const std::int64_t n = last - first;
    const std::int64_t start = at.flip ? task.width - last : first;
    for (std::int64_t z = 0; z < task.planes; z += C) {
        const T* image = reinterpret_cast<const T*>(row) + z * task.layout.height * task.layout.width;
        for (std::int64_t y = 0; y < task.height; ++y) {
            const std::int64_t from_y = at.top + y;
            const bool inside = from_y >= 0 && from_y < task.layout.height && n > 0;
            const T* from = inside ? image + (from_y * task.layout.width + at.left + first) * C : nullptr;
            T* to = out + z * plane + y * task.width;
            for (int c = 0; c < C; ++c) {
                if (n < task.width || !inside) std::fill_n(to + c * plane, task.width, T{});
            }
            if (!inside) continue;
            to += start;
            if constexpr (C == 1) {
                copy_line(from, n, at.flip, to);
            } else {
                deinterleave<T, C, T>(from, n, to, plane);
                if (at.flip) {
                    for (int c = 0; c < C; ++c) std::reverse(to + c * plane, to + c * plane + n);
                }
            }
        }
    }
}

// The pixels that sixteen blocks serve, a byte of a random word each: pixel 64 j + 4 i + k of a chunk has
// byte k of word j of block i.
constexpr std::int64_t chunk = 256;

// Random digit number 1, 2, 3 or 4 (of base 256, the most significant first) of each pixel of a chunk.
inline void random_digits(const RowTask& task, std::int64_t number, std::int64_t first, std::uint32_t which,
                          std::uint8_t* digits) {
    const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const u32x16 zero = {};
    const auto row = static_cast<std::uint64_t>(number);
    const Words w = philox({{lane + static_cast<std::uint32_t>(first / 16), zero + which,
                             zero + static_cast<std::uint32_t>(row), zero + static_cast<std::uint32_t>(row >> 32)}},
                           static_cast<std::uint32_t>(task.key), static_cast<std::uint32_t>(task.key >> 32));
    std::memcpy(digits, w.w, chunk);
}

// 255 with probability x / 255, else 0: the random digits are compared to those of x / 255, which are x, x, x, ...
// in base 256. The first digit decides but for one pixel in 256.
inline void draw(const RowTask& task, std::int64_t number, std::int64_t first, const std::uint8_t* pixels,
                 std::uint8_t* out) {
    using Bytes = std::uint8_t __attribute__((vector_size(FASTVAE_REGISTER)));
    constexpr int n = chunk / static_cast<int>(sizeof(Bytes));
    Bytes x[n], digits[n], on[n], open[n];
    std::memcpy(x, pixels, chunk);
    Bytes any = {};
    for (int i = 0; i < n; ++i) {
        on[i] = bit_cast<Bytes>(x[i] == 255);
        open[i] = bit_cast<Bytes>(x[i] != 0) & ~on[i];
        any |= open[i];
    }
    const auto is_zero = [](const Bytes& v) {
        const u64s lanes = bit_cast<u64s>(v);
        std::uint64_t all = 0;
        for (std::size_t i = 0; i < sizeof(v) / 8; ++i) all |= lanes[i];
        return all == 0;
    };
    for (std::uint32_t which = 1; which <= 4 && !is_zero(any); ++which) {
        random_digits(task, number, first, which, reinterpret_cast<std::uint8_t*>(digits));
        any = Bytes{};
        for (int i = 0; i < n; ++i) {
            on[i] |= bit_cast<Bytes>(digits[i] < x[i]) & open[i];
            open[i] &= bit_cast<Bytes>(digits[i] == x[i]);
            any |= open[i];
        }
    }
    std::memcpy(out, on, chunk);
}

// The four digits together are a word, which is compared to x * 2^32.
template <class T>
inline void draw(const RowTask& task, std::int64_t number, std::int64_t first, const T* x, std::uint8_t* on) {
    alignas(64) std::uint8_t digits[4][chunk];
    for (std::uint32_t which = 1; which <= 4; ++which) random_digits(task, number, first, which, digits[which - 1]);
    for (int i = 0; i < chunk; ++i) {
        const std::uint32_t word = static_cast<std::uint32_t>(digits[0][i]) << 24 |
            static_cast<std::uint32_t>(digits[1][i]) << 16 | static_cast<std::uint32_t>(digits[2][i]) << 8 | digits[3][i];
        on[i] = static_cast<double>(word) < static_cast<double>(x[i]) * 0x1p32 ? 255 : 0;
    }
}

template <class T, class To>
void binarize(const RowTask& task, const T* x, std::int64_t number, To* out) {
    const std::int64_t n = task.planes * task.height * task.width;
    alignas(64) std::uint8_t on[chunk];
    alignas(64) T rest[chunk] = {};
    for (std::int64_t first = 0; first < n; first += chunk) {
        const std::int64_t count = std::min(chunk, n - first);
        const T* pixels = x + first;
        if (count < chunk) {
            std::memcpy(rest, pixels, static_cast<std::size_t>(count) * sizeof(T));
            pixels = rest;
        }
        draw(task, number, first, pixels, on);
        deinterleave<std::uint8_t, 1, To>(on, count, out + first, 0);
    }
}

// As they lie, with nothing done but widening.
template <class T, int C, class To>
void plain(const RowTask& task, const std::byte* row, std::int64_t, Part part, std::byte* out) {
    deinterleave<T, C, To>(reinterpret_cast<const T*>(row) + part.first * C, part.count,
                           reinterpret_cast<To*>(out) + part.first, task.layout.pixels);
}

template <class T, int C, class To>
void transformed(const RowTask& task, const std::byte* row, std::int64_t number, Part, std::byte* out) {
    const Transform& transform = task.transform;
    const T* x = reinterpret_cast<const T*>(row);
    To* to = reinterpret_cast<To*>(out);
    const Place at = transform.moves() ? place(task, number) : Place{0, 0, false};
    const bool whole = !transform.moves() || (task.height == task.layout.height && task.width == task.layout.width);
    if (!whole || at.flip || at.top != 0 || at.left != 0) {
        // without another step to follow, to where it belongs
        const bool last = std::is_same_v<T, To> && !transform.binarize && !transform.scaled;
        T* moved = last ? reinterpret_cast<T*>(out) : reinterpret_cast<T*>(task.moved);
        move<T, C>(task, at, row, moved);
        if (last) return;
        x = moved;
    } else if (C > 1) {
        deinterleave<T, C, T>(x, task.layout.pixels, reinterpret_cast<T*>(task.moved), task.layout.pixels);
        x = reinterpret_cast<const T*>(task.moved);
    }
    if (transform.binarize) return binarize<T, To>(task, x, number, to);
    const std::int64_t n = task.planes * task.height * task.width;
    if constexpr (!std::is_same_v<To, std::uint8_t>) {
        if (transform.scaled) return affine<T, To>(x, n, transform.scale, transform.shift, to);
    }
    deinterleave<T, 1, To>(x, n, to, 0);
}

template <class T, int C, class To>
RowKernel choose(const RowTask& task) {
    return task.transform.any() ? transformed<T, C, To> : plain<T, C, To>;
}

template <class T, int C>
RowKernel choose(const RowTask& task) {
    switch (task.element) {
        case Element::uint8:
            if constexpr (std::is_same_v<T, std::uint8_t>) return choose<T, C, std::uint8_t>(task);
            return nullptr;
        case Element::float16: return choose<T, C, Float16>(task);
        case Element::bfloat16: return choose<T, C, BFloat16>(task);
        case Element::float32: return choose<T, C, float>(task);
        case Element::float64: return nullptr;
    }
    return nullptr;
}

template <class T>
RowKernel choose(const RowTask& task) {
    switch (task.layout.channels) {
        case 3: return choose<T, 3>(task);
        case 4: return choose<T, 4>(task);
        default: return choose<T, 1>(task);
    }
}

}  // namespace

RowKernel FASTVAE_CHOOSE(const RowTask& task) {
    switch (task.layout.element) {
        case Element::uint8: return choose<std::uint8_t>(task);
        case Element::float64: return choose<double>(task);
        default: return choose<float>(task);
    }
}

}  // namespace fastvae
