#include "loader.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <functional>
#include <limits>
#include <new>
#include <ranges>
#include <stdexcept>
#include <string>
#include <utility>

#include "stage.hpp"

namespace fastvae {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr int kReaders = 2;  // of a stage: one waits for the disk while the other asks it for more
constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kHugeFrom = std::size_t{1} << 22;

std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

class BufferError : public std::bad_alloc {
public:
    explicit BufferError(std::size_t bytes)
        : what_("could not allocate a batch of " + std::to_string(bytes) + " bytes; use a smaller batch_size") {}
    const char* what() const noexcept override { return what_.c_str(); }

private:
    std::string what_;
};

std::size_t bytes_of_x(const Table& table, std::int64_t batch_size) {
    constexpr std::size_t kMost = std::size_t{1} << 48;  // more than can be addressed
    std::size_t bytes = size_of(table.form.element);
    const auto grow = [&](std::int64_t times) {
        if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(times), &bytes) || bytes > kMost) throw BufferError(kMost);
    };
    grow(batch_size);
    for (const std::int64_t size : table.item_shape()) grow(size);
    return round_up(bytes, kCacheLine);
}

}  // namespace

void BufferPool::Free::operator()(std::byte* memory) const noexcept {
    if (!lent) std::free(memory);
}

BufferPool::BufferPool(std::size_t bytes, std::size_t keep, LentMemory lent)
    : bytes_(bytes), keep_(keep), lent_(std::move(lent)), process_(getpid()) {
    const std::size_t pieces = lent_.bytes / bytes_;
    idle_.reserve(keep_ + pieces);
    for (std::size_t i = 0; i < pieces; ++i) idle_.push_back({memory_at(lent_.data + i * bytes_), {}});
}

BufferPool::Memory BufferPool::memory_at(std::byte* data) const noexcept {
    const std::less_equal<const std::byte*> before;
    return {data, Free{lent_.data != nullptr && before(lent_.data, data) && !before(lent_.data + lent_.bytes, data)}};
}

BufferPool::Memory BufferPool::allocate() const {
    const bool huge = bytes_ >= kHugeFrom;
    const std::size_t alignment = huge ? kHugePage : kCacheLine;
    const std::size_t size = round_up(bytes_, alignment);
    Memory memory(static_cast<std::byte*>(std::aligned_alloc(alignment, size)));
    if (!memory) throw BufferError(size);
#if defined(MADV_HUGEPAGE)
    // Advice only: a kernel without huge pages says no, and the buffer works as well.
    if (huge) static_cast<void>(madvise(memory.get(), size, MADV_HUGEPAGE));
#endif
    return memory;
}

std::shared_ptr<std::byte> BufferPool::take() {
    const auto writer = std::this_thread::get_id();
    Memory memory;
    {
        const std::scoped_lock lock(mutex_);
        // its own of last time, else anybody's
        auto last = std::ranges::find(idle_ | std::views::reverse, writer, &Idle::writer).base();
        if (last == idle_.begin()) last = idle_.end();
        if (last != idle_.begin()) {
            memory = std::move(std::prev(last)->memory);
            idle_.erase(std::prev(last));
        }
    }
    if (!memory) memory = allocate();
    return {memory.release(), [pool = shared_from_this(), writer](std::byte* done) {
                pool->put({pool->memory_at(done), writer});
            }};
}

void BufferPool::put(Idle idle) noexcept {
    // In a forked child the mutex may have been left locked by a thread that is gone.
    if (getpid() != process_) return;
    const std::scoped_lock lock(mutex_);
    if (idle.memory.get_deleter().lent || idle_.size() < keep_) idle_.push_back(std::move(idle));
}

struct Batches::State {
    struct Slot {
        std::optional<Batch> batch;
        std::exception_ptr error;
        bool ready = false;
    };

