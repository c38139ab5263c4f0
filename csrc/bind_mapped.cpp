#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "mapped.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const DataError& error) {
        const py::object type = py::module_::import("fastvae.data.sources").attr("DataError");
        py::set_error(type, error.what());
    }
}

// From the lowest byte of an array to its highest, whatever its strides, with the array over them.
py::array copy_of(const py::array& x, const WatchedFile& file) {
    const auto* const data = static_cast<const std::byte*>(x.data());
    const std::byte* low = data;
    const std::byte* high = data + (x.size() > 0 ? x.itemsize() : 0);
    for (py::ssize_t d = 0; d < x.ndim() && x.size() > 0; ++d) {
        const py::ssize_t step = (x.shape(d) - 1) * x.strides(d);
        (step < 0 ? low : high) += step;
    }
    const auto bytes = static_cast<std::size_t>(high - low);
    py::array_t<std::uint8_t> memory(high - low);
    auto* const out = reinterpret_cast<std::byte*>(memory.mutable_data());
    {
        const Unlocked unlocked;
        file.copy(low, bytes, out);
    }
    const std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim());
    const std::vector<py::ssize_t> strides(x.strides(), x.strides() + x.ndim());
    return {x.dtype(), shape, strides, out + (data - low), memory};
}

}  // namespace

void bind_mapped(py::module_& m) {
    py::register_local_exception_translator(&translate);

    py::class_<WatchedFile, std::shared_ptr<WatchedFile>>(
        m, "WatchedFile", "A file that is mapped, held open to see whether it stays as it is now.")
        .def(py::init<std::string, std::string, bool>(), py::arg("path"), py::arg("name"),
             py::arg("changes_are_ours"))
        .def_property_readonly("name", &WatchedFile::name)
        .def_property_readonly("size", &WatchedFile::size, "Bytes that it has now.")
        .def(
            "copy", [](const WatchedFile& file, const py::array& x) { return copy_of(x, file); }, py::arg("x"),
            "x, an array in a mapping of it, in memory. A file that was cut or changed is a DataError.");

    py::class_<MappedRows, Rows, std::shared_ptr<MappedRows>>(
        m, "MappedRows",
        "Rows of a file's mapping, which are checked as they are read: a file that was cut, changed or replaced, and "
        "floats that are NaN or infinite, are a DataError.")
        .def(py::init([](std::shared_ptr<DenseRows> rows, std::shared_ptr<WatchedFile> file, std::int64_t offset,
                         std::vector<std::int64_t> row_shape, bool shared, std::size_t room) {
                 return std::make_shared<MappedRows>(std::move(rows), std::move(file), offset, std::move(row_shape),
                                                     shared, room);
             }),
             py::arg("rows"), py::arg("file"), py::kw_only(), py::arg("offset"), py::arg("row_shape"),
             py::arg("shared"), py::arg("room"), py::keep_alive<1, 2>());
}

}  // namespace fastvae
