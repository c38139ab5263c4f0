// The loader's threads under ThreadSanitizer, which cannot follow them in a Python that is not built for it, and its
// memory under AddressSanitizer: whole passes, passes that are left early, failures, and several readers at once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "buffers.hpp"
#include "loader.hpp"
#include "sparse.hpp"

using namespace fastvae;

namespace {

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition)) {                                                          \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
            std::abort();                                                            \
        }                                                                            \
    } while (false)

template <typename Action>
bool throws(Action action) {
    try {
        action();
    } catch (const std::exception&) {
        return true;
    }
    return false;
}

constexpr std::int64_t kRows = 203, kFeatures = 17, kBatch = 8;

// Row r is r in all its features.
struct Numbered {
    Numbered() : values(static_cast<std::size_t>(kRows * kFeatures)), labels(static_cast<std::size_t>(kRows)) {
        for (std::int64_t i = 0; i < kRows * kFeatures; ++i) {
            values[static_cast<std::size_t>(i)] = static_cast<float>(i / kFeatures);
        }
        for (std::int64_t i = 0; i < kRows; ++i) labels[static_cast<std::size_t>(i)] = i;
    }

    Table table() const {
        const auto* data = reinterpret_cast<const std::byte*>(values.data());
        auto rows = std::make_shared<DenseRows>(data, RowLayout{Element::float32, kFeatures, 1}, kRows,
                                                std::vector<std::int64_t>{kFeatures});
        return {std::move(rows), labels.data(), nullptr, kRows, Form{}};
    }

    std::vector<float> values;
    std::vector<std::int64_t> labels;
};

// Fails at one row, as a file may.
class Failing final : public Rows {
public:
    explicit Failing(std::int64_t at) : Rows(kRows, {kFeatures}), at_(at) {}
    void gather(const std::int64_t* rows, std::int64_t n, const Form&, std::byte* out) const override {
        if (std::find(rows, rows + n, at_) != rows + n) throw std::runtime_error("row " + std::to_string(at_));
        std::memset(out, 0, static_cast<std::size_t>(n * kFeatures) * sizeof(float));
    }
    RowLayout layout() const override { return {Element::float32, kFeatures, 1}; }

private:
    const std::int64_t at_;
};

// Reads blocks elsewhere first, and fails at one row, if any.
class Staged final : public Rows {
public:
    explicit Staged(const Table& table, std::int64_t at = -1) : Rows(kRows, {kFeatures}), rows_(table.rows), at_(at) {}
    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override {
        CHECK(!may_read_);
        rows_->gather(rows, n, form, out);
    }
    RowLayout layout() const override { return rows_->layout(); }
    void begin(bool tells) const override { may_read_ = tells; }
    bool on_disk() const override { return true; }
    std::size_t room() const override { return std::size_t{1} << 24; }
    void read(const std::int64_t* rows, std::int64_t n, std::byte* memory, std::size_t bytes,
              const std::byte** addresses) const override {
        if (std::find(rows, rows + n, at_) != rows + n) throw std::runtime_error("row " + std::to_string(at_));
        CHECK(static_cast<std::size_t>(n) * layout().bytes() + page_size() <= bytes);
        std::memset(memory, 255, bytes);
        rows_->gather(rows, n, Form{}, memory);
        for (std::int64_t i = 0; i < n; ++i) addresses[i] = memory + static_cast<std::size_t>(i) * layout().bytes();
    }
    void gather_read(const std::int64_t* rows, const std::byte* const* addresses, std::int64_t n, const Form& form,
                     std::byte* out) const override {
        const RowWriter writer(layout(), form);
        for (std::int64_t i = 0; i < n; ++i) {
            writer(addresses[i], rows[i], out + static_cast<std::size_t>(i) * writer.bytes());
        }
    }

private:
    const std::shared_ptr<const Rows> rows_;
    const std::int64_t at_;
    mutable bool may_read_ = false;
};

std::unique_ptr<Batches> begin(Loader& loader, std::uint64_t epoch, std::int64_t first = 0, Share share = {}) {
    return loader.start(Order::shuffled(loader.table().n_samples, 7, epoch), 7, epoch, first, share);
}

void check_batch(const Batch& batch) {
    const auto* x = reinterpret_cast<const float*>(batch.memory.get());
    for (std::int64_t i = 0; i < batch.size; ++i) {
        for (std::int64_t f = 0; f < kFeatures; ++f) CHECK(x[i * kFeatures + f] == static_cast<float>(batch.y[i]));
    }
}

