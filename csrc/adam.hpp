// Adam and AdamW on the CPU: one pass that reads the gradients as backward left them, updates float32 weights
// and moments, and writes the weights' copies in the dtype of the matrix products.
#pragma once

#include <cstdint>
#include <vector>

#include "elbo.hpp"

namespace fastvae {

// One parameter: contiguous, n elements each. `copy` and `average` may be null.
struct AdamPart {
    std::int64_t n = 0;
    const void* gradient = nullptr;
    DType gradient_dtype = DType::float32;
    float *weight = nullptr, *mean = nullptr, *square = nullptr;
    void* copy = nullptr;
    DType copy_dtype = DType::bfloat16;
    float* average = nullptr;  // exponential moving average of the weight
};

// Kingma and Ba 2015, algorithm 1, with weight decay as in Loshchilov and Hutter 2019 (AdamW).
struct Adam {
    double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
    std::int64_t step = 1;  // counts from 1
    double gradient_factor = 1;
    double average_new = 0;  // what the averages take of the new weights
};

// The result does not depend on `threads` or on the instruction set.
void update(const Adam& adam, const std::vector<AdamPart>& parts, int threads);

// The first part whose gradient has an inf or a NaN; the number of parts if none has.
std::int64_t first_not_finite(const std::vector<AdamPart>& parts, int threads);

// The sum of the squares of all gradients; neither does it depend on these.
double sum_of_squares(const std::vector<AdamPart>& parts, int threads);

}  // namespace fastvae
