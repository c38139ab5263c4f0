// The parallel part of the ELBO. This file is compiled once for each instruction set (FASTVAE_ISA names it),
// and holds nothing of external linkage but the kernel of that name.
#include <cfloat>

#include "elements.hpp"
#include "philox.hpp"

namespace fastvae {
namespace {

template <class R>
inline R at(const PerRow& rows, std::int64_t b) {
    return rows.data ? static_cast<const R*>(rows.data)[b * rows.stride] : R(0);
}

template <class R>
inline R weight(const Elbo& p, std::int64_t b) {
    return p.weight ? static_cast<const R*>(p.weight)[b] : R(1);
}

// d loss / d (reconstruction sum of row b)
template <class R>
inline R recon_coefficient(const Elbo& p, std::int64_t b) {
    const R g = p.upstream ? at<R>(p.g_loss, b) + at<R>(p.g_recon, b) : R(1);
    const R w = weight<R>(p, b);
    return w == 0 ? R(0) : g * w * static_cast<R>(p.recon_scale * (p.half ? 0.5 : 1.0));
}

// The element of the reconstruction sum, and its derivative times c. The Gaussian's is the square alone: its
// factor 1/2 and its constants are put in with the final sums.
template <class R, Likelihood L>
inline Vec<R> recon_element(Vec<R> x_hat, Vec<R> x, R c, R inverse_sigma, Vec<R>& gradient) {
    using V = Vec<R>;
    if constexpr (L == Likelihood::bernoulli) {
        const V t = exp(-abs(x_hat));
        const V one = V{} + R(1);
        gradient = ((x_hat < 0 ? t : one) / (one + t) - x) * c;
        return (x_hat > 0 ? x_hat : V{}) - x * x_hat + log1p(t);
    } else if constexpr (L == Likelihood::gaussian) {
        const V d = (x_hat - x) * inverse_sigma;
        gradient = d * inverse_sigma * c;
        return d * d;
    } else {
        const V d = x_hat - x;
        gradient = d * (R(2) * c);
        return d * d;
    }
}

// One chunk of one row: the sum of its elements, and their gradient.
template <class R, Likelihood L, bool Value, bool Gradient>
double recon_chunk(const Elbo& p, std::int64_t k, std::int64_t b, std::int64_t first, std::int64_t n) {
    constexpr int lanes = Lanes<R>::count, block = 512, step = 4 * lanes;
    using V = Vec<R>;
    alignas(64) R x_hat_buffer[block], x_buffer[block], g_buffer[block];
    const R c = Gradient ? recon_coefficient<R>(p, b) : R(0);
    const std::int64_t g_at = (k * p.batch + b) * p.features + first;
    const bool direct = p.x_hat.dtype == dtype_of<R>;
    R inverse_sigma = 1;
    if constexpr (L == Likelihood::gaussian) {
        const double largest = sizeof(R) == 4 ? FLT_MAX : DBL_MAX;
        const double inverse = std::exp(-0.5 * p.log_variance);
        inverse_sigma = static_cast<R>(inverse < largest ? inverse : largest);
    }
    V total[4] = {}, rest = {};
    for (std::int64_t i = 0; i < n; i += block) {
        const std::int64_t m = n - i < block ? n - i : block;
        const R* x_hat = read_row(p.x_hat, k, b, first + i, m, x_hat_buffer);
        const R* x = read_row(p.x, 0, b, first + i, m, x_buffer);
        R* g = direct && Gradient ? static_cast<R*>(p.g_x_hat) + g_at + i : g_buffer;
        std::int64_t j = 0;
        for (; j + step <= m; j += step) {
            for (int a = 0; a < 4; ++a) {
                V gradient;
                const V value =
                    recon_element<R, L>(load(x_hat + j + a * lanes), load(x + j + a * lanes), c, inverse_sigma, gradient);
                if constexpr (Value) total[a] += value;
                if constexpr (Gradient) store(g + j + a * lanes, gradient);
            }
        }
        for (; j + lanes <= m; j += lanes) {
            V gradient;
            const V value = recon_element<R, L>(load(x_hat + j), load(x + j), c, inverse_sigma, gradient);
            if constexpr (Value) rest += value;
            if constexpr (Gradient) store(g + j, gradient);
        }
        if (j < m) {
            const std::size_t bytes = static_cast<std::size_t>(m - j) * sizeof(R);
            R x_hat_tail[lanes] = {}, x_tail[lanes] = {};
            std::memcpy(x_hat_tail, x_hat + j, bytes);
            std::memcpy(x_tail, x + j, bytes);
            V gradient;
            const V value = recon_element<R, L>(load(x_hat_tail), load(x_tail), c, inverse_sigma, gradient);
            if constexpr (Value) rest += lane_index<R>() < static_cast<R>(m - j) ? value : V{};
            if constexpr (Gradient) std::memcpy(g + j, &gradient, bytes);
        }
        if constexpr (Gradient) {
            // a dropped row has the gradient zero, not zero times infinity
            if (c == 0) std::memset(g, 0, static_cast<std::size_t>(m) * sizeof(R));
            if (!direct) write_row(g, m, p.x_hat.dtype, p.g_x_hat, g_at + i);
        }
    }
    return sum_lanes<R>((total[0] + total[1]) + (total[2] + total[3]) + rest);
}

template <class R, Likelihood L, bool Value, bool Gradient>
void recon_units(const Elbo& p, const Partials& partials) {
    const std::int64_t per_row = chunks(p.features, feature_chunk);
    const std::int64_t units = p.samples * p.batch * per_row;
#pragma omp for schedule(static) nowait
    for (std::int64_t u = 0; u < units; ++u) {
        const std::int64_t row = u / per_row, first = (u % per_row) * feature_chunk;
        const std::int64_t n = p.features - first < feature_chunk ? p.features - first : feature_chunk;
        const double sum = recon_chunk<R, L, Value, Gradient>(p, row / p.batch, row % p.batch, first, n);
        if constexpr (Value) partials.recon[u] = sum;
    }
}

template <class R, Likelihood L>
void recon_stage(const Elbo& p, const Partials& partials) {
    if (!p.g_x_hat) return recon_units<R, L, true, false>(p, partials);
    if (!partials.recon) return recon_units<R, L, false, true>(p, partials);
    recon_units<R, L, true, true>(p, partials);
}

// The sum of n elements in a fixed order that depends on n alone.
template <class R>
double sum_row(const R* p, std::int64_t n) {
    constexpr int lanes = Lanes<R>::count;
    Vec<R> total = {};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) total += load(p + i);
    for (int l = 0; i < n; ++i, ++l) total[l] += p[i];
    return sum_lanes<R>(total);
}

// A unit of the latent stages: whole rows while they fit into one chunk, else one chunk of one row. Packed,
// so that few latents fill the lanes as well as many.
template <class R>
class LatentUnit {
public:
    LatentUnit(const Elbo& call, std::int64_t row, std::int64_t n_rows, std::int64_t first, std::int64_t n_columns)
        : p(call), row0(row), rows(n_rows), first(first), columns(n_columns), n(n_rows * n_columns) {
        for (std::int64_t r = 0; r < rows; ++r) {
            copy_row(p.mu, 0, row0 + r, first, columns, mu + r * columns);
            copy_row(p.logvar, 0, row0 + r, first, columns, logvar + r * columns);
        }
        for (std::int64_t i = n; i < padded(); ++i) mu[i] = logvar[i] = 0;
        for (std::int64_t i = 0; i < padded(); i += lanes) {
            const V v = clamped(load(logvar + i));
            if (p.sample) store(sigma + i, exp(v * R(0.5)));
        }
    }

