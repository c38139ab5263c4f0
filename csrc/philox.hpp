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

// as wide as the registers: wider ones would go through memory at each step
using u32s = std::uint32_t __attribute__((vector_size(FASTVAE_REGISTER)));
using u64s = std::uint64_t __attribute__((vector_size(FASTVAE_REGISTER)));

// a times the low half of each lane, which every instruction set has in one instruction.
inline u64s multiply_low_halves(std::uint32_t a, u64s b) {
#if defined(__AVX512F__)
    // the form without a mask makes gcc 12 warn of its own header
    return bit_cast<u64s>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(b), _mm512_set1_epi64(a)));
#elif defined(__AVX2__)
    return bit_cast<u64s>(_mm256_mul_epu32(bit_cast<__m256i>(b), _mm256_set1_epi64x(a)));
#elif defined(__SSE2__)
    return bit_cast<u64s>(_mm_mul_epu32(bit_cast<__m128i>(b), _mm_set1_epi64x(a)));
#else
    return (b & 0xffffffffu) * std::uint64_t{a};
#endif
}

inline void multiply(std::uint32_t a, u32s b, u32s& high, u32s& low) {
    const u64s pairs = bit_cast<u64s>(b);
    const u64s even = multiply_low_halves(a, pairs);
    const u64s odd = multiply_low_halves(a, pairs >> 32);
    constexpr std::uint64_t upper = 0xffffffff00000000u;
    high = bit_cast<u32s>((even >> 32) | (odd & upper));
    low = bit_cast<u32s>((even & ~upper) | (odd << 32));
}

inline Words philox(const Words& counters, std::uint32_t key0, std::uint32_t key1) {
    Words result;
    for (std::size_t at = 0; at < sizeof(u32x16); at += sizeof(u32s)) {
        u32s c[4];
        for (int i = 0; i < 4; ++i) std::memcpy(&c[i], reinterpret_cast<const char*>(&counters.w[i]) + at, sizeof(u32s));
        std::uint32_t k0 = key0, k1 = key1;
        for (int round = 0; round < 10; ++round) {
            u32s high0, low0, high1, low1;
            multiply(0xD2511F53u, c[0], high0, low0);
            multiply(0xCD9E8D57u, c[2], high1, low1);
            c[0] = high1 ^ c[1] ^ k0;
            c[1] = low1;
            c[2] = high0 ^ c[3] ^ k1;
            c[3] = low0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char*>(&result.w[i]) + at, &c[i], sizeof(u32s));
    }
    return result;
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
