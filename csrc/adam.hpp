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
    const void* gradient = nullptr;  // null: the parameter stays as it is, and its average follows
    DType gradient_dtype = DType::float32;
    float *weight = nullptr, *mean = nullptr, *square = nullptr;
    void* copy = nullptr;
    DType copy_dtype = DType::bfloat16;
    float* average = nullptr;  // exponential moving average of the weight
    double lr_factor = 1, weight_decay = 0;
};

// Kingma and Ba 2015, algorithm 1, with weight decay as in Loshchilov and Hutter 2019 (AdamW). Subnormal numbers are
// zeros, on x86.
struct Adam {
    double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
    std::int64_t step = 1;  // counts from 1
    double gradient_factor = 1;
    double average_new = 0;  // what the averages take of the new weights
};

// One step, and the number of parts. With `check` a gradient with an inf or a NaN leaves all as it is, and the
// first such part is given. The result does not depend on `threads` or on the instruction set.
std::int64_t update(const Adam& adam, const std::vector<AdamPart>& parts, bool check, int threads);

// The sum of the squares of all gradients; neither does it depend on these.
double sum_of_squares(const std::vector<AdamPart>& parts, int threads);

}  // namespace fastvae