    void value(const Partials& partials) {
        const std::int64_t per_row = chunks(p.latents, latent_chunk), chunk = first / latent_chunk;
        kl_elements();
        for (std::int64_t r = 0; r < rows; ++r)
            partials.kl[(row0 + r) * per_row + chunk] = sum_row(work + r * columns, columns);
        if (!partials.weighted_kl) return;
        for (std::int64_t r = 0; r < rows; ++r) {
            R* kl = work + r * columns;
            for (std::int64_t j = 0; j < columns; ++j) {
                const R factor = beta(j), counted = free(kl[j]) ? static_cast<R>(p.free_bits) : kl[j];
                kl[j] = factor == 0 ? R(0) : factor * counted;
            }
            partials.weighted_kl[(row0 + r) * per_row + chunk] = sum_row(kl, columns);
        }
    }

    void draw() {
        for (std::int64_t k = 0; k < p.samples; ++k) {
            noise(k);
            for (std::int64_t i = 0; i < n; ++i) work[i] = mu[i] + sigma[i] * static_cast<R>(eps[i]);
            write_row(work, n, p.mu.dtype, p.z, (k * p.batch + row0) * p.latents + first);
        }
    }

    void gradient() {
        for (std::int64_t i = 0; i < padded(); ++i) through_mu[i] = through_sigma[i] = 0;
        for (std::int64_t k = 0; p.g_z.data && k < p.samples; ++k) {
            noise(k);
            for (std::int64_t r = 0; r < rows; ++r)
                copy_row(p.g_z, k, row0 + r, first, columns, work + r * columns);
            for (std::int64_t i = 0; i < n; ++i) {
                through_mu[i] += work[i];
                through_sigma[i] += work[i] * static_cast<R>(eps[i]);
            }
        }
        if (p.floor) kl_elements();
        for (std::int64_t r = 0; r < rows; ++r) kl_coefficients(row0 + r, work + r * columns);
        for (std::int64_t i = n; i < padded(); ++i) work[i] = 0;
        for (std::int64_t i = 0; i < padded(); i += lanes) {
            const V c = load(work + i), raw = load(logvar + i), zero = {};
            const V e = exp_minus_one<R>(clamped(raw)).expm1;
            store(mu + i, (c == 0 ? zero : c * load(mu + i)) + load(through_mu + i));
            const V s = load(through_sigma + i) * R(0.5);
            V g = c == 0 ? zero : c * e * R(0.5);
            if (p.sample) g += s == 0 ? zero : s * load(sigma + i);
            if (p.clamp) g = (raw < R(p.clamp_low) ? zero : (raw > R(p.clamp_high) ? zero : g));
            store(work + i, g);
        }
        const std::int64_t to = row0 * p.latents + first;
        if (p.g_mu) write_row(mu, n, p.mu.dtype, p.g_mu, to);
        if (p.g_logvar) write_row(work, n, p.logvar.dtype, p.g_logvar, to);
    }

private:
    using V = Vec<R>;
    static constexpr int lanes = Lanes<R>::count;

