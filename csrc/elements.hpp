// Rows of any element type and stride, to and from the compute type. The loops are left to the vectoriser.
#pragma once

#include <type_traits>

#include "elbo.hpp"
#include "simd.hpp"

namespace fastvae {
namespace {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t rest = (x.bits & 0x7fffu) << 13;
    const std::uint32_t normal = rest + ((127u - 15u) << 23);
    const std::uint32_t special = rest + ((255u - 31u) << 23);  // inf and NaN
    const float subnormal = bit_cast<float>(rest + (113u << 23)) - 0x1p-14f;
    const std::uint32_t finite = rest < (1u << 23) ? bit_cast<std::uint32_t>(subnormal) : normal;
    return bit_cast<float>(sign | (rest >= (31u << 23) ? special : finite));
}

// In the compute type R, in which the division by 255 is too.
template <class R, class T>
inline R widen_to(T x) {
    if constexpr (std::is_same_v<T, std::uint8_t>) {
        return static_cast<R>(x) / R(255);
    } else {
        return static_cast<R>(widen(x));
    }
}

template <class T, class R>
inline T narrow(R x) {
    return static_cast<T>(x);
}

// Round to nearest even; NaN stays NaN.
template <>
inline BFloat16 narrow(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

template <>
inline Float16 narrow(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t size = bits & 0x7fffffffu;
    const std::uint32_t normal = (size - ((127u - 15u) << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(size) + 0.5f) - (126u << 23);
    const std::uint32_t special = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = size < (113u << 23) ? subnormal : normal;
    const std::uint32_t value = size >= (143u << 23) ? special : finite;
    return {static_cast<std::uint16_t>(((bits >> 16) & 0x8000u) | value)};
}

template <>
inline BFloat16 narrow(double x) {
    return narrow<BFloat16>(static_cast<float>(x));
}
template <>
inline Float16 narrow(double x) {
    return narrow<Float16>(static_cast<float>(x));
}

template <class R, class T>
void widen_row(const T* from, std::int64_t stride, std::int64_t n, R* to) {
    if (stride == 1) {
        for (std::int64_t i = 0; i < n; ++i) to[i] = widen_to<R>(from[i]);
    } else {
        for (std::int64_t i = 0; i < n; ++i) to[i] = widen_to<R>(from[i * stride]);
    }
}

template <class R, class T>
void narrow_row(const R* from, std::int64_t n, T* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
}

template <class R>
constexpr DType dtype_of = sizeof(R) == 4 ? DType::float32 : DType::float64;

// Whether rows can be read where they are.
template <class R>
bool in_place(const View& view) {
    return view.dtype == dtype_of<R> && view.column == 1;
}

// Elements [first, first + n) of a row, in place where they can be, else converted into `buffer`.
template <class R>
const R* read_row(const View& view, std::int64_t k, std::int64_t b, std::int64_t first, std::int64_t n, R* buffer) {
    const std::int64_t at = k * view.sample + b * view.row + first * view.column;
    if (in_place<R>(view)) return static_cast<const R*>(view.data) + at;
    switch (view.dtype) {
        case DType::float32: widen_row(static_cast<const float*>(view.data) + at, view.column, n, buffer); break;
        case DType::float64: widen_row(static_cast<const double*>(view.data) + at, view.column, n, buffer); break;
        case DType::bfloat16: widen_row(static_cast<const BFloat16*>(view.data) + at, view.column, n, buffer); break;
        case DType::float16: widen_row(static_cast<const Float16*>(view.data) + at, view.column, n, buffer); break;
        case DType::uint8: widen_row(static_cast<const std::uint8_t*>(view.data) + at, view.column, n, buffer); break;
    }
    return buffer;
}

template <class R>
void copy_row(const View& view, std::int64_t k, std::int64_t b, std::int64_t first, std::int64_t n, R* to) {
    const R* from = read_row(view, k, b, first, n, to);
    if (from != to) std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(R));
}

template <class R>
void write_row(const R* from, std::int64_t n, DType dtype, void* to, std::int64_t at) {
    switch (dtype) {
        case DType::float32: narrow_row(from, n, static_cast<float*>(to) + at); break;
        case DType::float64: narrow_row(from, n, static_cast<double*>(to) + at); break;
        case DType::bfloat16: narrow_row(from, n, static_cast<BFloat16*>(to) + at); break;
        case DType::float16: narrow_row(from, n, static_cast<Float16*>(to) + at); break;
        case DType::uint8: break;  // no gradient has this dtype
    }
}

}  // namespace
}  // namespace fastvae
