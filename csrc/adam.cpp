#include "adam.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>

#include "elements.hpp"

namespace fastvae {
namespace {

constexpr std::int64_t block = 4096;  // elements that one thread takes at a time
constexpr std::int64_t strip = 256, ahead = 4 * strip;

// While it lives, numbers below the smallest normal one are zeros in this thread. The moments of a weight that gets no
// gradient any more, as behind a ReLU that died, come there and stay; many processors take a hundred times as long for
// them, and they change no weight.
class SubnormalsAreZero {
#if defined(__SSE__)
public:
    SubnormalsAreZero() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | denormals_zero); }
    ~SubnormalsAreZero() { _mm_setcsr(before_); }
    SubnormalsAreZero(const SubnormalsAreZero&) = delete;
    SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

private:
    static constexpr unsigned denormals_zero = 0x40;
    const unsigned before_ = _mm_getcsr();
#endif
};

// What the steps of one update have in common.
struct Factors {
    float mean, square, square_new, step_size, root, eps, keep, gradient, average_new;
};

Factors factors_of(const Adam& adam, const AdamPart& part) {
    const double lr = adam.lr * part.lr_factor;
    const double correction1 = 1 - std::pow(adam.beta1, static_cast<double>(adam.step));
    const double correction2 = 1 - std::pow(adam.beta2, static_cast<double>(adam.step));
    return {
        static_cast<float>(1 - adam.beta1),
        static_cast<float>(adam.beta2),
        static_cast<float>(1 - adam.beta2),
        static_cast<float>(lr / correction1),
        static_cast<float>(1 / std::sqrt(correction2)),
        static_cast<float>(adam.eps),
        static_cast<float>(1 - lr * part.weight_decay),
        static_cast<float>(adam.gradient_factor),
        static_cast<float>(adam.average_new),
    };
}

template <bool averages, class G, class C>
[[gnu::always_inline]] inline void update_strip(
    const Factors& f, std::int64_t n, const G* __restrict gradient, float* __restrict weight, float* __restrict mean,
    float* __restrict square, C* __restrict copy, float* __restrict average) {
    const Factors local = f;
    for (std::int64_t i = 0; i < n; ++i) {
        const float w = weight[i];
        const float g = widen(gradient[i]) * local.gradient;
        const float m = mean[i] + local.mean * (g - mean[i]);
        const float s = local.square * square[i] + local.square_new * (g * g);
        const float updated = w * local.keep - local.step_size * m / (__builtin_sqrtf(s) * local.root + local.eps);
        mean[i] = m;
        square[i] = s;
        weight[i] = updated;
        copy[i] = narrow<C>(updated);
        if constexpr (averages) average[i] += local.average_new * (updated - average[i]);
    }
}

// Asks for the cache lines of copy[first, end), to write them.
template <class C>
[[gnu::always_inline]] inline void ask_for(const C* copy, std::int64_t first, std::int64_t end) {
    constexpr std::int64_t line = 64 / sizeof(C);
    for (std::int64_t i = first; i < end; i += line) __builtin_prefetch(copy + i, 1);
}

// The products have brought the copies into the caches of all cores: without being asked for ahead, each line
// would be waited for, and the update take nearly twice as long.
template <bool averages, class G, class C>
[[gnu::always_inline]] inline void update_block(
    const Factors& f, std::int64_t n, const G* gradient, float* weight, float* mean, float* square, C* copy,
    float* average) {
    ask_for(copy, 0, std::min(ahead, n));
    for (std::int64_t i = 0; i < n; i += strip) {
        ask_for(copy, i + ahead, std::min(i + ahead + strip, n));
        update_strip<averages>(
            f, std::min(strip, n - i), gradient + i, weight + i, mean + i, square + i, copy + i,
            averages ? average + i : nullptr);
    }
}

template <class G, class C>
using Block = void (*)(const Factors&, std::int64_t, const G*, float*, float*, float*, C*, float*);

template <bool averages, class G, class C>
void baseline(const Factors& f, std::int64_t n, const G* g, float* w, float* m, float* s, C* c, float* a) {
    update_block<averages>(f, n, g, w, m, s, c, a);
}

