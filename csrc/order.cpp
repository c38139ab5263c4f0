#include "order.hpp"

#include <algorithm>
#include <bit>
#include <numeric>

#include "mix.hpp"

namespace fastvae {
namespace {

// What an epoch's key is used for; any numbers that differ.
constexpr std::uint64_t kBlocks = 1;
constexpr std::uint64_t kWindows = 2;
constexpr std::uint64_t kStart = 3;

constexpr std::size_t kTogether = 256;
// Of three bits, half of which are one, eight rounds make some orders three times as often as others.
constexpr int kLeastBits = 6;

// After the finalizer of MurmurHash3: 32 bits wide, so that a vector holds many.
[[gnu::always_inline]] inline std::uint32_t round_function(std::uint32_t half, std::uint32_t key) {
    std::uint32_t h = (half ^ key) * 0x85ebca6b;
    h = (h ^ (h >> 15)) * 0xc2b2ae35;
    return h ^ (h >> 16);
}

}  // namespace

Permutation::Permutation(std::int64_t n, std::uint64_t key) : n_(static_cast<std::uint64_t>(n)) {
    const int bits = n > 1 ? std::max<int>(kLeastBits, std::bit_width(n_ - 1)) : 0;
    high_bits_ = bits / 2;
    low_bits_ = bits - high_bits_;
    for (std::size_t r = 0; r < kRounds; ++r) {
        keys_[r] = static_cast<std::uint32_t>(mix(key + (r + 1) * kGolden) >> 32);
    }
}

// One pass of the network over some values, in one source for every instruction set.
struct Permutation::Passes {
    using Function = void (*)(const Permutation& permutation, std::int64_t* values, std::int64_t count);

    [[gnu::always_inline]] static inline std::uint64_t one(const Permutation& permutation, std::uint64_t value) {
        const auto low_mask = static_cast<std::uint32_t>((std::uint64_t{1} << permutation.low_bits_) - 1);
        const auto high_mask = static_cast<std::uint32_t>((std::uint64_t{1} << permutation.high_bits_) - 1);
        std::uint32_t low = static_cast<std::uint32_t>(value) & low_mask;
        auto high = static_cast<std::uint32_t>(value >> permutation.low_bits_);
        for (std::size_t r = 0; r < kRounds; r += 2) {
            low ^= round_function(high, permutation.keys_[r]) & low_mask;
            high ^= round_function(low, permutation.keys_[r + 1]) & high_mask;
        }
        return (std::uint64_t{high} << permutation.low_bits_) | low;
    }

    [[gnu::always_inline]] static inline void all(const Permutation& shared, std::int64_t* values,
                                                  std::int64_t count) {
        const Permutation permutation = shared;
        for (std::int64_t i = 0; i < count; ++i) {
            values[i] = static_cast<std::int64_t>(one(permutation, static_cast<std::uint64_t>(values[i])));
        }
    }

    static void baseline(const Permutation& permutation, std::int64_t* values, std::int64_t count) {
        all(permutation, values, count);
    }
#if defined(__x86_64__)
    [[gnu::target("avx2")]] static void avx2(const Permutation& permutation, std::int64_t* values,
                                             std::int64_t count) {
        all(permutation, values, count);
    }
#endif

    static Function best() {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx2")) return avx2;
#endif
        return baseline;
    }
};

void Permutation::apply(std::int64_t* values, std::int64_t count) const {
    if (n_ < 2) return;
    Passes::best()(*this, values, count);
    for (std::int64_t i = 0; i < count; ++i) {
        auto value = static_cast<std::uint64_t>(values[i]);
        while (value >= n_) value = Passes::one(*this, value);
        values[i] = static_cast<std::int64_t>(value);
    }
}

Order::Order(std::int64_t n, const Blocks& blocks) : n_(n), blocks_(blocks) {
    if (blocks_.samples == 0) return;
    n_blocks_ = n / blocks_.samples + (n % blocks_.samples != 0);
    n_windows_ = std::max<std::int64_t>(1, n_blocks_ / blocks_.per_window + (n_blocks_ % blocks_.per_window != 0));
}

Order Order::sequential(std::int64_t n, const Blocks& blocks) { return {n, blocks}; }

Order Order::shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch) {
    Order order(n, {});
    order.shuffled_ = true;
    order.whole_ = Permutation(n, epoch_key(seed, epoch));
    return order;
}

