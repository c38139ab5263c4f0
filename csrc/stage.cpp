#include "stage.hpp"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

namespace fastvae {
namespace {

// Bytes to read `count` rows to, wherever in a page they begin. Between chosen ones may be others, which are read too
// where they fit.
std::size_t bytes_for(std::int64_t count, const Rows& rows, const std::int64_t* indices) {
    const std::size_t bytes = static_cast<std::size_t>(count) * rows.layout().bytes() * (indices ? 2 : 1);
    return (bytes + page_size() - 1) / page_size() * page_size() + page_size();
}

}  // namespace

std::unique_ptr<Stage> Stage::over(const Rows& rows, const std::int64_t* indices, const Order& order,
                                   std::int64_t first_block, std::int64_t in_flight) {
    if (rows.room() == 0) return nullptr;
    const std::int64_t slots = 2 * order.most_blocks_of_a_window() + in_flight / order.block_samples() + 2;
    const std::size_t slot_bytes = bytes_for(order.block_samples(), rows, indices) + 2 * page_size();  // in two pieces
    if (rows.room() / slot_bytes < static_cast<std::size_t>(slots)) return nullptr;
    try {
        return std::unique_ptr<Stage>(new Stage(rows, indices, order, first_block, slots, slot_bytes));
    } catch (const std::bad_alloc&) {  // by a limit that was not known of
        return nullptr;
    }
}

Stage::Stage(const Rows& rows, const std::int64_t* indices, const Order& order, std::int64_t first_block,
             std::int64_t slots, std::size_t slot_bytes)
    : rows_(rows),
      indices_(indices),
      order_(order),
      slots_(slots),
      slot_bytes_(slot_bytes),
      memory_(static_cast<std::size_t>(slots) * slot_bytes),
      addresses_(static_cast<std::size_t>(slots * order.block_samples())),
      blocks_(static_cast<std::size_t>(slots), -1),
      is_read_(static_cast<std::size_t>(slots)),
      begun_(first_block),
      end_(first_block),
      needed_(first_block) {}

Stage::~Stage() {
    for (const std::int64_t block : blocks_) forget(block);
}

void Stage::fill() {
    std::unique_lock lock(mutex_);
    while (true) {
        released_.wait(lock, [this] { return stopping_ || failed_ != kNever || begun_ < needed_ + slots_; });
        if (stopping_ || failed_ != kNever || begun_ == order_.n_blocks()) return;
        const std::int64_t block = begun_++;
        is_read_[slot(block)] = false;
        lock.unlock();
        std::exception_ptr error;
        try {
            read(block);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        if (!error) {
            is_read_[slot(block)] = true;
            while (end_ < begun_ && is_read_[slot(end_)]) ++end_;
        } else if (block < failed_) {
            failed_ = block;
            error_ = error;
        }
        if (end_ >= awaited_ || end_ == failed_) {
            awaited_ = kNever;
            arrived_.notify_all();
        }
    }
}

void Stage::stop() {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
    released_.notify_all();
    arrived_.notify_all();
}

void Stage::wait_for(std::int64_t block) {
    std::unique_lock lock(mutex_);
    while (end_ < block) {
        if (end_ == failed_) std::rethrow_exception(error_);
        if (stopping_) throw std::runtime_error("the pass has ended");
        awaited_ = std::min(awaited_, block);
        arrived_.wait(lock);
    }
}

void Stage::release(std::int64_t block) {
    const std::scoped_lock lock(mutex_);
    if (block <= needed_) return;
    needed_ = block;
    released_.notify_all();
}

void Stage::forget(std::int64_t block) const {
    if (block < 0) return;
    for (const Span& span : order_.samples_of(block)) {
        if (span.count == 0) continue;
        const std::int64_t first = row(span.first);
        rows_.forget(first, row(span.first + span.count - 1) - first + 1);
    }
}

void Stage::read(std::int64_t block) {
    forget(std::exchange(blocks_[slot(block)], block));
    auto* memory = static_cast<std::byte*>(memory_.data()) + slot(block) * slot_bytes_;
    const std::byte** addresses = addresses_.data() + address_of(block * order_.block_samples());
    std::vector<std::int64_t> rows;
    for (const Span& span : order_.samples_of(block)) {
        if (span.count == 0) continue;
        rows.resize(static_cast<std::size_t>(span.count));
        for (std::int64_t i = 0; i < span.count; ++i) {
            rows[static_cast<std::size_t>(i)] = row(span.first + i);
        }
        const std::size_t bytes = bytes_for(span.count, rows_, indices_);
        rows_.read(rows.data(), span.count, memory, bytes, addresses);
        memory += bytes;
        addresses += span.count;
    }
}

void Stage::gather(const std::int64_t* places, const std::int64_t* rows, std::int64_t n, const Form& form,
                   std::byte* out) const {
    std::vector<const std::byte*> addresses(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) addresses[static_cast<std::size_t>(i)] = addresses_[address_of(places[i])];
    rows_.gather_read(rows, addresses.data(), n, form, out);
}

}  // namespace fastvae