#if defined(__x86_64__)
template <bool averages, class G, class C>
[[gnu::target("avx2,prfchw")]] void avx2(
    const Factors& f, std::int64_t n, const G* g, float* w, float* m, float* s, C* c, float* a) {
    update_block<averages>(f, n, g, w, m, s, c, a);
}

template <bool averages, class G, class C>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512,prfchw")]] void avx512(
    const Factors& f, std::int64_t n, const G* g, float* w, float* m, float* s, C* c, float* a) {
    update_block<averages>(f, n, g, w, m, s, c, a);
}
#endif

template <bool averages, class G, class C>
Block<G, C> best() {
#if defined(__x86_64__)
    const std::string& name = instruction_sets().front().name;
    if (name == "avx512") return avx512<averages, G, C>;
    if (name == "avx2") return avx2<averages, G, C>;
#endif
    return baseline<averages, G, C>;
}

template <class G, class C>
void update_range(const Factors& f, const AdamPart& part, std::int64_t first, std::int64_t n) {
    static const Block<G, C> alone = best<false, G, C>(), with_average = best<true, G, C>();
    C unused[std::is_same_v<C, float> ? block : 1];
    C* copy = part.copy ? static_cast<C*>(part.copy) + first : unused;
    const Block<G, C> run = part.average ? with_average : alone;
    run(f, n, static_cast<const G*>(part.gradient) + first, part.weight + first, part.mean + first,
        part.square + first, copy, part.average ? part.average + first : nullptr);
}

template <class C>
void update_range(const Factors& f, const AdamPart& part, std::int64_t first, std::int64_t n) {
    switch (part.gradient_dtype) {
        case DType::bfloat16: return update_range<BFloat16, C>(f, part, first, n);
        case DType::float16: return update_range<Float16, C>(f, part, first, n);
        default: return update_range<float, C>(f, part, first, n);
    }
}

// Of what has no gradient, and so stays, the average goes on.
void average_range(const Factors& f, const AdamPart& part, std::int64_t first, std::int64_t n) {
    for (std::int64_t i = first; i < first + n; ++i)
        part.average[i] += f.average_new * (part.weight[i] - part.average[i]);
}

void update_range(const Factors& f, const AdamPart& part, std::int64_t first, std::int64_t n) {
    if (!part.gradient) return average_range(f, part, first, n);
    if (!part.copy) return update_range<float>(f, part, first, n);
    if (part.copy_dtype == DType::float16) return update_range<Float16>(f, part, first, n);
    update_range<BFloat16>(f, part, first, n);
}

// Squares of floats are exact in double, so that only the order of the sums matters: it is that of the lanes.
template <class G>
[[gnu::always_inline]] inline double squares_block(std::int64_t n, const G* __restrict gradient) {
    constexpr int lanes = 16;
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int lane = 0; lane < lanes; ++lane) {
            const double g = widen(gradient[i + lane]);
            sums[lane] += g * g;
        }
    for (; i < n; ++i) {
        const double g = widen(gradient[i]);
        sums[i % lanes] += g * g;
    }
    double sum = 0;
    for (const double part : sums) sum += part;
    return sum;
}

template <class G>
double squares_baseline(std::int64_t n, const G* gradient) {
    return squares_block(n, gradient);
}

#if defined(__x86_64__)
template <class G>
[[gnu::target("avx2")]] double squares_avx2(std::int64_t n, const G* gradient) {
    return squares_block(n, gradient);
}
#endif

template <class G>
double squares_range(const AdamPart& part, std::int64_t first, std::int64_t n) {
    const G* gradient = static_cast<const G*>(part.gradient) + first;
#if defined(__x86_64__)
    static const bool has_avx2 = instruction_sets().front().name.rfind("avx", 0) == 0;
    if (has_avx2) return squares_avx2(n, gradient);  // as fast as memory is
#endif
    return squares_baseline(n, gradient);
}

double squares_range(const AdamPart& part, std::int64_t first, std::int64_t n) {
    switch (part.gradient_dtype) {
        case DType::bfloat16: return squares_range<BFloat16>(part, first, n);
        case DType::float16: return squares_range<Float16>(part, first, n);
        default: return squares_range<float>(part, first, n);
    }
}