Order Order::shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch, const Blocks& blocks) {
    Order order(n, blocks);
    if (order.n_windows_ < 2) return shuffled(n, seed, epoch);
    const std::uint64_t key = epoch_key(seed, epoch);
    order.shuffled_ = true;
    order.whole_ = Permutation(n / blocks.samples, mix(key ^ kBlocks));
    order.window_key_ = mix(key ^ kWindows);
    order.first_sample_ = static_cast<std::int64_t>(mix(key ^ kStart) % static_cast<std::uint64_t>(n));
    return order;
}

std::int64_t Order::window_begin(std::int64_t window) const {
    return window * (n_blocks_ / n_windows_) + std::min(window, n_blocks_ % n_windows_);
}

std::int64_t Order::window_of(std::int64_t block) const {
    const std::int64_t base = n_blocks_ / n_windows_;
    const std::int64_t longer = n_blocks_ % n_windows_;
    const std::int64_t end = longer * (base + 1);
    return block < end ? block / (base + 1) : longer + (block - end) / base;
}

std::array<Span, 2> Order::samples_of(std::int64_t block) const {
    std::int64_t place = block;
    if (shuffled_) permute_blocks(&place, 1);
    const std::int64_t count = std::min(blocks_.samples, n_ - block * blocks_.samples);
    const std::int64_t first = wrapped(place * blocks_.samples + first_sample_);
    const std::int64_t before_end = std::min(count, n_ - first);
    return {Span{first, before_end}, Span{0, count - before_end}};
}

void Order::fill(std::int64_t first, std::int64_t count, std::int64_t* samples) const {
    fill_places(first, count, samples);
    replace_by_samples(samples, count);
}

void Order::fill_places(std::int64_t first, std::int64_t count, std::int64_t* places) const {
    std::iota(places, places + count, first);
    if (!in_windows()) return;
    while (count > 0) {
        const std::int64_t window = window_of(block_at(first));
        const std::int64_t begin = window_begin(window) * blocks_.samples;
        const std::int64_t end = std::min(n_, window_begin(window + 1) * blocks_.samples);
        const std::int64_t here = std::min(count, end - first);
        for (std::int64_t i = 0; i < here; ++i) places[i] -= begin;
        Permutation(end - begin, window_key_ + static_cast<std::uint64_t>(window) * kGolden).apply(places, here);
        for (std::int64_t i = 0; i < here; ++i) places[i] += begin;
        first += here;
        places += here;
        count -= here;
    }
}

void Order::replace_by_samples(std::int64_t* places, std::int64_t count) const {
    if (!in_windows()) {
        if (shuffled_) whole_.apply(places, count);
        return;
    }
    std::array<std::int64_t, kTogether> blocks{};
    for (std::int64_t done = 0; done < count;) {
        const std::int64_t some = std::min(count - done, static_cast<std::int64_t>(blocks.size()));
        std::int64_t* const here = places + done;
        for (std::int64_t i = 0; i < some; ++i) blocks[i] = block_at(here[i]);
        for (std::int64_t i = 0; i < some; ++i) here[i] -= blocks[i] * blocks_.samples;
        permute_blocks(blocks.data(), some);
        for (std::int64_t i = 0; i < some; ++i) {
            here[i] = wrapped(here[i] + blocks[i] * blocks_.samples + first_sample_);
        }
        done += some;
    }
}

// Replaces blocks by those that stand at their places, at most kTogether. The short block, the last one, stays.
void Order::permute_blocks(std::int64_t* blocks, std::int64_t count) const {
    const std::int64_t whole = n_ / blocks_.samples;
    std::array<std::int64_t, kTogether> moved{};
    for (std::int64_t i = 0; i < count; ++i) moved[i] = std::min(blocks[i], whole - 1);
    whole_.apply(moved.data(), count);
    for (std::int64_t i = 0; i < count; ++i) blocks[i] = blocks[i] < whole ? moved[i] : blocks[i];
}

}  // namespace fastvae
