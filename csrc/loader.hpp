// Shuffled batches of rows, gathered ahead of their consumer.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "order.hpp"
#include "rows.hpp"

namespace fastvae {

// What a loader reads. The arrays belong to the caller and must outlive the loader and its batches.
struct Table {
    std::shared_ptr<const Rows> rows;
    const std::int64_t* labels;   // [rows], or null
    const std::int64_t* indices;  // [n_samples] rows to read, each of them there, or null for all rows
    std::int64_t n_samples;
    Form form;  // of a batch; its keys are those of a pass

    std::vector<std::int64_t> item_shape() const { return form.item_shape(rows->item_shape()); }
};

// Memory of somebody else, such as what a GPU reads without a copy between; `owner` keeps it.
struct LentMemory {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    std::shared_ptr<const void> owner;
};

// Equal pieces of aligned memory, recycled: a page that was touched once is not paid for again. A piece
// returns when its last shared_ptr dies, also after the loader is gone. Lent memory is cut into pieces first.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
public:
    BufferPool(std::size_t bytes, std::size_t keep, LentMemory lent = {});

    std::shared_ptr<std::byte> take();
    pid_t process() const { return process_; }

private:
    struct Free {
        bool lent;
        void operator()(std::byte* memory) const noexcept;
    };
    using Memory = std::unique_ptr<std::byte, Free>;
    struct Idle {
        Memory memory;
        std::thread::id writer;  // in the cache of whose core it may still be
    };

    Memory allocate() const;
    Memory memory_at(std::byte* data) const noexcept;
    void put(Idle idle) noexcept;

    const std::size_t bytes_;
    const std::size_t keep_;
    const LentMemory lent_;
    const pid_t process_;
    std::mutex mutex_;
    std::vector<Idle> idle_;
};

struct Batch {
    std::shared_ptr<std::byte> memory;  // x [size, features], then y
    std::int64_t* y;                    // [size], or null
    std::int64_t size;
    std::int64_t bytes_read;
};

// What a loader has delivered in all its passes.
struct Meter {
    std::atomic<std::int64_t> batches{0};
    std::atomic<std::int64_t> samples{0};
    std::atomic<std::int64_t> bytes_read{0};
    std::atomic<std::int64_t> wait_nanoseconds{0};  // spent in `next`, which gave a batch
    std::atomic<std::int64_t> pass_nanoseconds{0};  // from the beginning of each pass to its last batch so far
};

// One of several processes that share each batch: of B rows it has those from ceil(rank B / ranks) to
// ceil((rank + 1) B / ranks), so that rank 0 is the last to have none.
struct Share {
    std::int64_t rank = 0;
    std::int64_t ranks = 1;

    std::int64_t begin(std::int64_t rows) const { return before(rank, rows); }
    std::int64_t end(std::int64_t rows) const { return before(rank + 1, rows); }

private:
    std::int64_t before(std::int64_t r, std::int64_t rows) const {
        // not r * rows / ranks, which may overflow
        return rows / ranks * r + (rows % ranks * r + ranks - 1) / ranks;
    }
};

// One pass over a rank's share of the data, from batch `first_batch` on. Batches come out in order, whoever made
// them: the workers, or the consumer itself, which never waits but makes what is not ready (with no workers,
// everything).
class Batches {
public:
    Batches(const Table& table, const Order& order, std::int64_t batch_size, std::int64_t first_batch,
            std::int64_t n_batches, const Share& share, int workers, std::shared_ptr<BufferPool> pool,
            std::shared_ptr<Meter> meter);
    ~Batches();
    Batches(const Batches&) = delete;
    Batches& operator=(const Batches&) = delete;

    // The next batch, or nothing at the end. Throws what made the batch fail, and std::runtime_error in a
    // forked child, where the workers do not exist.
    std::optional<Batch> next();
    // Ends the threads and frees the batches that are ready; `next` throws from now on.
    void close();
    // The batches of the epoch that are delivered, with those before the first one of this pass; any thread.
    std::shared_ptr<const std::atomic<std::int64_t>> position() const { return position_; }

private:
    struct State;
    using Clock = std::chrono::steady_clock;

    std::optional<Batch> take();
    void stop();

    const pid_t process_;
    // Shared with the workers, so that a forked child never destroys what its lost threads were waiting on.
    std::shared_ptr<State> state_;
    std::unique_ptr<std::vector<std::thread>> threads_;
    const std::shared_ptr<Meter> meter_;
    const std::shared_ptr<std::atomic<std::int64_t>> position_;
    Clock::time_point metered_;
};

class Loader {
public:
    Loader(const Table& table, std::int64_t batch_size, bool drop_last, int workers);

    std::int64_t n_batches() const { return n_batches_; }
    const Table& table() const { return table_; }
    // Bytes that a batch takes with its labels.
    std::size_t batch_bytes() const;
    // Has batches made in pieces of this memory, as many as it holds at a time.
    void use(LentMemory memory) { pool_ = make_pool(std::move(memory)); }
    // Frees the memory that no batch uses.
    void release() { pool_ = make_pool(); }
    const Meter& meter() const { return *meter_; }
    // Of the pass that was started last, as Batches::position; 0 before the first one.
    std::int64_t position() const { return position_ ? position_->load() : 0; }
    // The keys are those of what is random in the rows.
    std::unique_ptr<Batches> start(const Order& order, std::uint64_t seed, std::uint64_t epoch,
                                   std::int64_t first_batch, const Share& share);

private:
    std::shared_ptr<BufferPool> make_pool(LentMemory lent = {}) const;

    const Table table_;
    const std::int64_t batch_size_;
    const std::int64_t n_batches_;
    const int workers_;
    std::shared_ptr<BufferPool> pool_;
    const std::shared_ptr<Meter> meter_ = std::make_shared<Meter>();
    std::shared_ptr<const std::atomic<std::int64_t>> position_;
};

}  // namespace fastvae