// The largest exponent of a block, in place in the bits: all ones for inf and NaN. As signed integers, which
// every instruction set compares.
template <class Bits>
[[gnu::always_inline]] inline Bits largest_exponent(std::int64_t n, const Bits* __restrict gradient, Bits exponent) {
    Bits largest = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const Bits bits = gradient[i] & exponent;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

template <class Bits>
bool finite_baseline(std::int64_t n, const Bits* gradient, Bits exponent) {
    return largest_exponent(n, gradient, exponent) != exponent;
}

#if defined(__x86_64__)
template <class Bits>
[[gnu::target("avx2")]] bool finite_avx2(std::int64_t n, const Bits* gradient, Bits exponent) {
    return largest_exponent(n, gradient, exponent) != exponent;
}
#endif

template <class Bits>
bool finite_range(const AdamPart& part, std::int64_t first, std::int64_t n, Bits exponent) {
    const Bits* gradient = static_cast<const Bits*>(part.gradient) + first;
#if defined(__x86_64__)
    static const bool has_avx2 = instruction_sets().front().name.rfind("avx", 0) == 0;
    if (has_avx2) return finite_avx2(n, gradient, exponent);
#endif
    return finite_baseline(n, gradient, exponent);
}

bool finite_range(const AdamPart& part, std::int64_t first, std::int64_t n) {
    switch (part.gradient_dtype) {
        case DType::bfloat16: return finite_range<std::int16_t>(part, first, n, 0x7f80);
        case DType::float16: return finite_range<std::int16_t>(part, first, n, 0x7c00);
        default: return finite_range<std::int32_t>(part, first, n, 0x7f800000);
    }
}

std::int64_t blocks(const AdamPart& part) { return part.gradient ? chunks(part.n, block) : 0; }

void lower(std::atomic<std::int64_t>& least, std::int64_t value) {
    std::int64_t before = least;
    while (value < before && !least.compare_exchange_weak(before, value)) {}
}

}  // namespace

std::int64_t update(const Adam& adam, const std::vector<AdamPart>& parts, bool check, int threads) {
    const auto count = static_cast<std::int64_t>(parts.size());
    std::atomic<std::int64_t> first_bad{count};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        [[maybe_unused]] const SubnormalsAreZero subnormals_are_zero;
        for (std::int64_t p = 0; check && p < count; ++p) {
            const AdamPart& part = parts[static_cast<std::size_t>(p)];
#pragma omp for schedule(static) nowait
            for (std::int64_t b = 0; b < blocks(part); ++b)
                if (!finite_range(part, b * block, std::min(block, part.n - b * block))) lower(first_bad, p);
        }
#pragma omp barrier
        for (std::int64_t p = 0; first_bad == count && p < count; ++p) {
            const AdamPart& part = parts[static_cast<std::size_t>(p)];
            const Factors factors = factors_of(adam, part);
            const std::int64_t n_blocks = part.gradient || part.average ? chunks(part.n, block) : 0;
#pragma omp for schedule(static) nowait
            for (std::int64_t b = 0; b < n_blocks; ++b)
                update_range(factors, part, b * block, std::min(block, part.n - b * block));
        }
    }
    return first_bad;
}

double sum_of_squares(const std::vector<AdamPart>& parts, int threads) {
    std::vector<std::int64_t> begins;  // of each part's blocks in `sums`
    std::int64_t count = 0;
    for (const AdamPart& part : parts) {
        begins.push_back(count);
        count += blocks(part);
    }
    std::vector<double> sums(static_cast<std::size_t>(count));
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (std::size_t p = 0; p < parts.size(); ++p) {
#pragma omp for schedule(static) nowait
        for (std::int64_t b = 0; b < blocks(parts[p]); ++b)
            sums[static_cast<std::size_t>(begins[p] + b)] =
                squares_range(parts[p], b * block, std::min(block, parts[p].n - b * block));
    }
    double sum = 0;
    for (const double part : sums) sum += part;
    return sum;
}

}  // namespace fastvae
