#include "loader.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastvae {
namespace {

constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15;
constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kHugeFrom = std::size_t{1} << 22;

// The finalizer of splitmix64.
std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

// After the finalizer of MurmurHash3: 32 bits wide, so that a vector holds many.
[[gnu::always_inline]] inline std::uint32_t round_function(std::uint32_t half, std::uint32_t key) {
    std::uint32_t h = (half ^ key) * 0x85ebca6b;
    h = (h ^ (h >> 15)) * 0xc2b2ae35;
    return h ^ (h >> 16);
}

std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

std::size_t x_bytes(const Table& table, std::int64_t batch_size) {
    return round_up(static_cast<std::size_t>(batch_size * table.features()) * sizeof(float), kCacheLine);
}

class BufferError : public std::bad_alloc {
public:
    explicit BufferError(std::size_t bytes)
        : what_("could not allocate a batch of " + std::to_string(bytes) + " bytes; use a smaller batch_size") {}
    const char* what() const noexcept override { return what_.c_str(); }

private:
    std::string what_;
};

// x / 255, correctly rounded, without a division: 1/255 = 257/65536 + rest, an 8-bit x times 257/65536 is
// exact in float32, so the sum rounds once; it does not matter whether the compiler fuses it.
inline float widen(std::uint8_t x) {
    constexpr double head = 257.0 / 65536.0;
    constexpr double rest = 1.0 / 255.0 - head;
    const auto v = static_cast<float>(static_cast<std::int32_t>(x));
    return v * static_cast<float>(head) + v * static_cast<float>(rest);
}
inline float widen(float x) { return x; }
inline float widen(double x) { return static_cast<float>(x); }

using RowKernel = void (*)(const std::byte* row, float* out, std::int64_t pixels);

// The one source of the row kernels, inlined into a function for each instruction set.
template <typename T, int C>
[[gnu::always_inline]] inline void convert(const std::byte* row, float* __restrict out, std::int64_t pixels) {
    const T* __restrict x = reinterpret_cast<const T*>(row);
    for (std::int64_t p = 0; p < pixels; ++p) {
        for (int c = 0; c < C; ++c) out[c * pixels + p] = widen(x[p * C + c]);
    }
}

template <typename T, int C>
void convert_baseline(const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}

#if defined(__x86_64__)
template <typename T, int C>
[[gnu::target("avx2")]] void convert_avx2(const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}

template <typename T, int C>
[[gnu::target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")]] void convert_avx512(
    const std::byte* row, float* out, std::int64_t pixels) {
    convert<T, C>(row, out, pixels);
}
#endif

template <typename T, int C>
RowKernel best_kernel() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return convert_avx512<T, C>;
    }
    if (__builtin_cpu_supports("avx2")) return convert_avx2<T, C>;
#endif
    return convert_baseline<T, C>;
}

template <typename T>
RowKernel kernel_for(std::int64_t channels) {
    switch (channels) {
        case 1: return best_kernel<T, 1>();
        case 3: return best_kernel<T, 3>();
        case 4: return best_kernel<T, 4>();
        default: throw std::invalid_argument("channels must be 1, 3 or 4, got " + std::to_string(channels));
    }
}

RowKernel kernel_for(const Table& table) {
    switch (table.element) {
        case Element::uint8: return kernel_for<std::uint8_t>(table.channels);
        case Element::float32: return kernel_for<float>(table.channels);
        case Element::float64: return kernel_for<double>(table.channels);
    }
    throw std::invalid_argument("element type must be uint8, float32 or float64");
}

std::size_t row_bytes(const Table& table) {
    const auto features = static_cast<std::size_t>(table.features());
    switch (table.element) {
        case Element::uint8: return features;
        case Element::float32: return features * sizeof(float);
        case Element::float64: return features * sizeof(double);
    }
    return 0;
}

// The hardware follows a row once it has begun, but cannot guess where the next one lies.
inline void prefetch(const std::byte* row, std::size_t bytes) {
    constexpr std::size_t kEnough = 2048;
    const std::byte* const end = row + std::min(bytes, kEnough);
    for (; row < end; row += kCacheLine) __builtin_prefetch(row);
    __builtin_prefetch(end - 1);
}

}  // namespace

Order Order::sequential(std::int64_t n) { return Order(n); }

