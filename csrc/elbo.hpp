// The ELBO for CPU tensors: sampling, KL, reconstruction, and their gradients, in one pass over the data.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flips.hpp"

namespace fastvae {

enum class DType : int { float32, float64, bfloat16, float16, uint8 };
enum class Likelihood : int { none, mse, gaussian, bernoulli };

// A strided tensor of rows; strides count elements.
struct View {
    const void* data = nullptr;
    DType dtype = DType::float32;
    std::int64_t sample = 0, row = 0, column = 0;
};

// One value, or one for each row, in the compute type.
struct PerRow {
    const void* data = nullptr;
    std::int64_t stride = 0;
};

// One call. `real64` chooses the compute type Real: float, or double. A stage runs, and an output is made,
// where its pointer is set. Tensors that are written are contiguous.
struct Elbo {
    bool real64 = false;
    std::int64_t samples = 1, batch = 0, features = 0, latents = 0;
    int threads = 1;
    bool stream = false;  // the gradient of x_hat past the cache, where it would not stay in it

    Likelihood likelihood = Likelihood::none;
    bool half = false, per_sample = false, clamp = false, floor = false;
    double clamp_low = 0, clamp_high = 0;
    double free_bits = 0;  // with floor: what an element of the KL counts at least, in the loss
    double recon_scale = 1, kl_scale = 1, log_variance = 0;
    double constant = 0;  // of -log p(x | z), for each element

    View x_hat, x, mu, logvar;       // [K, B, D], [B, D], [B, Z], [B, Z]
    const void* kl = nullptr;        // Real [B], instead of mu and logvar
    const void* weight = nullptr;    // Real [B]
    double beta = 1;
    const void* beta_latents = nullptr;  // Real [Z], instead of beta

    bool sample = false;
    std::uint64_t seed = 0, offset = 0;
    std::int64_t first_row = 0;

    // values
    void *loss = nullptr, *recon = nullptr, *kl_term = nullptr;  // Real, one or [B]
    void* z = nullptr;                                           // mu's dtype [K, B, Z]
    void* kl_rows = nullptr;                                     // Real [B]

    // upstream gradients; with none of loss, recon and kl_term, the gradient is that of the loss itself
    bool upstream = false;
    PerRow g_loss, g_recon, g_kl_term, g_kl_rows;
    View g_z;

    // gradients, in the dtypes of their inputs; Real for kl and log_variance
    void *g_x_hat = nullptr, *g_mu = nullptr, *g_logvar = nullptr, *g_kl = nullptr, *g_log_variance = nullptr;
};

// What the parallel part leaves for the sums in fixed order: one entry for a chunk of a row.
struct Partials {
    double* recon = nullptr;        // [K, B, chunks of D]
    double* kl = nullptr;           // [B, chunks of Z]
    double* weighted_kl = nullptr;  // likewise, as it counts in the loss: at least free_bits, times its beta
};

constexpr std::int64_t feature_chunk = 4096;
constexpr std::int64_t latent_chunk = 1024;

constexpr std::int64_t chunks(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// The parallel part: compiled once for each instruction set, and chosen at run time.
using Kernel = void (*)(const Elbo&, const Partials&);

struct InstructionSet {
    std::string name;
    Kernel kernel;
    FlipsKernel flips;
};

// Those that this machine can run, best first.
const std::vector<InstructionSet>& instruction_sets();

// That of this name, or the best. Throws std::invalid_argument for one that this machine cannot run.
const InstructionSet& instruction_set(const std::optional<std::string>& name);

// Compute one call. The result does not depend on `threads` or on the instruction set.
void run(Elbo call, const InstructionSet& isa);

}  // namespace fastvae
