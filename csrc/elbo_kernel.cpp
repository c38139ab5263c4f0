// The parallel part of the ELBO. This file is compiled once for each instruction set (FASTVAE_ISA names it),
// and holds nothing of external linkage but the kernel of that name.
#include <cfloat>

#include "elements.hpp"
#include "philox.hpp"

namespace fastvae {
namespace {

template <class R>
inline R upstream(const PerRow& rows, std::int64_t b) {
    return rows.data ? static_cast<const R*>(rows.data)[b * rows.stride] : R(0);
}

template <class R>
inline R weight(const Elbo& p, std::int64_t b) {
    return p.weight ? static_cast<const R*>(p.weight)[b] : R(1);
}

// d loss / d (reconstruction sum of row b)
template <class R>
inline R recon_coefficient(const Elbo& p, std::int64_t b) {
    const R g = p.upstream ? upstream<R>(p.g_loss, b) + upstream<R>(p.g_recon, b) : R(1);
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

template <class R>
inline R inverse_deviation(const Elbo& p) {
    const double largest = sizeof(R) == 4 ? FLT_MAX : DBL_MAX, inverse = std::exp(-0.5 * p.log_variance);
    return static_cast<R>(inverse < largest ? inverse : largest);
}

enum class Store { none, cached, streamed };

// The sum over n elements of a row in four vectors and one, carried from piece to piece, and the gradient.
template <class R, Likelihood L, bool Value, Store To>
struct ReconRow {
    static constexpr int lanes = Lanes<R>::count, step = 4 * lanes;
    using V = Vec<R>;

    R c, inverse_sigma;
    V total[4] = {}, rest = {};

    void add(const R* x_hat, const R* x, R* g, std::int64_t n) {
        std::int64_t j = 0;
        for (; j + step <= n; j += step)
            for (int a = 0; a < 4; ++a) element(x_hat + j + a * lanes, x + j + a * lanes, g + j + a * lanes, total[a]);
        for (; j + lanes <= n; j += lanes) element(x_hat + j, x + j, g + j, rest);
        if (j < n) {
            const std::size_t bytes = static_cast<std::size_t>(n - j) * sizeof(R);
            R x_hat_tail[lanes] = {}, x_tail[lanes] = {};
            std::memcpy(x_hat_tail, x_hat + j, bytes);
            std::memcpy(x_tail, x + j, bytes);
            V gradient;
            const V value = recon_element<R, L>(load(x_hat_tail), load(x_tail), c, inverse_sigma, gradient);
            if constexpr (Value) rest += lane_index<R>() < static_cast<R>(n - j) ? value : V{};
            if constexpr (To != Store::none) std::memcpy(g + j, &gradient, bytes);
        }
        // a dropped row has the gradient zero, not zero times infinity
        if constexpr (To != Store::none)
            if (c == 0) std::memset(g, 0, static_cast<std::size_t>(n) * sizeof(R));
    }

    double sum() const { return sum_lanes<R>((total[0] + total[1]) + (total[2] + total[3]) + rest); }

private:
    void element(const R* x_hat, const R* x, R* g, V& sum) {
        V gradient;
        const V value = recon_element<R, L>(load(x_hat), load(x), c, inverse_sigma, gradient);
        if constexpr (Value) sum += value;
        if constexpr (To == Store::cached) store(g, gradient);
        if constexpr (To == Store::streamed) stream(g, gradient);
    }
};

// One chunk of one row: in one piece where both rows are read in place, else in pieces that are converted.
template <class R, Likelihood L, bool Value, Store To>
double recon_chunk(const Elbo& p, R inverse_sigma, std::int64_t k, std::int64_t b, std::int64_t first, std::int64_t n) {
    constexpr std::int64_t buffered = 512;  // a multiple of ReconRow's step, so that pieces do not change the sum
    constexpr bool gradient = To != Store::none;
    alignas(64) R x_hat_buffer[buffered], x_buffer[buffered], g_buffer[buffered];
    ReconRow<R, L, Value, To> row{gradient ? recon_coefficient<R>(p, b) : R(0), inverse_sigma};
    const std::int64_t g_at = (k * p.batch + b) * p.features + first;
    const bool direct = p.x_hat.dtype == dtype_of<R>;
    const std::int64_t piece = in_place<R>(p.x_hat) && in_place<R>(p.x) ? n : buffered;
    for (std::int64_t i = 0; i < n; i += piece) {
        const std::int64_t m = n - i < piece ? n - i : piece;
        const R* x_hat = read_row(p.x_hat, k, b, first + i, m, x_hat_buffer);
        const R* x = read_row(p.x, 0, b, first + i, m, x_buffer);
        R* g = direct && gradient ? static_cast<R*>(p.g_x_hat) + g_at + i : g_buffer;
        row.add(x_hat, x, g, m);
        if (gradient && !direct) write_row(g, m, p.x_hat.dtype, p.g_x_hat, g_at + i);
    }
    return row.sum();
}

template <class R, Likelihood L, bool Value, Store To>
void recon_units(const Elbo& p, const Partials& partials) {
    const std::int64_t per_row = chunks(p.features, feature_chunk);
    const std::int64_t units = p.samples * p.batch * per_row;
    const R inverse_sigma = L == Likelihood::gaussian ? inverse_deviation<R>(p) : R(1);
#pragma omp for schedule(static) nowait
    for (std::int64_t u = 0; u < units; ++u) {
        // divisions cost as much as a short row
        const std::int64_t row = per_row == 1 ? u : u / per_row, first = (u - row * per_row) * feature_chunk;
        const std::int64_t k = p.samples == 1 ? 0 : row / p.batch, b = row - k * p.batch;
        const std::int64_t n = p.features - first < feature_chunk ? p.features - first : feature_chunk;
        const double sum = recon_chunk<R, L, Value, To>(p, inverse_sigma, k, b, first, n);
        if constexpr (Value) partials.recon[u] = sum;
    }
    if constexpr (To == Store::streamed) end_streams();
}

template <class R, Likelihood L>
void recon_stage(const Elbo& p, const Partials& partials) {
    if (!p.g_x_hat) return recon_units<R, L, true, Store::none>(p, partials);
    if constexpr (sizeof(R) == 4) {
        if (p.stream && partials.recon) return recon_units<R, L, true, Store::streamed>(p, partials);
        if (p.stream) return recon_units<R, L, false, Store::streamed>(p, partials);
    }
    if (!partials.recon) return recon_units<R, L, false, Store::cached>(p, partials);
    recon_units<R, L, true, Store::cached>(p, partials);
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
        copy_rows(p.mu, 0, mu);
        copy_rows(p.logvar, 0, logvar);
        for (std::int64_t i = n; i < padded(); ++i) mu[i] = logvar[i] = 0;
        for (std::int64_t i = 0; p.sample && i < padded(); i += lanes)
            store(sigma + i, exp(clamped(load(logvar + i)) * R(0.5)));
        // the KL of each element and half of exp(logvar) - 1, its slope: value and gradient share the exponential
        for (std::int64_t i = 0; i < padded(); i += lanes) {
            const V m = load(mu + i);
            const auto e = exp_minus_one<R>(clamped(load(logvar + i)));
            store(kl + i, (m * m + e.f) * R(0.5));
            store(slope + i, e.expm1 * R(0.5));
        }
    }

    void value(const Partials& partials) {
        const std::int64_t per_row = chunks(p.latents, latent_chunk), chunk = first / latent_chunk;
        for (std::int64_t r = 0; r < rows; ++r)
            partials.kl[(row0 + r) * per_row + chunk] = sum_row(kl + r * columns, columns);
        if (!partials.weighted_kl) return;
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t j = 0; j < columns; ++j) {
                const R factor = beta(j), of_j = kl[r * columns + j];
                const R counted = free(of_j) ? static_cast<R>(p.free_bits) : of_j;
                work[j] = factor == 0 ? R(0) : factor * counted;
            }
            partials.weighted_kl[(row0 + r) * per_row + chunk] = sum_row(work, columns);
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
        if (p.sample) through_samples();
        for (std::int64_t r = 0; r < rows; ++r) kl_coefficients(row0 + r, r * columns);
        for (std::int64_t i = n; i < padded(); ++i) work[i] = 0;
        for (std::int64_t i = 0; i < padded(); i += lanes) {
            const V c = load(work + i), raw = load(logvar + i), zero = {};
            V g_mu = c == 0 ? zero : c * load(mu + i);
            V g = c == 0 ? zero : c * load(slope + i);
            if (p.sample) {
                const V s = load(through_sigma + i) * R(0.5);
                g_mu += load(through_mu + i);
                g += s == 0 ? zero : s * load(sigma + i);
            }
            if (p.clamp) g = (raw < R(p.clamp_low) ? zero : (raw > R(p.clamp_high) ? zero : g));
            store(mu + i, g_mu);
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

    // This unit's part of sample k of a tensor.
    void copy_rows(const View& view, std::int64_t k, R* to) const {
        if (view.column == 1 && view.row == columns) return copy_row(view, k, row0, first, n, to);
        for (std::int64_t r = 0; r < rows; ++r) copy_row(view, k, row0 + r, first, columns, to + r * columns);
    }

    void noise(std::int64_t k) {
        const std::uint64_t i = static_cast<std::uint64_t>((p.first_row + row0) * p.latents + first);
        normals(p.seed, p.offset + static_cast<std::uint64_t>(k), i, n, eps);
    }

    // The sums over samples of d loss / d z, and of the same times the noise.
    void through_samples() {
        for (std::int64_t i = 0; i < padded(); ++i) through_mu[i] = through_sigma[i] = 0;
        for (std::int64_t k = 0; p.g_z.data && k < p.samples; ++k) {
            noise(k);
            copy_rows(p.g_z, k, work);
            for (std::int64_t i = 0; i < n; ++i) {
                through_mu[i] += work[i];
                through_sigma[i] += work[i] * static_cast<R>(eps[i]);
            }
        }
    }

    R beta(std::int64_t j) const {
        return p.beta_latents ? static_cast<const R*>(p.beta_latents)[first + j] : static_cast<R>(p.beta);
    }

    // Whether this KL is at or below its floor; NaN is not.
    bool free(const R& kl) const { return p.floor && kl <= static_cast<R>(p.free_bits); }

    // d loss / d KL of each latent of row b, whose elements begin at `at`, into `work`.
    void kl_coefficients(std::int64_t b, std::int64_t at) {
        const R w = weight<R>(p, b), scale = w == 0 ? R(0) : w * static_cast<R>(p.kl_scale);
        const R g = p.upstream ? upstream<R>(p.g_loss, b) : R(1);
        const R rest = (w == 0 ? R(0) : upstream<R>(p.g_kl_term, b) * scale) + upstream<R>(p.g_kl_rows, b);
        const bool each = p.beta_latents || p.floor;
        const R common = of_loss(static_cast<R>(p.beta), g, scale) + rest;
        for (std::int64_t j = 0; j < columns; ++j)
            work[at + j] = each ? of_loss(free(kl[at + j]) ? R(0) : beta(j), g, scale) + rest : common;
    }

    static R of_loss(R beta, R g, R scale) { return beta == 0 || scale == 0 ? R(0) : g * beta * scale; }

    const Elbo& p;
    std::int64_t row0, rows, first, columns, n;
    alignas(64) R mu[latent_chunk], logvar[latent_chunk], kl[latent_chunk], slope[latent_chunk];
    alignas(64) R sigma[latent_chunk], work[latent_chunk];
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
