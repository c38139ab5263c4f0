#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

void bind_mapped(py::module_& m) {
    py::register_local_exception_translator(&translate);

    py::class_<WatchedFile, std::shared_ptr<WatchedFile>>(
        m, "WatchedFile", "A file that is mapped, held open to see whether it stays as it is now.")
        .def(py::init<std::string, std::string, bool>(), py::arg("path"), py::arg("name"),
             py::arg("changes_are_ours"));

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
