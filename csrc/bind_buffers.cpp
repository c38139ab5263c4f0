#include "bindings.hpp"
#include "buffers.hpp"

namespace py = pybind11;

namespace fastvae {

void bind_buffers(py::module_& m) {
    py::class_<Buffer>(m, "Buffer", py::buffer_protocol(), "Uninitialised memory that returns to its pool when dropped.")
        .def_buffer([](Buffer& buffer) {
            return py::buffer_info(
                static_cast<unsigned char*>(buffer.data()), static_cast<py::ssize_t>(buffer.size()), /*readonly=*/false);
        });
    py::class_<MemoryPool, std::shared_ptr<MemoryPool>>(
        m, "MemoryPool", "Memory on huge pages, of which one piece is kept for the next that is asked for.")
        .def(py::init<>())
        .def(
            "take",
            [](const std::shared_ptr<MemoryPool>& pool, std::size_t bytes) {
                return std::make_unique<Buffer>(pool, bytes);
            },
            py::arg("bytes"), "A Buffer of this many bytes.");
}

}  // namespace fastvae
