// Memory for large outputs, lent out and kept for the next of its size. The first touch of fresh memory costs
// more than all the arithmetic on it, and on small pages every later touch costs more too.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>

namespace fastvae {

std::size_t page_size();

// Memory that begins at a huge page and, where the system has them, lies on huge pages.
class Memory {
public:
    explicit Memory(std::size_t bytes);

    void* data() const { return data_.get(); }
    std::size_t size() const { return size_; }

private:
    struct Free {
        void operator()(void* data) const;
    };
    std::size_t size_;
    std::unique_ptr<void, Free> data_;
};

// Keeps at most one piece of memory that is not in use.
class MemoryPool {
public:
    // At least `bytes`: the kept memory if it is of about this size, else new memory.
    std::unique_ptr<Memory> take(std::size_t bytes);
    void give(std::unique_ptr<Memory> memory);

private:
    std::mutex mutex_;
    std::unique_ptr<Memory> kept_;
};

// Memory on loan from a pool, to which it returns.
class Buffer {
public:
    Buffer(std::shared_ptr<MemoryPool> pool, std::size_t bytes);
    ~Buffer() { pool_->give(std::move(memory_)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return memory_->data(); }

private:
    std::shared_ptr<MemoryPool> pool_;
    std::unique_ptr<Memory> memory_;
};

}  // namespace fastvae
