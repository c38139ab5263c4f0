// Products of float32 matrices, and of bfloat16 ones, for CPUs with AVX512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "buffers.hpp"

namespace fastvae {

using Bf16 = std::uint16_t;  // its bits
using Unit = std::uint32_t;  // of what is multiplied: a float, or two bfloat16 that are neighbours in k

// A matrix where it lies; strides count elements, and one of them is 1.
struct Factor {
    const void* data = nullptr;
    std::int64_t row = 0, column = 0;
};

// c = a b, [m, n] = [m, k] [k, n], contiguous, rounded once. All are float, or all Bf16, as the kernel has it. Each element is summed in
// float32, one unit of k after another, in parts of 512 that are then added up, as oneDNN has it: the same for any m,
// n and threads.
struct Product {
    std::int64_t m = 0, n = 0, k = 0;
    int threads = 1;
    Factor a, b;
    const void* bias = nullptr;   // [n], added to each row before it is rounded
    bool relu = false;            // c = max(c, 0)
    const void* where = nullptr;  // [m, n], contiguous: where it is at most 0, c is 0: the backward of a ReLU
    void* c = nullptr;
};

// Memory in which parts of factors lie as they are multiplied; for one product at a time.
class ProductMemory {
public:
    Unit* at_least(std::size_t units);

private:
    std::unique_ptr<Memory> memory_;
};

// Whether this CPU multiplies bfloat16 matrices faster than float32 ones.
bool prefers_bf16();

using Multiply = void (*)(const Product&, ProductMemory&);

// How this CPU multiplies bfloat16 matrices, or float32 ones; null where it lacks AVX512 (AVX512_BF16) for it, or has
// something better, as AMX is for bfloat16.
Multiply product_kernel(bool bf16);

}  // namespace fastvae