    std::int64_t padded() const { return (n + lanes - 1) / lanes * lanes; }

    // NaN compares false and stays
    V clamped(V v) const {
        if (!p.clamp) return v;
        const V low = V{} + R(p.clamp_low), high = V{} + R(p.clamp_high);
        return v < low ? low : (v > high ? high : v);
    }

    void noise(std::int64_t k) {
        const std::uint64_t i = static_cast<std::uint64_t>((p.first_row + row0) * p.latents + first);
        normals(p.seed, p.offset + static_cast<std::uint64_t>(k), i, n, eps);
    }

    void kl_elements() {
        for (std::int64_t i = 0; i < padded(); i += lanes) {
            const V m = load(mu + i);
            store(work + i, (m * m + exp_minus_one<R>(clamped(load(logvar + i))).f) * R(0.5));
        }
    }

    R beta(std::int64_t j) const {
        return p.beta_latents ? static_cast<const R*>(p.beta_latents)[first + j] : static_cast<R>(p.beta);
    }

    // Whether this KL is at or below its floor; NaN is not.
    bool free(const R& kl) const { return p.floor && kl <= static_cast<R>(p.free_bits); }

    // d loss / d KL of each latent of row b, in the place of its KL (which only a floor reads)
    void kl_coefficients(std::int64_t b, R* out) const {
        const R w = weight<R>(p, b), scale = w == 0 ? R(0) : w * static_cast<R>(p.kl_scale);
        const R g = p.upstream ? at<R>(p.g_loss, b) : R(1);
        const R rest = (w == 0 ? R(0) : at<R>(p.g_kl_term, b) * scale) + at<R>(p.g_kl_rows, b);
        for (std::int64_t j = 0; j < columns; ++j) {
            const R of_latent = free(out[j]) ? R(0) : beta(j);
            out[j] = (of_latent == 0 || scale == 0 ? R(0) : g * of_latent * scale) + rest;
        }
    }

    const Elbo& p;
    std::int64_t row0, rows, first, columns, n;
    alignas(64) R mu[latent_chunk], logvar[latent_chunk], sigma[latent_chunk], work[latent_chunk];
    alignas(64) R through_mu[latent_chunk], through_sigma[latent_chunk];
    alignas(64) float eps[latent_chunk];
};

template <class R>
void latent_stages(const Elbo& p, const Partials& partials) {
    const std::int64_t per_row = chunks(p.latents, latent_chunk);
    const std::int64_t rows = per_row == 1 ? latent_chunk / p.latents : 1;
    const std::int64_t units = chunks(p.batch, rows) * per_row;
#pragma omp for schedule(static) nowait
    for (std::int64_t u = 0; u < units; ++u) {
        const std::int64_t row = u / per_row * rows, first = u % per_row * latent_chunk;
        const std::int64_t n_rows = p.batch - row < rows ? p.batch - row : rows;
        const std::int64_t n_columns = p.latents - first < latent_chunk ? p.latents - first : latent_chunk;
        LatentUnit<R> unit(p, row, n_rows, first, n_columns);
        if (partials.kl) unit.value(partials);
        if (p.z) unit.draw();
        if (p.g_mu || p.g_logvar) unit.gradient();
    }
}

template <class R>
void stages(const Elbo& p, const Partials& partials) {
    if (p.features > 0 && (p.g_x_hat || partials.recon)) {
        switch (p.likelihood) {
            case Likelihood::mse: recon_stage<R, Likelihood::mse>(p, partials); break;
            case Likelihood::gaussian: recon_stage<R, Likelihood::gaussian>(p, partials); break;
            case Likelihood::bernoulli: recon_stage<R, Likelihood::bernoulli>(p, partials); break;
            case Likelihood::none: break;
        }
    }
    if (p.mu.data && p.latents > 0) latent_stages<R>(p, partials);
}

}  // namespace

void FASTVAE_ISA(const Elbo& p, const Partials& partials) {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    {
        if (p.real64)
            stages<double>(p, partials);
        else
            stages<float>(p, partials);
    }
}

}  // namespace fastvae