Order Order::shuffled(std::int64_t n, std::uint64_t seed, std::uint64_t epoch) {
    Order order(n);
    order.shuffled_ = n > 1;
    const int bits = n > 1 ? std::bit_width(static_cast<std::uint64_t>(n - 1)) : 0;
    order.high_bits_ = bits / 2;
    order.low_bits_ = bits - order.high_bits_;
    const std::uint64_t key = mix(mix(seed + kGolden) + epoch);
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

void BufferPool::Free::operator()(std::byte* memory) const noexcept { std::free(memory); }

BufferPool::BufferPool(std::size_t bytes, std::size_t keep) : bytes_(bytes), keep_(keep), process_(getpid()) {
    idle_.reserve(keep);
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
    Memory memory;
    {
        const std::scoped_lock lock(mutex_);
        if (!idle_.empty()) {
            memory = std::move(idle_.back());
            idle_.pop_back();
        }
    }
    if (!memory) memory = allocate();
    return {memory.release(), [pool = shared_from_this()](std::byte* done) { pool->put(Memory(done)); }};
}

void BufferPool::put(Memory memory) noexcept {
    // In a forked child the mutex may have been left locked by a thread that is gone.
    if (getpid() != process_) return;
    const std::scoped_lock lock(mutex_);
    if (idle_.size() < keep_) idle_.push_back(std::move(memory));
}

struct Batches::State {
    struct Slot {
        std::optional<Batch> batch;
        std::exception_ptr error;
        bool ready = false;
    };

    State(const Table& table_, const Order& order_, std::int64_t batch_size_, std::int64_t n_batches_, int workers,
          std::shared_ptr<BufferPool> pool_)
        : table(table_),
          order(order_),
          batch_size(batch_size_),
          n_batches(n_batches_),
          pool(std::move(pool_)),
          kernel(kernel_for(table_)),
          slots(static_cast<std::size_t>(2 * workers + 1)) {}

    const Table table;
    const Order order;
    const std::int64_t batch_size;
    const std::int64_t n_batches;
    const std::shared_ptr<BufferPool> pool;
    const RowKernel kernel;

    std::mutex mutex;
    std::condition_variable room;  // the workers wait for a free slot
    std::vector<Slot> slots;       // batch k lies in slot k modulo their number
    std::int64_t claimed = 0;
    std::int64_t delivered = 0;
    bool stopping = false;

    std::mutex consumer;  // two Python threads may share an iterator

    Slot& slot(std::int64_t k) { return slots[static_cast<std::size_t>(k) % slots.size()]; }

    bool finished() const { return stopping || claimed >= n_batches; }
    bool has_room() const { return claimed < delivered + static_cast<std::int64_t>(slots.size()); }

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
    }

    void work() {
        std::unique_lock lock(mutex);
        while (true) {
            room.wait(lock, [this] { return finished() || has_room(); });
            if (finished()) return;
            make(claimed++, lock);
        }
    }

    Batch gather(std::int64_t k) const {
        const std::int64_t first = k * batch_size;
        const std::int64_t size = std::min(batch_size, order.size() - first);
        std::vector<std::int64_t> rows(static_cast<std::size_t>(size));
        order.fill(first, size, rows.data());
        if (table.indices) {
            for (std::int64_t& row : rows) row = table.indices[row];
        }

        constexpr std::size_t kBytesAhead = 6144;
        const std::size_t bytes = row_bytes(table);
        const std::size_t ahead = std::clamp<std::size_t>(kBytesAhead / bytes + 1, 1, 16);
        const auto row = [&](std::size_t i) { return table.rows + static_cast<std::size_t>(rows[i]) * bytes; };
        for (std::size_t i = 0; i < std::min(ahead, rows.size()); ++i) prefetch(row(i), bytes);

        Batch batch{pool->take(), nullptr, nullptr, size};
        batch.x = reinterpret_cast<float*>(batch.memory.get());
        const auto features = static_cast<std::size_t>(table.features());
        for (std::size_t i = 0; i < rows.size(); ++i) {
            if (i + ahead < rows.size()) prefetch(row(i + ahead), bytes);
            kernel(row(i), batch.x + i * features, table.pixels);
        }
        if (table.labels) {
            batch.y = reinterpret_cast<std::int64_t*>(batch.memory.get() + x_bytes(table, batch_size));
            for (std::size_t i = 0; i < rows.size(); ++i) batch.y[i] = table.labels[rows[i]];
        }
        return batch;
    }
};

Batches::Batches(const Table& table, const Order& order, std::int64_t batch_size, std::int64_t n_batches, int workers,
                 std::shared_ptr<BufferPool> pool)
    : process_(getpid()),
      state_(std::make_shared<State>(table, order, batch_size, n_batches, workers, std::move(pool))),
      threads_(std::make_unique<std::vector<std::thread>>()) {
    threads_->reserve(static_cast<std::size_t>(workers));
    try {
        for (int i = 0; i < workers; ++i) threads_->emplace_back([state = state_] { state->work(); });
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
    for (std::thread& thread : *threads_) thread.join();
}

std::optional<Batch> Batches::next() {
    if (getpid() != process_) {
        throw std::runtime_error("this iterator belongs to process " + std::to_string(process_) +
                                 " and its threads did not survive the fork; call iter() on the loader again");
    }
    State& state = *state_;
    const std::scoped_lock alone(state.consumer);
    std::unique_lock lock(state.mutex);
    if (state.stopping || state.delivered >= state.n_batches) return std::nullopt;
    State::Slot& slot = state.slot(state.delivered);
    while (!slot.ready) {
        // With nothing left to claim, the batch is in the hands of a worker, who may have lost its core for
        // milliseconds to a spinning thread: making the same batch again is sooner than waiting.
        state.make(!state.finished() && state.has_room() ? state.claimed++ : state.delivered, lock);
    }
    State::Slot done = std::exchange(slot, {});
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

std::shared_ptr<BufferPool> Loader::make_pool() const {
    const std::size_t bytes =
        x_bytes(table_, batch_size_) + static_cast<std::size_t>(batch_size_) * sizeof(std::int64_t);
    // All slots, what each worker holds, and the two batches a training loop keeps alive.
    return std::make_shared<BufferPool>(bytes, static_cast<std::size_t>(3 * workers_ + 3));
}

std::unique_ptr<Batches> Loader::start(const Order& order) {
    if (pool_->process() != getpid()) pool_ = make_pool();
    const auto workers = static_cast<int>(std::min<std::int64_t>(workers_, n_batches_));
    return std::make_unique<Batches>(table_, order, batch_size_, n_batches_, workers, pool_);
}

}  // namespace fastvae
