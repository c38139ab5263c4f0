// A row of the source as float32, its channels first: one source for every instruction set.
#include <stdexcept>
#include <string>

#include "rows.hpp"

namespace fastvae {
namespace {

// x / 255, correctly rounded, without a division: 1/255 = 257/65536 + rest, an 8-bit x times 257/65536 is
// exact in float32, so the sum rounds once; it does not matter whether the compiler fuses it.
inline float widen(std::uint8_t x) {
    constexpr double head = 257.0 / 65536.0;
    constexpr double rest = 1.0 / 255.0 - head;
    const auto v = static_cast<float>(static_cast<std::int32_t>(x));
    return v * static_cast<float>(head) + v * static_cast<float>(rest);
}
inline float widen(float x) { return x; }
inline float widen(double x) { return static_cast<float>(x); }

using RowKernel = RowWriter::Kernel;

// The one source of the row kernels, inlined into a function for each instruction set.
template <typename T, int C>
[[gnu::always_inline]] inline void convert(const std::byte* row, float* __restrict out, std::int64_t pixels) {
    const T* __restrict x = reinterpret_cast<const T*>(row);
    for (std::int64_t p = 0; p < pixels; ++p) {
        for (int c = 0; c < C; ++c) out[c * pixels + p] = widen(x[p * C + c]);
    }
}

template <typename T, int C>
void convert_baseline(const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}

#if defined(__x86_64__)
template <typename T, int C>
[[gnu::target("avx2")]] void convert_avx2(const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}

template <typename T, int C>
[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void convert_avx512(
    const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}
#endif

template <typename T, int C>
RowKernel best_kernel() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return convert_avx512<T, C>;
    }
    if (__builtin_cpu_supports("avx2")) return convert_avx2<T, C>;
#endif
    return convert_baseline<T, C>;
}

template <typename T>
RowKernel kernel_for(std::int64_t channels) {
    switch (channels) {
        case 1: return best_kernel<T, 1>();
        case 3: return best_kernel<T, 3>();
        case 4: return best_kernel<T, 4>();
        default: throw std::invalid_argument("channels must be 1, 3 or 4, got " + std::to_string(channels));
    }
}

RowKernel kernel_for(const RowLayout& layout) {
    switch (layout.element) {
        case Element::uint8: return kernel_for<std::uint8_t>(layout.channels);
        case Element::float32: return kernel_for<float>(layout.channels);
        case Element::float64: return kernel_for<double>(layout.channels);
    }
    throw std::invalid_argument("element type must be uint8, float32 or float64");
}

}  // namespace

std::size_t RowLayout::bytes() const {
    const auto features = static_cast<std::size_t>(pixels * channels);
    switch (element) {
        case Element::uint8: return features;
        case Element::float32: return features * sizeof(float);
        case Element::float64: return features * sizeof(double);
    }
    return 0;
}

RowWriter::RowWriter(const RowLayout& layout, const Form&)
    : kernel_(kernel_for(layout)),
      pixels_(layout.pixels),
      bytes_(static_cast<std::size_t>(layout.pixels * layout.channels) * sizeof(float)) {}

}  // namespace fastvae
