#pragma once

#include <cstdint>

namespace fastvae {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15;

// The finalizer of splitmix64.
constexpr std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// The key of what is random in an epoch.
constexpr std::uint64_t epoch_key(std::uint64_t seed, std::uint64_t epoch) {
    return mix(mix(seed + kGolden) + epoch);
}

}  // namespace fastvae
