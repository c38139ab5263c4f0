#include "guard.hpp"

#include <csetjmp>
#include <csignal>

#include <atomic>
#include <mutex>

namespace fastvae {
namespace {

struct Guard {
    const std::byte* begin;
    const std::byte* end;
    const std::byte* volatile lost;
    sigjmp_buf back;
};

// initial-exec: a signal handler may not be the one to allocate it
[[gnu::tls_model("initial-exec")]] thread_local Guard* volatile current = nullptr;
[[gnu::tls_model("initial-exec")]] thread_local volatile bool handing_on = false;

struct sigaction previous {};

void on_sigbus(int number, siginfo_t* info, void* context) {
    Guard* const guard = current;
    const auto* const address = static_cast<const std::byte*>(info->si_addr);
    if (guard != nullptr && address >= guard->begin && address < guard->end) {
        guard->lost = address;
        siglongjmp(guard->back, 1);
    }
    // Others may have put their handler over ours and ours over theirs: once around, and it is nobody's.
    if (handing_on || (!(previous.sa_flags & SA_SIGINFO) && previous.sa_handler == SIG_IGN) ||
        (!(previous.sa_flags & SA_SIGINFO) && previous.sa_handler == SIG_DFL)) {
        std::signal(number, SIG_DFL);  // the instruction is repeated when this returns
        return;
    }
    handing_on = true;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else {
        previous.sa_handler(number);
    }
    handing_on = false;
}

// A frame of its own: what is kept in registers is unknown after the jump.
[[gnu::noinline]] void read_within(Guard& guard, void (*read)(void*), void* argument) {
    if (sigsetjmp(guard.back, 1) == 0) {  // with its signal mask: a sanitizer blocks all signals in a handler
        current = &guard;
        std::atomic_signal_fence(std::memory_order_seq_cst);
        read(argument);
        std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    current = nullptr;
}

}  // namespace

void take_sigbus() {
    static std::mutex mutex;
    const std::scoped_lock lock(mutex);
    struct sigaction now {};
    sigaction(SIGBUS, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) return;
    previous = now;
    struct sigaction ours {};
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, nullptr);
}

const std::byte* guarded_read(const std::byte* begin, std::size_t bytes, void (*read)(void*), void* argument) {
    Guard guard{begin, begin + bytes, nullptr, {}};
    read_within(guard, read, argument);
    return guard.lost;
}

}  // namespace fastvae
