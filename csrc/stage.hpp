// Blocks of an order, read from a file into memory of their own before batches are made of their rows.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "buffers.hpp"
#include "order.hpp"
#include "rows.hpp"

namespace fastvae {

// A ring of slots, in which block b is in slot b modulo their number, until block b + slots is read.
class Stage {
public:
    // Null where rows are gathered as they lie, or have no room for what is needed: two windows, one to make batches
    // of and one to read meanwhile, and the blocks of `in_flight` positions. indices: see Table; ascending.
    static std::unique_ptr<Stage> over(const Rows& rows, const std::int64_t* indices, const Order& order,
                                       std::int64_t first_block, std::int64_t in_flight);
    ~Stage();

    // Reads blocks, from the first one to the last, as slots become free: what one or more threads do until `stop`.
    void fill();
    void stop();
    // Returns when all blocks before this one are read; throws where they cannot be, or it was stopped.
    void wait_for(std::int64_t block);
    // Blocks before this one are not gathered of any more.
    void release(std::int64_t block);
    // places: of the rows in the order, in blocks that are read.
    void gather(const std::int64_t* places, const std::int64_t* rows, std::int64_t n, const Form& form,
                std::byte* out) const;

private:
    static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

    Stage(const Rows& rows, const std::int64_t* indices, const Order& order, std::int64_t first_block,
          std::int64_t slots, std::size_t slot_bytes);

    void read(std::int64_t block);
    std::int64_t row(std::int64_t sample) const { return indices_ ? indices_[sample] : sample; }
    // Lets go of what was left in the file.
    void forget(std::int64_t block) const;
    std::size_t slot(std::int64_t block) const { return static_cast<std::size_t>(block % slots_); }
    std::size_t address_of(std::int64_t place) const {
        return static_cast<std::size_t>(place % (slots_ * order_.block_samples()));
    }

    const Rows& rows_;
    const std::int64_t* const indices_;
    const Order order_;
    const std::int64_t slots_;
    const std::size_t slot_bytes_;
    const Memory memory_;
    std::vector<const std::byte*> addresses_;  // [slots, samples of a block]
    std::vector<std::int64_t> blocks_;         // of the slots, or -1

    std::mutex mutex_;
    std::condition_variable released_;  // `fill` waits for slots
    std::condition_variable arrived_;   // `wait_for` waits
    std::vector<bool> is_read_;         // of the slots
    std::int64_t begun_;                // blocks before this one are read, or being read
    std::int64_t end_;                  // blocks before this one are read
    std::int64_t needed_;               // blocks from this one on are gathered of
    std::int64_t awaited_ = kNever;     // the first that is waited for, to have all before it
    std::int64_t failed_ = kNever;
    std::exception_ptr error_;  // of block `failed_`
    bool stopping_ = false;
};

}  // namespace fastvae