    State(const Table& table_, const Order& order_, std::int64_t batch_size_, std::int64_t first_batch,
          std::int64_t n_batches_, const Share& share_, int workers, std::shared_ptr<BufferPool> pool_)
        : table(table_),
          order(order_),
          batch_size(batch_size_),
          n_batches(n_batches_),
          share(share_),
          pool(std::move(pool_)),
          x_bytes(bytes_of_x(table_, batch_size_)),
          slots(static_cast<std::size_t>(2 * workers + 1)),
          stage(staged(first_batch)),
          claimed(first_batch),
          delivered(first_batch) {}

    const Table table;
    const Order order;
    const std::int64_t batch_size;
    const std::int64_t n_batches;
    const Share share;
    const std::shared_ptr<BufferPool> pool;
    const std::size_t x_bytes;

    std::mutex mutex;
    std::condition_variable room;   // the workers wait for a free slot
    std::condition_variable moved;  // `look_ahead` waits for `claimed` to reach `look_at`
    std::condition_variable ready;  // the consumer waits for a worker, where there is a stage
    std::vector<Slot> slots;        // batch k lies in slot k modulo their number
    const std::unique_ptr<Stage> stage;
    std::int64_t claimed;
    std::int64_t delivered;
    std::int64_t look_at = std::numeric_limits<std::int64_t>::max();
    bool stopping = false;
    bool closed = false;

    std::mutex consumer;  // two Python threads may share an iterator

    // Several ranks have their rows from one page cache, not each the whole file from the disk.
    std::unique_ptr<Stage> staged(std::int64_t first_batch) const {
        if (order.n_blocks() == 0 || share.ranks > 1 || first_batch >= n_batches) return nullptr;
        const auto in_flight = static_cast<std::int64_t>(slots.size()) * batch_size;
        return Stage::over(*table.rows, table.indices, order, window_of(first_batch), in_flight);
    }

    Slot& slot(std::int64_t k) { return slots[static_cast<std::size_t>(k) % slots.size()]; }

    bool finished() const { return stopping || claimed >= n_batches; }
    bool has_room() const { return claimed < delivered + static_cast<std::int64_t>(slots.size()); }

    std::int64_t claim() {
        if (claimed + 1 >= look_at) moved.notify_one();
        // a batch that is more than the slots behind the newest one has been delivered
        if (stage) stage->release(window_of(claimed + 1 - static_cast<std::int64_t>(slots.size())));
        return claimed++;
    }

    // Makes batch k with the lock released, and publishes it unless another thread was faster.
    void make(std::int64_t k, std::unique_lock<std::mutex>& lock) {
        lock.unlock();
        Slot made;
        try {
            made.batch = gather(k);
        } catch (...) {
            made.error = std::current_exception();
        }
        made.ready = true;
        lock.lock();
        if (k >= delivered) slot(k) = std::move(made);
        if (k == delivered) ready.notify_one();
    }

    void work() {
        std::unique_lock lock(mutex);
        while (true) {
            room.wait(lock, [this] { return finished() || has_room(); });
            if (finished()) return;
            make(claim(), lock);
        }
    }

    // Has the blocks of the next window read from the disk, as many as are done with of this one, and lets go of the
    // windows that are done. A batch that is more than the slots behind the newest one has been delivered.
    void look_ahead() {
        std::unique_lock lock(mutex);
        std::int64_t expected = window_of(claimed);
        std::int64_t forgotten = expected;
        while (!stopping) {
            const std::int64_t block = block_of(claimed);
            const std::int64_t window = order.window_first(block);
            const std::int64_t ahead = std::min(order.n_blocks(), block + order.window_end(block) - window);
            const std::int64_t behind = window_of(claimed - static_cast<std::int64_t>(slots.size()));
            if (expected < ahead || forgotten < behind) {
                lock.unlock();
                if (forgotten < behind) {
                    each_row_of(forgotten++, &Rows::forget);
                } else {
                    each_row_of(expected++, &Rows::expect);
                }
                lock.lock();
                continue;
            }
            look_at = block + 1 == order.n_blocks()
                          ? std::numeric_limits<std::int64_t>::max()
                          : ((block + 1) * order.block_samples() + batch_size - 1) / batch_size;
            moved.wait(lock, [this] { return stopping || claimed >= look_at; });
        }
        lock.unlock();
        while (forgotten < expected) each_row_of(forgotten++, &Rows::forget);
    }

