// Sixteen float lanes (eight double lanes) in one vector type, lowered by the compiler to whatever the
// instruction set has. Lanes are fixed and nothing is contracted or reordered, so that every instruction set
// gives the same bits. Everything here has internal linkage: each instruction set compiles its own copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

// Bytes of a register.
#if defined(__AVX512F__)
#define FASTVAE_REGISTER 64
#elif defined(__AVX2__)
#define FASTVAE_REGISTER 32
#else
#define FASTVAE_REGISTER 16
#endif

namespace fastvae {
namespace {

using f32x16 = float __attribute__((vector_size(64)));
using f64x8 = double __attribute__((vector_size(64)));
using i32x16 = std::int32_t __attribute__((vector_size(64)));
using u32x16 = std::uint32_t __attribute__((vector_size(64)));
using i64x8 = std::int64_t __attribute__((vector_size(64)));

template <class R>
struct Lanes;
template <>
struct Lanes<float> {
    using V = f32x16;
    using Mask = i32x16;
    static constexpr int count = 16;
};
template <>
struct Lanes<double> {
    using V = f64x8;
    using Mask = i64x8;
    static constexpr int count = 8;
};

template <class R>
using Vec = typename Lanes<R>::V;

template <class To, class From>
inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class R>
inline Vec<R> load(const R* p) {
    Vec<R> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <class R>
inline void store(R* p, const Vec<R>& v) {
    std::memcpy(p, &v, sizeof(v));
}

// Store past the cache; p is aligned to the vector.
inline void stream(float* p, const f32x16& v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, bit_cast<__m512>(v));
#elif defined(__SSE__)
    __m128 parts[4];
    std::memcpy(parts, &v, sizeof(v));
    for (int i = 0; i < 4; ++i) _mm_stream_ps(p + 4 * i, parts[i]);
#else
    store(p, v);
#endif
}

// After `stream`, before another thread reads.
inline void end_streams() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}

// Write first + i for each lane i of v that is above 0, one after another, and return how many there are. All 16
// places may be written to. Without branches, which nothing could foretell.
inline std::int32_t put_above_zero(const f32x16& v, std::int32_t first, std::int32_t* out) {
#if defined(__AVX512F__)
    const __mmask16 above = _mm512_cmp_ps_mask(bit_cast<__m512>(v), _mm512_setzero_ps(), _CMP_GT_OQ);
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(above, bit_cast<__m512i>(lane + first)));
    return __builtin_popcount(above);
#else
    std::int32_t n = 0;
    for (std::int32_t i = 0; i < 16; ++i) {
        out[n] = first + i;
        n += v[i] > 0;
    }
    return n;
#endif
}

// 0, 1, 2, ...
template <class R>
inline Vec<R> lane_index() {
    Vec<R> v = {};
    for (int i = 0; i < Lanes<R>::count; ++i) v[i] = static_cast<R>(i);
    return v;
}

template <int n>
inline double sum_halves(const double* x) {
    if constexpr (n == 1) {
        return x[0];
    } else {
        double sums[n / 2];
        for (int i = 0; i < n / 2; ++i) sums[i] = x[i] + x[i + n / 2];
        return sum_halves<n / 2>(sums);
    }
}

// Sum of the lanes in a fixed order: halves onto halves, since one after another each would wait for the last.
template <class R>
inline double sum_lanes(const Vec<R>& v) {
    double lanes[Lanes<R>::count];
    for (int i = 0; i < Lanes<R>::count; ++i) lanes[i] = static_cast<double>(v[i]);
    return sum_halves<Lanes<R>::count>(lanes);
}

// exp by Cody and Waite's reduction and the Cephes polynomial: about one unit in the last place, inf above
// 88.73, gradual underflow, NaN kept.
inline f32x16 exp(f32x16 x) {
    x = x > 89.0f ? f32x16{} + 89.0f : x;
    x = x < -104.0f ? f32x16{} - 104.0f : x;
    constexpr float round = 12582912.0f;  // 1.5 * 2^23
    const f32x16 n = (x * 1.44269504088896341f + round) - round;
    const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    // 2^n in two factors, since n runs from -150 to 128; integer lanes of a NaN are of no consequence
    const i32x16 whole = __builtin_convertvector(n, i32x16);
    const i32x16 half = whole >> 1;
    const f32x16 a = bit_cast<f32x16>((half + 127) << 23);
    const f32x16 b = bit_cast<f32x16>((whole - half + 127) << 23);
    return p * a * b;
}

// ln for normal positive x, by the Cephes polynomial.
inline f32x16 log(f32x16 x) {
    const i32x16 bits = bit_cast<i32x16>(x);
    f32x16 m = bit_cast<f32x16>((bits & 0x007fffff) | 0x3f000000);  // [1/2, 1)
    const i32x16 low = m < 0.70710678118654752f;
    f32x16 e = __builtin_convertvector((bits >> 23) - 126 + low, f32x16);
    const f32x16 f = (low ? m + m : m) - 1.0f;
    const f32x16 f2 = f * f;
    f32x16 p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return f + (p * f * f2 + e * -2.12194440e-4f - 0.5f * f2) + e * 0.693359375f;
}

// ln(1 + t) for t in [0, 1]: the rounding of 1 + t is put back to first order.
inline f32x16 log1p(f32x16 t) {
    const f32x16 y = t + 1.0f;
    return log(y) + (t - (y - 1.0f)) / y;
}

inline f32x16 sqrt(f32x16 x) {
    for (int i = 0; i < 16; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

inline f64x8 exp(f64x8 x) {
    for (int i = 0; i < 8; ++i) x[i] = std::exp(x[i]);
    return x;
}

inline f64x8 log1p(f64x8 x) {
    for (int i = 0; i < 8; ++i) x[i] = std::log1p(x[i]);
    return x;
}

template <class V>
inline V abs(V x) {
    return x < 0 ? -x : x;
}

// exp(v) - 1 and f(v) = exp(v) - 1 - v, by series where |v| < 1 would cancel.
template <class R>
struct ExpMinusOne {
    Vec<R> expm1, f;
};

template <class R>
inline ExpMinusOne<R> exp_minus_one(Vec<R> v) {
    using V = Vec<R>;
    // float needs 10 terms for |v| < 1; double takes 18
    constexpr int terms = sizeof(R) == 4 ? 10 : 18;
    R c = 1;
    for (int k = 2; k <= terms + 1; ++k) c /= static_cast<R>(k);
    V p = V{} + c;
    for (int k = terms + 1; k > 2; --k) {
        c *= static_cast<R>(k);
        p = p * v + c;
    }
    const V series = v * v * p;
    const V e = exp(v) - R(1);
    const auto near = abs(v) < R(1);
    return {near ? v + series : e, near ? series : e - v};
}

}  // namespace
}  // namespace fastvae
