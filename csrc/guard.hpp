// Reads of mapped files that end in an answer where a page cannot be had, and not in the end of the process.
#pragma once

#include <cstddef>

namespace fastvae {

// Takes SIGBUS where somebody else has it by now, and hands on to them what is not of a guarded read.
void take_sigbus();

// Calls read(argument). Answers null, or the address in [begin, begin + bytes) whose page could not be had: beyond
// the end of its file, which was cut, or on a disk that failed. `read` is left where it was then: it and what it
// calls must have nothing to destroy.
const std::byte* guarded_read(const std::byte* begin, std::size_t bytes, void (*read)(void*), void* argument);

}  // namespace fastvae
