// Quadratic forms in noise and in the few rectified units that it switches.
#pragma once

#include <cstdint>

namespace fastvae {

constexpr std::int64_t flip_columns = 32;  // of gram that lie together: a strip of them may stay in the nearest cache
constexpr std::int64_t flip_draws = 32;    // of a datum that are worked on together

// With y = (1, noise) and delta = max(y . layer, 0), of which most is 0,
//
//     value = noise . (square y) + y . (cross delta) + delta . (gram delta).
//
// All are float32, contiguous.
struct Flips {
    std::int64_t samples = 0, batch = 0, latents = 0, units = 0;  // units: a multiple of flip_columns
    int threads = 1;
    const float* noise = nullptr;   // [samples, batch, latents]
    const float* layer = nullptr;   // [batch, 1 + latents, units]
    const float* cross = nullptr;   // [batch, 1 + latents, units]
    const float* square = nullptr;  // [batch, latents, 1 + latents]
    const float* gram = nullptr;    // [units / flip_columns, units, flip_columns], an upper triangle in strips of columns
    double* values = nullptr;       // [samples, batch]

    // y, padded with zeros so that it fills vectors
    std::int64_t width() const { return (1 + latents + 15) / 16 * 16; }
};

// Memory of one thread; each piece begins at a cache line.
struct FlipScratch {
    float* rows;            // [latents + units, width]: square, and of cross a row for each unit
    float* y;               // [flip_draws, width]
    float* delta;           // [flip_draws, units]
    std::int32_t* flipped;  // [flip_draws, units]: the units whose delta is above 0, in order
    std::int32_t* ends;     // [flip_draws, units / flip_columns]: how many of them come before the end of each strip
};

// The parallel part: compiled once for each instruction set.
using FlipsKernel = void (*)(const Flips&, const FlipScratch* by_thread);

// The values do not depend on `threads` or on the instruction set.
void run(const Flips& call, FlipsKernel kernel);

}  // namespace fastvae