    // The block of the first sample of batch k, or the nearest one that is read.
    std::int64_t block_of(std::int64_t k) const {
        return order.block_at(std::clamp<std::int64_t>(k * batch_size, 0, order.size() - 1));
    }

    // The first block of the window that it is in.
    std::int64_t window_of(std::int64_t k) const { return order.window_first(block_of(k)); }

    // Calls `tell` with the rows of a block, in pieces without large gaps.
    void each_row_of(std::int64_t block, void (Rows::*tell)(std::int64_t first, std::int64_t count) const) const {
        constexpr std::int64_t kGap = 8;
        for (const Span& span : order.samples_of(block)) {
            if (span.count == 0) continue;
            if (!table.indices) {
                (*table.rows.*tell)(span.first, span.count);
                continue;
            }
            const std::int64_t* const rows = table.indices + span.first;
            std::int64_t begin = 0;
            for (std::int64_t i = 1; i <= span.count; ++i) {
                if (i < span.count && rows[i] >= rows[i - 1] && rows[i] - rows[i - 1] <= kGap) continue;
                (*table.rows.*tell)(rows[begin], rows[i - 1] - rows[begin] + 1);
                begin = i;
            }
        }
    }

    Batch gather(std::int64_t k) const {
        const std::int64_t all = std::min(batch_size, order.size() - k * batch_size);
        const std::int64_t first = k * batch_size + share.begin(all);
        const std::int64_t size = share.end(all) - share.begin(all);
        std::vector<std::int64_t> places(static_cast<std::size_t>(size));
        order.fill_places(first, size, places.data());
        std::vector<std::int64_t> rows = places;
        order.replace_by_samples(rows.data(), size);
        if (table.indices) {
            for (std::int64_t& row : rows) row = table.indices[row];
        }

        Batch batch{pool->take(), nullptr, size, table.rows->bytes_of(rows.data(), size)};
        if (stage) {
            stage->wait_for(order.window_end(order.block_at(first + size - 1)));
            stage->gather(places.data(), rows.data(), size, table.form, batch.memory.get());
        } else {
            table.rows->gather(rows.data(), size, table.form, batch.memory.get());
        }
        if (table.labels) {
            batch.y = reinterpret_cast<std::int64_t*>(batch.memory.get() + x_bytes);
            for (std::size_t i = 0; i < rows.size(); ++i) batch.y[i] = table.labels[rows[i]];
        }
        return batch;
    }
};

Batches::Batches(const Table& table, const Order& order, std::int64_t batch_size,
                 std::int64_t first_batch, std::int64_t n_batches, const Share& share, int workers,
                 std::shared_ptr<BufferPool> pool, std::shared_ptr<Meter> meter)
    : process_(getpid()),
      state_(std::make_shared<State>(table, order, batch_size, first_batch, n_batches, share, workers,
                                     std::move(pool))),
      threads_(std::make_unique<std::vector<std::thread>>()),
      meter_(std::move(meter)),
      position_(std::make_shared<std::atomic<std::int64_t>>(first_batch)),
      metered_(Clock::now()) {
    threads_->reserve(static_cast<std::size_t>(workers + kReaders));
    try {
        for (int i = 0; i < workers; ++i) threads_->emplace_back([state = state_] { state->work(); });
        if (state_->stage) {
            for (int i = 0; i < kReaders; ++i) threads_->emplace_back([state = state_] { state->stage->fill(); });
        } else if (first_batch < n_batches && order.n_blocks() > 0 && table.rows->on_disk()) {
            threads_->emplace_back([state = state_] { state->look_ahead(); });
        }
    } catch (...) {
        stop();
        throw;
    }
}

Batches::~Batches() {
    if (getpid() == process_) {
        stop();
    } else {
        // A forked child has the handles but not the threads: joining would hang, detaching is undefined.
        static_cast<void>(threads_.release());
    }
}

void Batches::stop() {
    {
        const std::scoped_lock lock(state_->mutex);
        state_->stopping = true;
    }
    state_->room.notify_all();
    state_->moved.notify_all();
    if (state_->stage) state_->stage->stop();
    for (std::thread& thread : *threads_) thread.join();
    threads_->clear();
}

