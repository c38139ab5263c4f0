// Philox4x32-10 (Salmon et al. 2011) and standard normals by Box and Muller (1958), sixteen blocks at a time.
// The same arithmetic as kernels/rng.py and fastvae/ops/reference.py.
#pragma once

#include <array>

#include "simd.hpp"

namespace fastvae {
namespace {

struct Words {
    u32x16 w[4];
};

inline void multiply(std::uint32_t a, u32x16 b, u32x16& high, u32x16& low) {
    using u32x8 = std::uint32_t __attribute__((vector_size(32)));
    using u64x8 = std::uint64_t __attribute__((vector_size(64)));
    u32x8 halves[2];
    std::memcpy(halves, &b, sizeof(b));
    for (auto& half : halves) half = __builtin_convertvector(
        (__builtin_convertvector(half, u64x8) * static_cast<std::uint64_t>(a)) >> 32, u32x8);
    std::memcpy(&high, halves, sizeof(high));
    low = b * a;
}

inline Words philox(Words c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        u32x16 high0, low0, high1, low1;
        multiply(0xD2511F53u, c.w[0], high0, low0);
        multiply(0xCD9E8D57u, c.w[2], high1, low1);
        c = {{high1 ^ c.w[1] ^ k0, low1, high0 ^ c.w[3] ^ k1, low0}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

using Block = std::array<std::uint32_t, 4>;

// One block alone.
inline Block philox(Block c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
        const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
        c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
             static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

inline void box_muller(u32x16 radius_word, u32x16 angle_word, f32x16& cosine, f32x16& sine) {
    const f32x16 u = __builtin_convertvector(radius_word, f32x16) * 0x1p-32f + 0x1p-33f;
    f32x16 ln_u = log(u);
    ln_u = ln_u > 0.0f ? f32x16{} : ln_u;
    const f32x16 r = sqrt(ln_u * -2.0f);
    // 2 pi (w + 1/2) / 2^32 = q pi/2 + t, with t in [-pi/4, pi/4] taken from the integer
    const u32x16 q = (angle_word + (1u << 29)) >> 30;
    const i32x16 rest = bit_cast<i32x16>(angle_word - (q << 30));
    const f32x16 t = (__builtin_convertvector(rest, f32x16) * 0x1p-32f + 0x1p-33f) * 6.283185307179586f;
    const f32x16 t2 = t * t;
    const f32x16 s = t + t * t2 * ((t2 * -1.9515295891e-4f + 8.3321608736e-3f) * t2 - 1.6666654611e-1f);
    const f32x16 c = 1.0f - 0.5f * t2
        + t2 * t2 * ((t2 * 2.443315711809948e-5f - 1.388731625493765e-3f) * t2 + 4.166664568298827e-2f);
    const i32x16 swap = (q & 1u) != 0u;
    const f32x16 cos_t = swap ? s : c;
    const f32x16 sin_t = swap ? c : s;
    cosine = r * (((q + 1u) & 2u) != 0u ? -cos_t : cos_t);
    sine = r * ((q & 2u) != 0u ? -sin_t : sin_t);
}

// Normals first, first + 1, ..., first + n - 1 of the stream (seed, offset): normal i is word i % 4 of the
// block with counter (i / 4, offset).
inline void normals(std::uint64_t seed, std::uint64_t offset, std::uint64_t first, std::int64_t n, float* out) {
    const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    std::uint64_t group = first / 4;
    std::int64_t skip = static_cast<std::int64_t>(first % 4);
    while (n > 0) {
        const std::uint32_t group_low = static_cast<std::uint32_t>(group);
        const u32x16 low = lane + group_low;
        const u32x16 carry = bit_cast<u32x16>(low < group_low);  // all ones where the low word wrapped
        const u32x16 high = static_cast<std::uint32_t>(group >> 32) - carry;
        const u32x16 zero = {};
        const Words w = philox(
            {{low, high, zero + static_cast<std::uint32_t>(offset), zero + static_cast<std::uint32_t>(offset >> 32)}},
            static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
        f32x16 eps[4];
        box_muller(w.w[0], w.w[1], eps[0], eps[1]);
        box_muller(w.w[2], w.w[3], eps[2], eps[3]);
        float block[64];
        for (int g = 0; g < 16; ++g)
            for (int i = 0; i < 4; ++i) block[4 * g + i] = eps[i][g];
        const std::int64_t take = n < 64 - skip ? n : 64 - skip;
        std::memcpy(out, block + skip, static_cast<std::size_t>(take) * sizeof(float));
        out += take;
        n -= take;
        group += 16;
        skip = 0;
    }
}

}  // namespace
}  // namespace fastvae
