#include "product.hpp"

namespace fastvae {

#if defined(FASTVAE_FLOAT_PRODUCTS)
void multiply_float(const Product&, ProductMemory&);
#endif
#if defined(FASTVAE_BF16_PRODUCTS)
void multiply_bf16(const Product&, ProductMemory&);
#endif

Unit* ProductMemory::at_least(std::size_t units) {
    if (const auto bytes = units * sizeof(Unit); !memory_ || memory_->size() < bytes) {
        memory_.reset();
        memory_ = std::make_unique<Memory>(bytes);
    }
    return static_cast<Unit*>(memory_->data());
}

namespace {

// What decides how this CPU multiplies.
struct CPU {
    bool avx512 = false, avx512_bf16 = false, amx_bf16 = false, intel = false;
};

CPU find_cpu() {
    CPU cpu;
#if defined(__x86_64__)
    __builtin_cpu_init();
    cpu.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    cpu.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
    cpu.intel = __builtin_cpu_is("intel");
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
    cpu.amx_bf16 = __builtin_cpu_supports("amx-bf16");
#endif
#endif
    return cpu;
}

const CPU& cpu() {
    static const CPU found = find_cpu();
    return found;
}

}  // namespace

// Intel's AVX512_BF16 takes twice as long for as many products as float32 does (Emerald Rapids: a quarter of the
// instructions, each with twice the products); its CPUs have AMX for them, unless a virtual machine hides it.
bool prefers_bf16() { return cpu().amx_bf16 || (cpu().avx512_bf16 && !cpu().intel); }

Multiply product_kernel([[maybe_unused]] bool bf16) {
#if defined(FASTVAE_BF16_PRODUCTS)
    if (bf16) return cpu().avx512 && cpu().avx512_bf16 && !cpu().amx_bf16 ? multiply_bf16 : nullptr;
#endif
#if defined(FASTVAE_FLOAT_PRODUCTS)
    if (!bf16) return cpu().avx512 ? multiply_float : nullptr;
#endif
    return nullptr;
}

}  // namespace fastvae