void whole_passes() {
    const Numbered data;
    for (int workers = 0; workers <= 4; ++workers) {
        Loader loader(data.table(), kBatch, false, workers);
        for (std::uint64_t epoch = 0; epoch < 4; ++epoch) {
            std::vector<std::int64_t> seen;
            const auto batches = begin(loader, epoch);
            while (const auto batch = batches->next()) {
                check_batch(*batch);
                std::memset(batch->memory.get(), 255, sizeof(float));  // it is the reader's own
                seen.insert(seen.end(), batch->y, batch->y + batch->size);
            }
            CHECK(!batches->next());
            std::vector<std::int64_t> expected(static_cast<std::size_t>(kRows));
            Order::shuffled(kRows, 7, epoch).fill(0, kRows, expected.data());
            CHECK(seen == expected);
        }
        CHECK(loader.meter().samples == 4 * kRows);
    }
}

void passes_that_are_left() {
    const Numbered data;
    Loader loader(data.table(), kBatch, true, 3);
    std::vector<Batch> kept;
    for (int round = 0; round < 200; ++round) {
        const auto batches = begin(loader, static_cast<std::uint64_t>(round), round % (loader.n_batches() + 1));
        for (int k = 0; k < round % 5; ++k) {
            if (auto batch = batches->next()) kept.push_back(std::move(*batch));
        }
        if (round % 3 == 0) {
            batches->close();
            CHECK(throws([&] { batches->next(); }));
        }
        if (kept.size() > 20) kept.clear();
    }
    for (const Batch& batch : kept) check_batch(batch);
}

void batches_that_outlive_their_loader() {
    const Numbered data;
    std::vector<Batch> kept;
    {
        Loader loader(data.table(), kBatch, false, 2);
        const auto batches = begin(loader, 0);
        for (int k = 0; k < 9; ++k) kept.push_back(*batches->next());
    }
    for (const Batch& batch : kept) check_batch(batch);
}

void lent_memory() {
    const Numbered data;
    const auto lend = [](Loader& loader, std::size_t pieces) {
        // what is lent has an owner, whose end the sanitizer sees
        const std::size_t bytes = pieces * loader.batch_bytes();
        const std::shared_ptr<std::byte> memory(static_cast<std::byte*>(std::aligned_alloc(64, bytes)), std::free);
        loader.use({memory.get(), bytes, memory});
        return memory.get();
    };
    std::vector<Batch> kept;
    for (int workers = 0; workers <= 3; ++workers) {
        Loader loader(data.table(), kBatch, false, workers);
        for (std::uint64_t epoch = 0; epoch < 4; ++epoch) {
            const std::byte* const memory = lend(loader, 4);
            std::size_t inside = 0;
            const auto batches = begin(loader, epoch);
            while (auto batch = batches->next()) {
                check_batch(*batch);
                inside += batch->memory.get() >= memory && batch->memory.get() < memory + 4 * loader.batch_bytes();
                if (kept.size() < 20) kept.push_back(std::move(*batch));  // from many pieces of memory
            }
            CHECK(inside > 0);
        }
        loader.release();
    }
    for (const Batch& batch : kept) check_batch(batch);
}

void failures() {
    for (int workers = 0; workers <= 3; ++workers) {
        for (std::int64_t at = 0; at < kRows; at += 29) {
            Loader loader({std::make_shared<Failing>(at), nullptr, nullptr, kRows, Form{}}, kBatch, false, workers);
            const auto batches = begin(loader, 1);
            CHECK(throws([&] { while (batches->next()) continue; }));
            CHECK(!batches->next());
        }
    }
}

void several_readers() {
    const Numbered data;
    Loader loader(data.table(), kBatch, false, 2);
    for (std::uint64_t epoch = 0; epoch < 20; ++epoch) {
        const auto shared = begin(loader, epoch);
        const auto position = shared->position();
        std::atomic<std::int64_t> samples{0};
        const auto read = [&] {
            while (const auto batch = shared->next()) {
                check_batch(*batch);
                samples += batch->size;
            }
        };
        // a pass of its own, of the same loader, beside the shared one
        const auto own = begin(loader, epoch + 1, 0, Share{1, 3});
        std::thread other(read), third([&] {
            while (const auto batch = own->next()) check_batch(*batch);
        });
        for (int i = 0; i < 100; ++i) CHECK(position->load() <= loader.n_batches() && loader.meter().batches >= 0);
        read();
        other.join();
        third.join();
        CHECK(samples == kRows);
    }
}

void closed_by_another() {
    const Numbered data;
    Loader loader(data.table(), kBatch, false, 2);
    for (std::uint64_t epoch = 0; epoch < 50; ++epoch) {
        const auto batches = begin(loader, epoch);
        std::thread reader([&] {
            try {
                while (const auto batch = batches->next()) check_batch(*batch);
            } catch (const std::runtime_error&) {
            }
        });
        std::thread closer([&] { batches->close(); });
        batches->close();
        closer.join();
        reader.join();
        CHECK(throws([&] { batches->next(); }));
    }
}

