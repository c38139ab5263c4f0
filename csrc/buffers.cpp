#include "buffers.hpp"

#include <unistd.h>

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastvae {

namespace {
constexpr std::size_t huge_page = 2u << 20;
}

std::size_t page_size() {
    static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return size;
}

Memory::Memory(std::size_t bytes)
    : size_((bytes + huge_page - 1) / huge_page * huge_page), data_(std::aligned_alloc(huge_page, size_)) {
    if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    // advice only: where it is refused, the pages are small
    madvise(data(), size_, MADV_HUGEPAGE);
#endif
}

void Memory::Free::operator()(void* data) const { std::free(data); }

std::unique_ptr<Memory> MemoryPool::take(std::size_t bytes) {
    std::unique_ptr<Memory> kept;
    {
        const std::lock_guard lock(mutex_);
        kept = std::move(kept_);
    }
    if (kept && kept->size() >= bytes && kept->size() / 2 <= bytes) return kept;
    kept.reset();  // before there is new memory beside it
    return std::make_unique<Memory>(bytes);
}

void MemoryPool::give(std::unique_ptr<Memory> memory) {
    const std::lock_guard lock(mutex_);
    std::swap(kept_, memory);
}

Buffer::Buffer(std::shared_ptr<MemoryPool> pool, std::size_t bytes)
    : pool_(std::move(pool)), memory_(pool_->take(bytes)) {}

}  // namespace fastvae
