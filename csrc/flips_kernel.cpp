// The parallel part of the forms of flips.hpp. Compiled once for each instruction set, as elbo_kernel.cpp is.
#include "flips.hpp"

#include <omp.h>

#include "simd.hpp"

namespace fastvae {
namespace {

constexpr std::int64_t lanes = Lanes<float>::count;

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
        f32x16 values[flip_draws];
        for (std::int64_t d = 0; d < n; ++d) {
            find_flipped(d);
            values[d] = of_noise(d);
        }
        for (std::int64_t strip = 0; strip * flip_columns < p.units; ++strip)
            for (std::int64_t d = 0; d < n; ++d) values[d] += of_flipped(d, strip);
        for (std::int64_t d = 0; d < n; ++d) p.values[(k + d) * p.batch + b] = sum_lanes<float>(values[d]);
    }

private:
    // delta of the first n draws: as many of them together, and as many units, as registers hold sums.
    void rectify(std::int64_t n) {
        using V = float __attribute__((vector_size(FASTVAE_REGISTER)));
        constexpr std::int64_t in_register = sizeof(V) / sizeof(float), together = 4;
        const auto at = [](const float* from) {
            V v;
            std::memcpy(&v, from, sizeof(v));
            return v;
        };
        for (std::int64_t j = 0; j < p.units; j += 2 * in_register) {
            const V low = at(layer + j), high = at(layer + j + in_register);
            for (std::int64_t d = 0; d < n; d += together) {
                V sums[together][2];
                for (auto& sum : sums) sum[0] = low, sum[1] = high;
                for (std::int64_t k = 1; k <= p.latents; ++k) {
                    const V left = at(layer + k * p.units + j), right = at(layer + k * p.units + j + in_register);
                    for (std::int64_t i = 0; i < together; ++i) {
                        const float y = s.y[(d + i) * width + k];
                        sums[i][0] += left * y;
                        sums[i][1] += right * y;
                    }
                }
                for (std::int64_t i = 0; i < together; ++i) {
                    for (V& sum : sums[i]) sum = sum > 0 ? sum : V{};
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
            for (std::uint32_t found = above_zero(load(delta + j)); found; found &= found - 1)
                flipped[n++] = static_cast<std::int32_t>(j) + __builtin_ctz(found);
            if ((j + lanes) % flip_columns == 0) *end++ = n;
        }
    }

    // noise . (square y) + y . (cross delta), in parts
    f32x16 of_noise(std::int64_t d) const {
        const float *y = s.y + d * width, *delta = s.delta + d * p.units, *cross = s.rows + p.latents * width;
        const std::int32_t* flipped = s.flipped + d * p.units;
        const std::int32_t n = s.ends[(d + 1) * (p.units / flip_columns) - 1];
        f32x16 total = {};
        for (std::int64_t l = 0; l < width; l += lanes) {
            f32x16 sum = {};
            for (std::int64_t k = 0; k < p.latents; ++k) sum += load(s.rows + k * width + l) * y[1 + k];
            for (std::int32_t i = 0; i < n; ++i) sum += load(cross + flipped[i] * width + l) * delta[flipped[i]];
            total += sum * load(y + l);
        }
        return total;
    }

    // What the columns of a strip are of delta . (gram delta), in parts
    f32x16 of_flipped(std::int64_t d, std::int64_t strip) const {
        constexpr std::int64_t n_sums = flip_columns / lanes;
        const std::int32_t* end = s.ends + d * (p.units / flip_columns) + strip;
        f32x16 total = {};
        if (*end == (strip == 0 ? 0 : end[-1])) return total;  // none of its own
        const float *delta = s.delta + d * p.units, *gram = p.gram + strip * p.units * flip_columns;
        const std::int32_t* flipped = s.flipped + d * p.units;
        f32x16 sums[n_sums] = {};
        for (std::int32_t i = 0; i < *end; ++i) {
            const float* row = gram + flipped[i] * flip_columns;
            for (std::int64_t a = 0; a < n_sums; ++a) sums[a] += load(row + a * lanes) * delta[flipped[i]];
        }
        for (std::int64_t a = 0; a < n_sums; ++a) total += sums[a] * load(delta + strip * flip_columns + a * lanes);
        return total;
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
