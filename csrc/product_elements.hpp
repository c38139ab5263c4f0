// The elements that product_kernel.cpp multiplies: how their units are multiplied and put together, and how they are
// read and written. Everything here has internal linkage: each kernel compiles its own.
#pragma once

#include <immintrin.h>

#include "product.hpp"

namespace fastvae {
namespace {

constexpr int lanes = 16;

template <class Mask>
Mask first(std::int64_t n) {  // of a vector's lanes
    constexpr int bits = 8 * sizeof(Mask);
    return n >= bits ? static_cast<Mask>(~Mask{0}) : n <= 0 ? Mask{0} : static_cast<Mask>((Mask{1} << n) - 1);
}

// Lines of which k is one dimension: the columns of b or the rows of a. Strides from line to line and along k.
template <class Element>
struct Lines {
    const Element* data;
    std::int64_t n, line, along;
};

// Where the units of lines go: 16 lines together at a time, and so far from unit to unit and from line to line.
struct Packed {
    Unit* data;
    std::int64_t unit, line;

    Unit* at(std::int64_t i, std::int64_t j) const { return data + i * unit + j * line; }
};

#if defined(__AVX512BF16__)

struct Elements {
    using Element = Bf16;
    static constexpr int per_unit = 2;  // neighbours in k, the first in the low half

    static __m512 add_product(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }

    static __m512 load(__mmask16 mask, const Bf16* from) {
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }

    static void store(__mmask16 mask, Bf16* to, __m512 x) {
        _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }

    // The units of n neighbours in k.
    static __m512i load_along(const Bf16* from, std::int64_t n) {
        return _mm512_maskz_loadu_epi16(first<__mmask32>(n), from);
    }

    // The unit i of each line, of lines that are neighbours.
    static void pack_across(const Lines<Bf16>& from, std::int64_t k, std::int64_t width, std::int64_t i, Packed to) {
        alignas(64) static constexpr Bf16 low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i lows = _mm512_load_si512(low), highs = _mm512_add_epi16(lows, _mm512_set1_epi16(lanes));
        const Bf16* const even = from.data + 2 * i * from.along;
        const bool has_odd = 2 * i + 1 < k;
        for (std::int64_t at = 0; at < width; at += 2 * lanes) {
            const auto mask = first<__mmask32>(from.n - at);
            const __m512i x = _mm512_maskz_loadu_epi16(mask, even + at);
            const __m512i y = has_odd ? _mm512_maskz_loadu_epi16(mask, even + from.along + at) : _mm512_setzero_si512();
            _mm512_store_si512(to.at(i, at), _mm512_permutex2var_epi16(x, lows, y));
            if (at + lanes < width) _mm512_store_si512(to.at(i, at + lanes), _mm512_permutex2var_epi16(x, highs, y));
        }
    }
};

#else

struct Elements {
    using Element = float;
    static constexpr int per_unit = 1;

    static __m512 add_product(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }

    static __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }

    static void store(__mmask16 mask, float* to, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

    static __m512i load_along(const float* from, std::int64_t n) {
        return _mm512_maskz_loadu_epi32(first<__mmask16>(n), from);
    }

    static void pack_across(const Lines<float>& from, std::int64_t, std::int64_t width, std::int64_t i, Packed to) {
        const float* const line = from.data + i * from.along;
        for (std::int64_t at = 0; at < width; at += lanes)
            _mm512_store_si512(to.at(i, at), load_along(line + at, from.n - at));
    }
};

#endif

}  // namespace
}  // namespace fastvae
