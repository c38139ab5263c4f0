#include "product.hpp"

namespace fastvae {

#if defined(FASTVAE_PRODUCTS)
Cut cut_product(const Product&);
std::size_t pairs_of_part(const Product&, const Cut&);
void multiply_parts(const Product&, const Cut&, Pair* memory);
#endif

Pair* ProductMemory::at_least(std::size_t pairs) {
    if (const auto bytes = pairs * sizeof(Pair); !memory_ || memory_->size() < bytes) {
        memory_.reset();
        memory_ = std::make_unique<Memory>(bytes);
    }
    return static_cast<Pair*>(memory_->data());
}

namespace {

bool has_tiles() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

bool has_vectors() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace

bool bf16_supported() { return has_vectors() || has_tiles(); }

bool products_supported() {
#if defined(FASTVAE_PRODUCTS)
    return has_vectors() && !has_tiles() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

void multiply([[maybe_unused]] const Product& product, [[maybe_unused]] ProductMemory& memory) {
#if defined(FASTVAE_PRODUCTS)
    if (product.m == 0 || product.n == 0) return;
    const Cut cut = cut_product(product);
    const auto parts = static_cast<std::size_t>(cut.rows * cut.columns);
    multiply_parts(product, cut, memory.at_least(parts * pairs_of_part(product, cut)));
#endif
}

}  // namespace fastvae
