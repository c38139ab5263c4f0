// The parallel part of the forms of flips.hpp. Compiled once for each instruction set, as elbo_kernel.cpp is.
#include "flips.hpp"

#include <omp.h>

#include "simd.hpp"

namespace fastvae {
namespace {

constexpr std::int64_t lanes = Lanes<float>::count;

using Register = float __attribute__((vector_size(FASTVAE_REGISTER)));
constexpr std::int64_t in_register = FASTVAE_REGISTER / sizeof(float);
static_assert(flip_columns % (2 * in_register) == 0);

inline Register load_register(const float* from) {
    Register v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}

// 16 sums, to which products are added. A vector of 16 would go through memory where registers are narrower.
struct Parts {
    static constexpr std::int64_t n = lanes / in_register;
    Register sums[n] = {};

    void add(const float* v, float factor) {
        for (std::int64_t i = 0; i < n; ++i) sums[i] += load_register(v + i * in_register) * factor;
    }
    void add(const Parts& v, const float* factors) {
        for (std::int64_t i = 0; i < n; ++i) sums[i] += v.sums[i] * load_register(factors + i * in_register);
    }
    double sum() const { return sum_lanes<float>(bit_cast<f32x16>(sums)); }
};

// One datum: what its draws have in common, and then its draws, some at a time.
class Datum {
public:
    Datum(const Flips& call, const FlipScratch& scratch, std::int64_t b)
        : p(call), s(scratch), b(b), width(call.width()), layer(p.layer + b * (1 + p.latents) * p.units) {
        const std::int64_t n = 1 + p.latents;
        const float* square = p.square + b * p.latents * n;
        const float* cross = p.cross + b * n * p.units;
        float* row = s.rows;
        for (std::int64_t k = 0; k < p.latents; ++k, row += width) {
            for (std::int64_t l = 0; l < width; ++l) row[l] = l < n ? square[k * n + l] : 0.0f;
        }
        for (std::int64_t j = 0; j < p.units; ++j, row += width) {
            for (std::int64_t l = 0; l < width; ++l) row[l] = l < n ? cross[l * p.units + j] : 0.0f;
        }
    }

    // Draws k, ..., k + n - 1, at most flip_draws of them.
    void draws(std::int64_t k, std::int64_t n) {
        for (std::int64_t d = 0; d < flip_draws; ++d) {
            float* y = s.y + d * width;
            std::memset(y, 0, static_cast<std::size_t>(width) * sizeof(float));
            y[0] = 1;
            if (d >= n) continue;
            const float* noise = p.noise + ((k + d) * p.batch + b) * p.latents;
            std::memcpy(y + 1, noise, static_cast<std::size_t>(p.latents) * sizeof(float));
        }
        rectify(n);
        Parts values[flip_draws];
        for (std::int64_t d = 0; d < n; ++d) {
            find_flipped(d);
            values[d] = of_noise(d);
        }
        for (std::int64_t strip = 0; strip * flip_columns < p.units; ++strip)
            for (std::int64_t d = 0; d < n; ++d) add_flipped(d, strip, values[d]);
        for (std::int64_t d = 0; d < n; ++d) p.values[(k + d) * p.batch + b] = values[d].sum();
    }

private:
    // delta of the first n draws: as many of them together, and as many units, as registers hold sums.
    void rectify(std::int64_t n) {
        constexpr std::int64_t together = 4;
        for (std::int64_t j = 0; j < p.units; j += 2 * in_register) {
            const Register low = load_register(layer + j), high = load_register(layer + j + in_register);
            for (std::int64_t d = 0; d < n; d += together) {
                Register sums[together][2];
                for (auto& sum : sums) sum[0] = low, sum[1] = high;
                for (std::int64_t k = 1; k <= p.latents; ++k) {
                    const float* row = layer + k * p.units + j;
                    const Register left = load_register(row), right = load_register(row + in_register);
                    for (std::int64_t i = 0; i < together; ++i) {
                        const float y = s.y[(d + i) * width + k];
                        sums[i][0] += left * y;
                        sums[i][1] += right * y;
                    }
                }
                for (std::int64_t i = 0; i < together; ++i) {
                    for (Register& sum : sums[i]) sum = sum > 0 ? sum : Register{};
                    std::memcpy(s.delta + (d + i) * p.units + j, sums[i], sizeof(sums[i]));
                }
            }
        }
    }

    void find_flipped(std::int64_t d) {
        const float* delta = s.delta + d * p.units;
        std::int32_t *flipped = s.flipped + d * p.units, *end = s.ends + d * (p.units / flip_columns);
        std::int32_t n = 0;
        for (std::int64_t j = 0; j < p.units; j += lanes) {
            n += put_above_zero(load(delta + j), static_cast<std::int32_t>(j), flipped + n);
            if ((j + lanes) % flip_columns == 0) *end++ = n;
        }
    }

    // noise . (square y) + y . (cross delta), in parts
    Parts of_noise(std::int64_t d) const {
        const float *y = s.y + d * width, *delta = s.delta + d * p.units, *cross = s.rows + p.latents * width;
        const std::int32_t* flipped = s.flipped + d * p.units;
        const std::int32_t n = s.ends[(d + 1) * (p.units / flip_columns) - 1];
        Parts total;
        for (std::int64_t l = 0; l < width; l += lanes) {
            Parts sum;
            for (std::int64_t k = 0; k < p.latents; ++k) sum.add(s.rows + k * width + l, y[1 + k]);
            for (std::int32_t i = 0; i < n; ++i) sum.add(cross + flipped[i] * width + l, delta[flipped[i]]);
            total.add(sum, y + l);
        }
        return total;
    }

    // What the columns of a strip are of delta . (gram delta), in parts
    void add_flipped(std::int64_t d, std::int64_t strip, Parts& total) const {
        constexpr std::int64_t n_sums = flip_columns / lanes;
        const std::int32_t* end = s.ends + d * (p.units / flip_columns) + strip;
        if (*end == (strip == 0 ? 0 : end[-1])) return;  // none of its own
        const float *delta = s.delta + d * p.units, *gram = p.gram + strip * p.units * flip_columns;
        const std::int32_t* flipped = s.flipped + d * p.units;
        Parts sums[n_sums];
        for (std::int32_t i = 0; i < *end; ++i) {
            const float* row = gram + flipped[i] * flip_columns;
            for (std::int64_t a = 0; a < n_sums; ++a) sums[a].add(row + a * lanes, delta[flipped[i]]);
        }
        for (std::int64_t a = 0; a < n_sums; ++a) total.add(sums[a], delta + strip * flip_columns + a * lanes);
    }

    const Flips& p;
    const FlipScratch& s;
    const std::int64_t b, width;
    const float* const layer;
};

}  // namespace

void FASTVAE_ISA(const Flips& call, const FlipScratch* by_thread) {
#pragma omp parallel for num_threads(call.threads) if (call.threads > 1) schedule(static)
    for (std::int64_t b = 0; b < call.batch; ++b) {
        Datum datum(call, by_thread[omp_get_thread_num()], b);
        for (std::int64_t k = 0; k < call.samples; k += flip_draws)
            datum.draws(k, call.samples - k < flip_draws ? call.samples - k : flip_draws);
    }
}

}  // namespace fastvae