void Batches::close() {
    if (getpid() != process_) return;
    const std::scoped_lock alone(state_->consumer);  // another thread may be closing, or waiting for a batch
    stop();
    const std::scoped_lock lock(state_->mutex);
    state_->closed = true;
    for (State::Slot& slot : state_->slots) slot = {};
}

std::optional<Batch> Batches::next() {
    if (getpid() != process_) {
        throw std::runtime_error("this iterator belongs to process " + std::to_string(process_) +
                                 " and its threads did not survive the fork; call iter() on the loader again");
    }
    const std::scoped_lock alone(state_->consumer);
    const Clock::time_point asked = Clock::now();
    std::optional<Batch> batch = take();
    if (!batch) return batch;
    const Clock::time_point got = Clock::now();
    ++meter_->batches;
    meter_->samples += batch->size;
    meter_->bytes_read += batch->bytes_read;
    meter_->wait_nanoseconds += std::chrono::nanoseconds(got - asked).count();
    meter_->pass_nanoseconds += std::chrono::nanoseconds(got - metered_).count();
    metered_ = got;
    return batch;
}

std::optional<Batch> Batches::take() {
    State& state = *state_;
    std::unique_lock lock(state.mutex);
    if (state.closed) throw std::runtime_error("the loader of this iterator is closed, expected no more batches");
    if (state.stopping || state.delivered >= state.n_batches) return std::nullopt;
    State::Slot& slot = state.slot(state.delivered);
    while (!slot.ready) {
        // With nothing left to claim, the batch is in the hands of a worker, who may have lost its core for
        // milliseconds to a spinning thread: making the same batch again is sooner than waiting. But a stage's
        // blocks are given up once their batches are delivered: nobody may still read them then.
        if (!state.finished() && state.has_room()) {
            state.make(state.claim(), lock);
        } else if (state.stage) {
            state.ready.wait(lock, [&] { return slot.ready; });
        } else {
            state.make(state.delivered, lock);
        }
    }
    State::Slot done = std::exchange(slot, {});
    if (!done.error) position_->store(state.delivered + 1);
    ++state.delivered;
    if (done.error) {
        state.stopping = true;
        state.room.notify_all();
        std::rethrow_exception(done.error);
    }
    state.room.notify_one();
    return std::move(done.batch);
}

Loader::Loader(const Table& table, std::int64_t batch_size, bool drop_last, int workers)
    : table_(table),
      batch_size_(std::min(batch_size, std::max<std::int64_t>(table.n_samples, 1))),
      n_batches_(table.n_samples / batch_size + (!drop_last && table.n_samples % batch_size != 0)),
      workers_(workers),
      pool_(make_pool()) {}

std::size_t Loader::batch_bytes() const {
    const std::size_t labels = static_cast<std::size_t>(batch_size_) * sizeof(std::int64_t);
    return bytes_of_x(table_, batch_size_) + round_up(labels, kCacheLine);
}

std::shared_ptr<BufferPool> Loader::make_pool(LentMemory lent) const {
    // All slots, what each worker holds, and the two batches a training loop keeps alive.
    return std::make_shared<BufferPool>(batch_bytes(), static_cast<std::size_t>(3 * workers_ + 3), std::move(lent));
}

std::unique_ptr<Batches> Loader::start(const Order& order, std::uint64_t seed, std::uint64_t epoch,
                                       std::int64_t first_batch, const Share& share) {
    table_.rows->begin(order.n_blocks() > 0);
    if (pool_->process() != getpid()) pool_ = make_pool();
    const auto workers = static_cast<int>(std::min<std::int64_t>(workers_, n_batches_ - first_batch));
    Table table = table_;
    table.form.seed = seed;
    table.form.epoch = epoch;
    auto batches = std::make_unique<Batches>(table, order, batch_size_, first_batch, n_batches_, share, workers,
                                             pool_, meter_);
    position_ = batches->position();
    return batches;
}

}  // namespace fastvae
