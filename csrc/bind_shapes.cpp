#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "bindings.hpp"
#include "shapes.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Numbers = py::array_t<std::int64_t, py::array::c_style>;

void check(const Numbers& numbers, const char* name, std::int64_t end) {
    if (numbers.ndim() != 1) {
        throw py::value_error(std::string(name) + " has " + std::to_string(numbers.ndim()) +
                              " dimensions, expected 1");
    }
    for (py::ssize_t i = 0; i < numbers.size(); ++i) {
        if (numbers.data()[i] < 0 || numbers.data()[i] >= end) {
            throw py::value_error(std::string(name) + "[" + std::to_string(i) + "] is " +
                                  std::to_string(numbers.data()[i]) + ", expected 0 <= it < " + std::to_string(end));
        }
    }
}

std::shared_ptr<ShapeRows> make_shape_rows(const std::optional<Numbers>& numbers) {
    if (!numbers) return std::make_shared<ShapeRows>(nullptr, kShapeImages);
    check(*numbers, "numbers", kShapeImages);
    return std::make_shared<ShapeRows>(numbers->data(), numbers->size());
}

py::array_t<std::uint8_t> images(const ShapeRows& self, const Numbers& rows) {
    check(rows, "rows", self.n_rows());
    py::array_t<std::uint8_t> result({rows.size(), py::ssize_t{kShapeSide}, py::ssize_t{kShapeSide}});
    const std::int64_t* const chosen = rows.data();
    const py::ssize_t n = rows.size();
    std::uint8_t* out = result.mutable_data();
    const Unlocked unlocked;
    for (py::ssize_t i = 0; i < n; ++i, out += kShapeSide * kShapeSide) draw_shape(self.number(chosen[i]), out);
    return result;
}

}  // namespace

void bind_shapes(py::module_& m) {
    py::class_<ShapeRows, Rows, std::shared_ptr<ShapeRows>>(m, "ShapeRows",
                                                            "Images of a shape of five known factors, made as they are read.")
        .def(py::init(&make_shape_rows), py::arg("numbers").noconvert(), py::keep_alive<1, 2>())
        .def("images", &images, py::arg("rows"), "The images of rows, int64 [n], as uint8 [n, 64, 64].");
}

}  // namespace fastvae
