// The shuffled order of an epoch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastvae {

// The order of an epoch: a permutation of [0, n) that is a pure function of (seed, epoch), computed for any
// range of positions by itself, so that a worker can start anywhere. A keyed Feistel network over the smallest
// power of two that holds n, walked along its cycle until it lands inside (Black and Rogaway 2002).
class Order {
public:
    static Order shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch);
    static Order sequential(std::int64_t n);

    std::int64_t size() const { return static_cast<std::int64_t>(n_); }
    // Writes the samples at positions first, first + 1, ... first + count - 1.
    void fill(std::int64_t first, std::int64_t count, std::int64_t* samples) const;

private:
    struct Passes;
    static constexpr std::size_t kRounds = 8;

    explicit Order(std::int64_t n) : n_(static_cast<std::uint64_t>(n)) {}

    std::uint64_t n_;
    bool shuffled_ = false;
    int low_bits_ = 0;
    int high_bits_ = 0;
    std::array<std::uint32_t, kRounds> keys_{};
};

}  // namespace fastvae
