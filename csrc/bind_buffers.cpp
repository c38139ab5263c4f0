#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "buffers.hpp"
#include "dlpack.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

// A tensor in memory on loan.
struct Lent {
    std::vector<std::int64_t> shape;
    Buffer buffer;
    DLManagedTensor managed;
};

// The capsule of DLPack: who takes the tensor over gives the capsule another name.
py::object lend(
    const std::shared_ptr<MemoryPool>& pool, std::vector<std::int64_t> shape, std::uint8_t code, std::uint8_t bits) {
    std::size_t bytes = bits / 8;
    for (const std::int64_t n : shape) bytes *= static_cast<std::size_t>(n);
    std::unique_ptr<Lent> lent(new Lent{std::move(shape), Buffer(pool, bytes), {}});
    constexpr std::int32_t cpu = 1;
    lent->managed = {
        {lent->buffer.data(), cpu, 0, static_cast<std::int32_t>(lent->shape.size()), code, bits, 1, lent->shape.data(),
         nullptr, 0},
        lent.get(),
        [](DLManagedTensor* self) { delete static_cast<Lent*>(self->owner); }};
    py::capsule capsule(&lent->managed, "dltensor", [](PyObject* self) {
        if (!PyCapsule_IsValid(self, "dltensor")) return;
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
        managed->free(managed);
    });
    lent.release();
    return capsule;
}

}  // namespace

void bind_buffers(py::module_& m) {
    py::class_<MemoryPool, std::shared_ptr<MemoryPool>>(
        m, "MemoryPool", "Memory on huge pages, of which one piece is kept for the next that is asked for.")
        .def(py::init<>())
        .def(
            "lend", &lend, py::arg("shape"), py::arg("code"), py::arg("bits"),
            "An uninitialised tensor, of DLPack's type code and bits, as a capsule that DLPack's consumers take. Its\n"
            "memory returns to the pool when dropped.");
}

}  // namespace fastvae