void staged_passes() {
    const Numbered data;
    std::vector<std::int64_t> most;
    for (std::int64_t i = 0; i < kRows; i += 1 + i % 3) most.push_back(i);
    const auto n_most = static_cast<std::int64_t>(most.size());
    for (const Blocks blocks : {Blocks{10, 4}, Blocks{1, 1}, Blocks{3, 20}, Blocks{150, 1}}) {
        for (int workers = 0; workers <= 3; ++workers) {
            for (const bool some : {false, true}) {
                Table table = data.table();
                table.rows = std::make_shared<Staged>(table);
                if (some) table.indices = most.data();
                table.n_samples = some ? n_most : kRows;
                Loader loader(table, kBatch, false, workers);
                for (std::uint64_t epoch = 0; epoch < 6; ++epoch) {
                    const Order order = epoch % 2 ? Order::shuffled(table.n_samples, 7, epoch, blocks)
                                                  : Order::sequential(table.n_samples, blocks);
                    const auto first = static_cast<std::int64_t>(epoch) % loader.n_batches();
                    std::vector<std::int64_t> seen, expected(static_cast<std::size_t>(table.n_samples - first * kBatch));
                    order.fill(first * kBatch, table.n_samples - first * kBatch, expected.data());
                    const auto batches = loader.start(order, 7, epoch, first, {});
                    while (const auto batch = batches->next()) {
                        check_batch(*batch);
                        seen.insert(seen.end(), batch->y, batch->y + batch->size);
                        if (epoch == 4 && seen.size() > 50) break;
                    }
                    if (some) for (auto& row : expected) row = most[static_cast<std::size_t>(row)];
                    if (epoch == 4) expected.resize(seen.size());
                    CHECK(seen == expected);
                }
            }
        }
    }
}

void staged_failures() {
    const Numbered data;
    for (int workers = 0; workers <= 3; ++workers) {
        for (std::int64_t at = 0; at < kRows; at += 29) {
            Table table = data.table();
            table.rows = std::make_shared<Staged>(table, at);
            Loader loader(table, kBatch, false, workers);
            const Blocks blocks{6, 3};
            const auto batches = loader.start(Order::sequential(kRows, blocks), 7, 0, 0, {});
            std::int64_t samples = 0;
            CHECK(throws([&] { while (const auto batch = batches->next()) samples += batch->size; }));
            // those of the windows before, but for a batch that is in two
            CHECK(samples == at / 18 * 18 / kBatch * kBatch);
            CHECK(!batches->next());
        }
    }
}

template <typename T, typename I>
Csr csr_of(const std::vector<T>& values, const std::vector<I>& columns, const std::vector<I>& starts, Number number,
           std::int64_t n_columns) {
    return {reinterpret_cast<const std::byte*>(values.data()),
            number,
            reinterpret_cast<const std::byte*>(columns.data()),
            reinterpret_cast<const std::byte*>(starts.data()),
            sizeof(I) == 8,
            static_cast<std::int64_t>(values.size()),
            static_cast<std::int64_t>(starts.size()) - 1,
            n_columns};
}

void sparse_rows() {
    const std::vector<float> values{1, 2, 3};
    std::vector<std::int32_t> columns{0, 4, 2}, starts{0, 2, 2, 3};
    const auto made = [&] { return std::make_shared<SparseRows>(csr_of(values, columns, starts, Number::float32, 5)); };
    const auto plain = made();
    for (int workers = 0; workers <= 2; ++workers) {
        Loader loader({std::make_shared<SparseRows>(*plain, 6.0, true), nullptr, nullptr, 3, Form{}}, 2, false, workers);
        const auto batches = begin(loader, 0);
        std::int64_t samples = 0;
        while (const auto batch = batches->next()) samples += batch->size;
        CHECK(samples == 3);
    }
    for (const std::int32_t bad : {-1, 5, std::numeric_limits<std::int32_t>::max()}) {
        columns[1] = bad;
        CHECK(throws(made));
        std::vector<float> row(5);
        const std::int64_t number = 0;
        CHECK(throws([&] { plain->gather(&number, 1, Form{}, reinterpret_cast<std::byte*>(row.data())); }));
        columns[1] = 4;
        starts[2] = bad;
        CHECK(throws(made));
        starts[2] = 2;
    }
    columns[1] = 0;
    CHECK(throws(made));
    const std::vector<std::int64_t> wide_columns{0, std::numeric_limits<std::int64_t>::max(), 2}, wide{0, 2, 2, 3};
    CHECK(throws([&] { SparseRows(csr_of(values, wide_columns, wide, Number::float32, 5)); }));
}

}  // namespace

int main() {
    whole_passes();
    passes_that_are_left();
    batches_that_outlive_their_loader();
    lent_memory();
    failures();
    several_readers();
    closed_by_another();
    staged_passes();
    staged_failures();
    sparse_rows();
    std::puts("ok");
}
