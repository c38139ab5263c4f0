#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "rows.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

std::string text(const py::handle& object) { return py::str(object); }

Element element_of(const py::array& x) {
    if (py::isinstance<py::array_t<std::uint8_t>>(x)) return Element::uint8;
    if (py::isinstance<py::array_t<float>>(x)) return Element::float32;
    if (py::isinstance<py::array_t<double>>(x)) return Element::float64;
    throw py::type_error("x has dtype " + text(x.dtype()) + ", expected uint8, float32 or float64");
}

std::shared_ptr<DenseRows> make_dense_rows(const py::array& x, std::vector<std::int64_t> item_shape,
                                           bool channels_last) {
    if (x.ndim() < 2 || !is_plain(x)) {
        throw py::value_error("x has shape " + text(x.attr("shape")) +
                              ", expected a contiguous, aligned array of at least 2 dimensions");
    }
    std::int64_t features = 1;
    for (py::ssize_t d = 1; d < x.ndim(); ++d) features *= x.shape(d);
    if (features == 0) {
        throw py::value_error("x has shape " + text(x.attr("shape")) + ", expected at least one feature a sample");
    }
    const std::int64_t channels = channels_last ? x.shape(x.ndim() - 1) : 1;
    if (channels != 1 && channels != 3 && channels != 4) {
        throw py::value_error("x has " + std::to_string(channels) + " channels, expected 1, 3 or 4 where they are last");
    }
    std::int64_t left = features;  // divided, as a product of what was handed over may overflow
    for (const std::int64_t size : item_shape) left = size > 0 && left % size == 0 ? left / size : 0;
    if (left != 1) {
        throw py::value_error("item_shape is " + text(py::cast(item_shape)) + ", expected the " +
                              std::to_string(features) + " features of a row of x");
    }
    RowLayout layout{element_of(x), features / channels, channels};
    if (item_shape.size() == 3) {
        layout.height = item_shape[1];
        layout.width = item_shape[2];
    }
    return std::make_shared<DenseRows>(static_cast<const std::byte*>(x.data()), layout, x.shape(0),
                                       std::move(item_shape));
}

Transform make_transform(std::int64_t padding, std::optional<std::array<std::int64_t, 2>> crop, bool center,
                         bool hflip, bool binarize, std::optional<std::array<double, 2>> affine, bool fixed) {
    constexpr std::int64_t kMost = std::int64_t{1} << 20;
    Transform transform{};
    if (padding < 0 || padding > kMost) {
        throw py::value_error("padding is " + std::to_string(padding) + ", expected 0 to " + std::to_string(kMost));
    }
    if (crop && ((*crop)[0] < 1 || (*crop)[1] < 1)) throw py::value_error("crop is empty, expected at least 1 by 1");
    transform.padding = padding;
    if (crop) {
        transform.crop_height = (*crop)[0];
        transform.crop_width = (*crop)[1];
    }
    transform.center = center;
    transform.hflip = hflip;
    transform.binarize = binarize;
    transform.fixed = fixed;
    if (affine) {
        transform.scaled = true;
        transform.scale = (*affine)[0];
        transform.shift = (*affine)[1];
    }
    return transform;
}

}  // namespace

void bind_rows(py::module_& m) {
    py::class_<Transform>(m, "Transform", "What is done to a row on its way into a batch.")
        .def(py::init(&make_transform), py::kw_only(), py::arg("padding"), py::arg("crop"), py::arg("center"),
             py::arg("hflip"), py::arg("binarize"), py::arg("affine"), py::arg("fixed"));
    m.def(
        "transform_key",
        [](std::uint64_t seed, std::uint64_t epoch, bool fixed) {
            Form form;
            form.seed = seed;
            form.epoch = epoch;
            form.transform.fixed = fixed;
            return transform_key(form);
        },
        py::arg("seed"), py::arg("epoch"), py::arg("fixed"), "The Philox key of what is random in the rows.");

    py::class_<Rows, std::shared_ptr<Rows>>(m, "Rows", "Samples by number, of which a Loader makes batches.")
        .def("__len__", &Rows::n_rows)
        .def_property_readonly("item_shape", [](const Rows& rows) { return py::tuple(py::cast(rows.item_shape())); });

    py::class_<DenseRows, Rows, std::shared_ptr<DenseRows>>(m, "DenseRows", "The rows of an array [N, ...].")
        .def(py::init(&make_dense_rows), py::arg("x"), py::kw_only(), py::arg("item_shape"),
             py::arg("channels_last"), py::keep_alive<1, 2>());
}

}  // namespace fastvae
