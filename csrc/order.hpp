// The order of the samples in an epoch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastvae {

// A permutation of [0, n) by a key, computed for any position by itself: a keyed Feistel network over the
// smallest power of two from 64 on that holds n, walked along its cycle until it lands inside (Black and Rogaway 2002).
class Permutation {
public:
    Permutation() = default;
    Permutation(std::int64_t n, std::uint64_t key);

    // Replaces each of `values`, in [0, n), by what stands at that position.
    void apply(std::int64_t* values, std::int64_t count) const;

private:
    struct Passes;
    static constexpr std::size_t kRounds = 8;

    std::uint64_t n_ = 0;
    int low_bits_ = 0;
    int high_bits_ = 0;
    std::array<std::uint32_t, kRounds> keys_{};
};

// Blocks of consecutive samples, and how many of them make a window; no blocks if `samples` is 0.
struct Blocks {
    std::int64_t samples = 0;
    std::int64_t per_window = 0;
};

// Consecutive samples.
struct Span {
    std::int64_t first = 0;
    std::int64_t count = 0;
};

// The order of an epoch: a permutation of [0, n) that is a pure function of (seed, epoch), computed for any
// range of positions by itself, so that a worker can start anywhere.
//
// With blocks, one window of samples is read after another. Shuffled, the blocks are permuted, windows are made
// of them as they come, and the samples of a window are permuted. The data are cut into blocks at another place
// in each epoch, as if they were a ring, so that the same samples are not always together, or in the short
// block, which is the last of the last window.
class Order {
public:
    static Order shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch);
    static Order shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch, const Blocks& blocks);
    static Order sequential(std::int64_t n, const Blocks& blocks = {});

    std::int64_t size() const { return n_; }
    // Writes the samples at positions first, first + 1, ... first + count - 1.
    void fill(std::int64_t first, std::int64_t count, std::int64_t* samples) const;
    // The two steps of `fill`. A place is a position before the samples of its window are permuted: a block has those
    // from its first position on, in the order of `samples_of`.
    void fill_places(std::int64_t first, std::int64_t count, std::int64_t* places) const;
    void replace_by_samples(std::int64_t* places, std::int64_t count) const;

    // With blocks: how many there are, which has the sample at a position, and the first and the end of its window.
    std::int64_t n_blocks() const { return n_blocks_; }
    std::int64_t block_samples() const { return blocks_.samples; }
    std::int64_t block_at(std::int64_t position) const { return position / blocks_.samples; }
    std::int64_t most_blocks_of_a_window() const { return n_blocks_ / n_windows_ + (n_blocks_ % n_windows_ != 0); }
    std::int64_t window_first(std::int64_t block) const { return window_begin(window_of(block)); }
    std::int64_t window_end(std::int64_t block) const { return window_begin(window_of(block) + 1); }
    // The samples of a block, in two pieces where the end of the data lies within; one may be empty.
    std::array<Span, 2> samples_of(std::int64_t block) const;

private:
    Order(std::int64_t n, const Blocks& blocks);

    // Windows have `base` blocks, the first ones `base` + 1.
    std::int64_t window_begin(std::int64_t window) const;
    std::int64_t window_of(std::int64_t block) const;
    bool in_windows() const { return shuffled_ && n_windows_ >= 2; }
    void permute_blocks(std::int64_t* blocks, std::int64_t count) const;
    std::int64_t wrapped(std::int64_t sample) const { return sample < n_ ? sample : sample - n_; }

    std::int64_t n_;
    bool shuffled_ = false;
    Permutation whole_;  // of the samples, or of the blocks that are not short

    Blocks blocks_;
    std::int64_t n_blocks_ = 0;
    std::int64_t n_windows_ = 0;
    std::uint64_t window_key_ = 0;
    std::int64_t first_sample_ = 0;  // of the first block
};

}  // namespace fastvae
