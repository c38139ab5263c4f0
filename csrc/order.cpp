#include "order.hpp"

#include <bit>
#include <numeric>

#include "mix.hpp"

namespace fastvae {
namespace {

// After the finalizer of MurmurHash3: 32 bits wide, so that a vector holds many.
[[gnu::always_inline]] inline std::uint32_t round_function(std::uint32_t half, std::uint32_t key) {
    std::uint32_t h = (half ^ key) * 0x85ebca6b;
    h = (h ^ (h >> 15)) * 0xc2b2ae35;
    return h ^ (h >> 16);
}

}  // namespace

Order Order::sequential(std::int64_t n) { return Order(n); }

Order Order::shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch) {
    Order order(n);
    order.shuffled_ = n > 1;
    const int bits = n > 1 ? std::bit_width(static_cast<std::uint64_t>(n - 1)) : 0;
    order.high_bits_ = bits / 2;
    order.low_bits_ = bits - order.high_bits_;
    const std::uint64_t key = epoch_key(seed, epoch);
    for (std::size_t r = 0; r < kRounds; ++r) {
        order.keys_[r] = static_cast<std::uint32_t>(mix(key + (r + 1) * kGolden) >> 32);
    }
    return order;
}

// One pass of the network over a range of positions, in one source for every instruction set.
struct Order::Passes {
    using Function = void (*)(const Order& order, std::int64_t first, std::int64_t count, std::int64_t* out);

    [[gnu::always_inline]] static inline std::uint64_t one(const Order& order, std::uint64_t value) {
        const auto low_mask = static_cast<std::uint32_t>((std::uint64_t{1} << order.low_bits_) - 1);
        const auto high_mask = static_cast<std::uint32_t>((std::uint64_t{1} << order.high_bits_) - 1);
        std::uint32_t low = static_cast<std::uint32_t>(value) & low_mask;
        auto high = static_cast<std::uint32_t>(value >> order.low_bits_);
        for (std::size_t r = 0; r < kRounds; r += 2) {
            low ^= round_function(high, order.keys_[r]) & low_mask;
            high ^= round_function(low, order.keys_[r + 1]) & high_mask;
        }
        return (std::uint64_t{high} << order.low_bits_) | low;
    }

    [[gnu::always_inline]] static inline void range(const Order& shared, std::int64_t first, std::int64_t count,
                                                    std::int64_t* __restrict out) {
        const Order order = shared;
        for (std::int64_t i = 0; i < count; ++i) {
            out[i] = static_cast<std::int64_t>(one(order, static_cast<std::uint64_t>(first + i)));
        }
    }

    static void baseline(const Order& order, std::int64_t first, std::int64_t count, std::int64_t* out) {
        range(order, first, count, out);
    }
#if defined(__x86_64__)
    [[gnu::target("avx2")]] static void avx2(const Order& order, std::int64_t first, std::int64_t count,
                                             std::int64_t* out) {
        range(order, first, count, out);
    }
#endif

    static Function best() {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2")) return avx2;
#endif
        return baseline;
    }
};

void Order::fill(std::int64_t first, std::int64_t count, std::int64_t* samples) const {
    if (!shuffled_) {
        std::iota(samples, samples + count, first);
        return;
    }
    Passes::best()(*this, first, count, samples);
    for (std::int64_t i = 0; i < count; ++i) {
        auto value = static_cast<std::uint64_t>(samples[i]);
        while (value >= n_) value = Passes::one(*this, value);
        samples[i] = static_cast<std::int64_t>(value);
    }
}

}  // namespace fastvae
