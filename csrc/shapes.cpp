#include "shapes.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace fastvae {
namespace {

constexpr int kSide = static_cast<int>(kShapeSide);
constexpr float kRadius = 15.0f;          // pixels, of the circle around each shape at scale 1
constexpr float kRatio = 0.6f;            // of the ellipse's axes
constexpr double kHeart = 0.6306019374818708;  // radius of the circle around the heart below, about (0, kHeart)

// A shape with its scale, turned and placed.
struct Pose {
    float size;    // radius of the circle around it
    float cosine;
    float sine;
    float x;       // centre
    float y;
};

constexpr int kLanes = 8;
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = std::int32_t __attribute__((vector_size(4 * kLanes)));
using ByteLanes = std::uint8_t __attribute__((vector_size(kLanes)));

#define FASTVAE_INLINE [[gnu::always_inline]] inline  // into the function of each instruction set

FASTVAE_INLINE Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
FASTVAE_INLINE Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
FASTVAE_INLINE Lanes clamp01(Lanes v) { return least(most(v, Lanes{}), Lanes{} + 1.0f); }
FASTVAE_INLINE Lanes magnitude(Lanes v) { return most(v, -v); }
FASTVAE_INLINE Lanes square(Lanes v) { return v * v; }
FASTVAE_INLINE Lanes root(Lanes v) {
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

// The part of the pixel at (u, v), in the shape's own axes with v downwards, that a shape covers: 1/2 at its edge, and
// linear in the distance from it over one pixel.
struct Square {
    float half;
    explicit Square(float size) : half(size * 0.70710678f) {}
    FASTVAE_INLINE Lanes operator()(Lanes u, Lanes v) const {
        return clamp01(half + 0.5f - magnitude(u)) * clamp01(half + 0.5f - magnitude(v));
    }
};

struct Ellipse {
    float a2;  // 1 / semi-axis squared
    float b2;
    explicit Ellipse(float size) : a2(1.0f / (size * size)), b2(a2 / (kRatio * kRatio)) {}
    FASTVAE_INLINE Lanes operator()(Lanes u, Lanes v) const {
        // distance to first order: f / |grad f| for f = (u/a)^2 + (v/b)^2 - 1
        const Lanes p = u * a2, q = v * b2;
        return clamp01(0.5f - (u * p + v * q - 1.0f) / (2.0f * root(p * p + q * q + 1e-12f)));
    }
};

// A square that stands on its tip, and two half circles: the exact distance is known.
struct Heart {
    float unit;  // pixels
    float per_pixel;
    explicit Heart(float size) : unit(size / static_cast<float>(kHeart)), per_pixel(1.0f / unit) {}
    FASTVAE_INLINE Lanes operator()(Lanes u, Lanes v) const {
        const Lanes x = magnitude(u) * per_pixel;
        const Lanes y = static_cast<float>(kHeart) - v * per_pixel;
        const IntLanes is_lobe = x + y > 1.0f;
        const Lanes middle = 0.5f * most(x + y, Lanes{});
        const Lanes body = least(square(x) + square(y - 1.0f), square(x - middle) + square(y - middle));
        const Lanes lobe = square(x - 0.25f) + square(y - 0.75f);
        const Lanes far = root(is_lobe ? lobe : body);
        const Lanes distance = is_lobe ? far - 0.35355339f : x < y ? -far : far;
        return clamp01(0.5f - distance * unit);
    }
};

// Only the pixels that the circle around the shape can touch, in whole vectors.
template <typename Shape>
FASTVAE_INLINE void draw(const Pose& pose, std::uint8_t* image) {
    constexpr Lanes kCentres = {0.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f};
    const Shape covers(pose.size);
    const float reach = pose.size + 1.0f;
    const int top = std::max(static_cast<int>(pose.y - reach), 0);
    const int bottom = std::min(static_cast<int>(pose.y + reach) + 1, kSide);
    for (int i = top; i < bottom; ++i) {
        const float v = static_cast<float>(i) + 0.5f - pose.y;
        const float chord = std::sqrt(std::max(reach * reach - v * v, 0.0f));
        const int left = std::max(static_cast<int>(pose.x - chord), 0) / kLanes * kLanes;
        const int right = std::min(static_cast<int>(pose.x + chord) + 1, kSide);
        for (int j = left; j < right; j += kLanes) {
            const Lanes u = kCentres + (static_cast<float>(j) - pose.x);
            const Lanes part = covers(pose.cosine * u + pose.sine * v, pose.cosine * v - pose.sine * u);
            const auto grey = __builtin_convertvector(part * 255.0f + 0.5f, IntLanes);
            const auto bytes = __builtin_convertvector(grey, ByteLanes);
            std::memcpy(image + i * kSide + j, &bytes, sizeof(bytes));
        }
    }
}

#undef FASTVAE_INLINE

using Draw = void (*)(const Pose& pose, std::uint8_t* image);
using Draws = std::array<Draw, 3>;

template <typename Shape>
void draw_baseline(const Pose& pose, std::uint8_t* image) {
    draw<Shape>(pose, image);
}

#if defined(__x86_64__)
template <typename Shape>
[[gnu::target("avx2")]] void draw_avx2(const Pose& pose, std::uint8_t* image) {
    draw<Shape>(pose, image);
}

template <typename Shape>
[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void draw_avx512(const Pose& pose,
                                                                                      std::uint8_t* image) {
    draw<Shape>(pose, image);
}
#endif

Draws best_draws() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return {draw_avx512<Square>, draw_avx512<Ellipse>, draw_avx512<Heart>};
    }
    if (__builtin_cpu_supports("avx2")) return {draw_avx2<Square>, draw_avx2<Ellipse>, draw_avx2<Heart>};
#endif
    return {draw_baseline<Square>, draw_baseline<Ellipse>, draw_baseline<Heart>};
}

// The values of a factor: n of them, evenly from `first` to `last`, both included.
double value(std::int64_t index, std::int64_t n, double first, double last) {
    return first + (last - first) * static_cast<double>(index) / static_cast<double>(n - 1);
}

Pose pose_of(std::int64_t scale, std::int64_t orientation, std::int64_t x, std::int64_t y) {
    struct Turn {
        float cosine;
        float sine;
    };
    static const auto turns = [] {
        std::array<Turn, kShapeFactors[2]> made{};
        for (std::int64_t i = 0; i < kShapeFactors[2]; ++i) {
            const double angle = value(i, kShapeFactors[2], 0.0, 6.283185307179586);
            made[static_cast<std::size_t>(i)] = {static_cast<float>(std::cos(angle)),
                                                 static_cast<float>(std::sin(angle))};
        }
        return made;
    }();
    const Turn turn = turns[static_cast<std::size_t>(orientation)];
    const double quarter = kSide / 4.0;
    return {kRadius * static_cast<float>(value(scale, kShapeFactors[1], 0.5, 1.0)), turn.cosine, turn.sine,
            static_cast<float>(value(x, kShapeFactors[3], quarter, 3.0 * quarter)),
            static_cast<float>(value(y, kShapeFactors[4], quarter, 3.0 * quarter))};
}

}  // namespace

void draw_shape(std::int64_t number, std::uint8_t* image) {
    static const Draws draws = best_draws();
    std::int64_t factors[5];
    for (int f = 4; f >= 0; --f) {
        factors[f] = number % kShapeFactors[f];
        number /= kShapeFactors[f];
    }
    std::memset(image, 0, static_cast<std::size_t>(kShapeSide * kShapeSide));
    draws[static_cast<std::size_t>(factors[0])](pose_of(factors[1], factors[2], factors[3], factors[4]), image);
}

void ShapeRows::gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const {
    const RowWriter write(layout(), form);
    alignas(64) std::uint8_t image[kShapeSide * kShapeSide];
    for (std::int64_t i = 0; i < n; ++i, out += write.bytes()) {
        draw_shape(number(rows[i]), image);
        write(reinterpret_cast<const std::byte*>(image), rows[i], out);
    }
}

}  // namespace fastvae
