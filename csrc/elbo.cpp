#include "elbo.hpp"

#include <algorithm>
#include <span>
#include <stdexcept>
#include <utility>

namespace fastvae {

#if defined(__x86_64__)
void elbo_avx512(const Elbo&, const Partials&);
void elbo_avx2(const Elbo&, const Partials&);
void flips_avx512(const Flips&, const FlipScratch*);
void flips_avx2(const Flips&, const FlipScratch*);
#endif
void elbo_base(const Elbo&, const Partials&);
void flips_base(const Flips&, const FlipScratch*);

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found.push_back({"avx512", elbo_avx512, flips_avx512});
        if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", elbo_avx2, flips_avx2});
#endif
        found.push_back({"base", elbo_base, flips_base});
        return found;
    }();
    return sets;
}

const InstructionSet& instruction_set(const std::optional<std::string>& name) {
    const auto& sets = instruction_sets();
    if (!name) return sets.front();
    const auto found = std::ranges::find(sets, *name, &InstructionSet::name);
    if (found == sets.end())
        throw std::invalid_argument("instruction_set: got '" + *name + "', which this CPU cannot run");
    return *found;
}

namespace {

// The sums over chunks, samples and rows, one after another in double: the same at any thread count.
template <class R>
class Sums {
public:
    Sums(const Elbo& call, const Partials& partials) : p(call), partials(partials) {}

    void write() const {
        double loss = 0, recon = 0, kl_term = 0, g_log_variance = 0;
        for (std::int64_t b = 0; b < p.batch; ++b) {
            const double w = value(p.weight, b, 1.0);
            const double kl = p.kl ? value(p.kl, b, 0.0) : latent_sum(partials.kl, b);
            if (p.kl_rows) static_cast<R*>(p.kl_rows)[b] = static_cast<R>(kl);
            const double squares = recon_sum(b);
            if (p.g_log_variance && w != 0)
                g_log_variance += times(recon_upstream(b) * w * 0.5, elements() - squares);
            if (p.g_kl) static_cast<R*>(p.g_kl)[b] = static_cast<R>(kl_gradient(b, w));
            if (!p.loss) continue;
            const double r = times(w * p.recon_scale, recon_value(squares));
            const double k = times(w * p.kl_scale, kl);
            const double weighted =
                partials.weighted_kl ? times(w * p.kl_scale, latent_sum(partials.weighted_kl, b)) : times(p.beta, k);
            if (p.per_sample) put(b, r + weighted, r, k);
            loss += r + weighted;
            recon += r;
            kl_term += k;
        }
        if (p.loss && !p.per_sample) put(0, loss, recon, kl_term);
        if (p.g_log_variance) *static_cast<R*>(p.g_log_variance) = static_cast<R>(g_log_variance * p.recon_scale);
    }

private:
    static double value(const void* data, std::int64_t b, double otherwise) {
        return data ? static_cast<double>(static_cast<const R*>(data)[b]) : otherwise;
    }

    static double upstream(const PerRow& rows, std::int64_t b) { return value(rows.data, b * rows.stride, 0.0); }

    // A factor of exactly 0 drops even an infinite term.
    static double times(double factor, double term) { return factor == 0 ? 0.0 : factor * term; }

    double elements() const { return static_cast<double>(p.samples) * static_cast<double>(p.features); }

    double recon_upstream(std::int64_t b) const {
        return p.upstream ? upstream(p.g_loss, b) + upstream(p.g_recon, b) : 1.0;
    }

    double kl_gradient(std::int64_t b, double w) const {
        const double g = p.upstream ? upstream(p.g_loss, b) : 1.0;
        return w == 0 ? 0.0 : (times(p.beta, g) + upstream(p.g_kl_term, b)) * w * p.kl_scale;
    }

    double recon_sum(std::int64_t b) const {
        const std::int64_t n = chunks(p.features, feature_chunk);
        double total = 0;
        if (!partials.recon) return total;
        for (std::int64_t k = 0; k < p.samples; ++k)
            for (const double part : std::span(partials.recon + (k * p.batch + b) * n, static_cast<std::size_t>(n)))
                total += part;
        return total;
    }

    double latent_sum(const double* parts, std::int64_t b) const {
        const std::int64_t n = chunks(p.latents, latent_chunk);
        double total = 0;
        if (!parts) return total;
        for (const double part : std::span(parts + b * n, static_cast<std::size_t>(n))) total += part;
        return total;
    }

    double recon_value(double sum) const {
        if (p.likelihood == Likelihood::gaussian)
            return 0.5 * sum + elements() * (0.5 * p.log_variance + p.constant);
        return p.half ? 0.5 * sum : sum;
    }

    void put(std::int64_t at, double loss, double recon, double kl_term) const {
        static_cast<R*>(p.loss)[at] = static_cast<R>(loss);
        if (p.recon) static_cast<R*>(p.recon)[at] = static_cast<R>(recon);
        if (p.kl_term) static_cast<R*>(p.kl_term)[at] = static_cast<R>(kl_term);
    }

    const Elbo& p;
    const Partials& partials;
};

std::size_t item_size(DType dtype) {
    switch (dtype) {
        case DType::float32: return 4;
        case DType::float64: return 8;
        case DType::bfloat16:
        case DType::float16: return 2;
        case DType::uint8: return 1;
    }
    return 0;
}

// Whether the gradient of x_hat is better stored past the cache: with x_hat and x it would not fit into it, and
// every row begins where a vector may.
bool streams(const Elbo& call, std::size_t bytes) {
    // cores that share a last level of cache commonly have this much of it
    constexpr std::size_t cache = 32u << 20, vector = 64;
    const bool aligned = reinterpret_cast<std::uintptr_t>(call.g_x_hat) % vector == 0
        && static_cast<std::size_t>(call.features) * item_size(call.x_hat.dtype) % vector == 0;
    return call.g_x_hat && aligned && call.x_hat.dtype == DType::float32 && !call.real64 && 3 * bytes > cache;
}

}  // namespace

void run(Elbo call, const InstructionSet& isa) {
    const bool recon = call.likelihood != Likelihood::none && (call.loss || call.g_log_variance);
    const bool kl = call.mu.data && (call.loss || call.kl_rows);
    const bool weighted_kl = kl && (call.beta_latents || call.floor);
    const auto rows = static_cast<std::size_t>(call.batch);
    const auto latent_parts = rows * static_cast<std::size_t>(chunks(call.latents, latent_chunk));
    const auto recon_parts = rows * static_cast<std::size_t>(call.samples * chunks(call.features, feature_chunk));
    std::vector<double> scratch(
        (recon ? recon_parts : 0) + (kl ? latent_parts : 0) + (weighted_kl ? latent_parts : 0));
    Partials partials;
    double* next = scratch.data();
    if (recon) partials.recon = std::exchange(next, next + recon_parts);
    if (kl) partials.kl = std::exchange(next, next + latent_parts);
    if (weighted_kl) partials.weighted_kl = next;
    const auto bytes = rows * static_cast<std::size_t>(call.samples * call.features) * item_size(call.x_hat.dtype);
    call.stream = streams(call, bytes);
    isa.kernel(call, partials);
    if (call.real64)
        Sums<double>(call, partials).write();
    else
        Sums<float>(call, partials).write();
}

}  // namespace fastvae
