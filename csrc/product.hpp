// Products of bfloat16 matrices, for CPUs that multiply them (AVX512_BF16).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "buffers.hpp"

namespace fastvae {

using Bf16 = std::uint16_t;  // its bits
using Pair = std::uint32_t;  // two of them that are neighbours in k, the first in the low half

// A matrix where it lies; strides count elements, and one of them is 1.
struct Factor {
    const Bf16* data = nullptr;
    std::int64_t row = 0, column = 0;
};

// c = a b, [m, n] = [m, k] [k, n], contiguous, rounded once. Each element is summed in float32, one pair of k after
// another, in parts of 512 that are then added up, as oneDNN has it: the same for any m, n and threads.
struct Product {
    std::int64_t m = 0, n = 0, k = 0;
    int threads = 1;
    Factor a, b;
    const Bf16* bias = nullptr;   // [n], added to each row before it is rounded
    bool relu = false;            // c = max(c, 0)
    const Bf16* where = nullptr;  // [m, n], contiguous: where it is at most 0, c is 0: the backward of a ReLU
    Bf16* c = nullptr;
};

// Rows and columns of c are cut into so many parts, each for one thread.
struct Cut {
    int rows = 1, columns = 1;
};

// Memory in which parts of factors lie as they are multiplied; for one product at a time.
class ProductMemory {
public:
    Pair* at_least(std::size_t pairs);

private:
    std::unique_ptr<Memory> memory_;
};

// Whether this CPU multiplies bfloat16 matrices (AVX512_BF16 or AMX).
bool bf16_supported();

// Whether it has AVX512_BF16 and nothing better, as AMX is.
bool products_supported();

// Only where they are supported.
void multiply(const Product& product, ProductMemory& memory);

}  // namespace fastvae
