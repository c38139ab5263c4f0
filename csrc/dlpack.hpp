// The structures of DLPack (dlpack.h of https://github.com/dmlc/dlpack, before its version 1), which torch and others
// take over without a copy: the owner of a tensor's memory gives an address, and what to call when it is free.
#pragma once

#include <cstdint>

namespace fastvae {

struct DLTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t dimensions;
    std::uint8_t code, bits;  // of an element's type
    std::uint16_t lanes;
    std::int64_t* shape;
    std::int64_t* strides;  // none where the tensor is contiguous
    std::uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor tensor;
    void* owner;
    void (*free)(DLManagedTensor*);
};

}  // namespace fastvae
