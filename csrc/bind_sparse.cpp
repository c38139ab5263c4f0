#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "sparse.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

template <typename T>
bool holds(const py::array& array) {
    return py::isinstance<py::array_t<T>>(array);
}

std::string text(const py::handle& object) { return py::str(object); }

void check_vector(const py::array& array, const char* name) {
    if (array.ndim() != 1 || !is_plain(array)) {
        throw py::value_error(std::string(name) + " has shape " + text(array.attr("shape")) +
                              ", expected a contiguous, aligned vector");
    }
}

Number number_of(const py::array& data) {
    if (holds<std::uint8_t>(data)) return Number::uint8;
    if (holds<std::uint16_t>(data)) return Number::uint16;
    if (holds<std::int32_t>(data)) return Number::int32;
    if (holds<std::int64_t>(data)) return Number::int64;
    if (holds<float>(data)) return Number::float32;
    if (holds<double>(data)) return Number::float64;
    throw py::type_error("data has dtype " + text(data.dtype()) +
                         ", expected uint8, uint16, int32, int64, float32 or float64");
}

bool is_wide(const py::array& indices, const py::array& indptr) {
    if (holds<std::int32_t>(indices) && holds<std::int32_t>(indptr)) return false;
    if (holds<std::int64_t>(indices) && holds<std::int64_t>(indptr)) return true;
    throw py::type_error("indices and indptr have dtypes " + text(indices.dtype()) + " and " + text(indptr.dtype()) +
                         ", expected int32 or int64 for both");
}

std::shared_ptr<SparseRows> make_sparse_rows(const py::array& data, const py::array& indices, const py::array& indptr,
                                             std::int64_t n_columns) {
    check_vector(data, "data");
    check_vector(indices, "indices");
    check_vector(indptr, "indptr");
    if (indices.shape(0) != data.shape(0)) {
        throw py::value_error("indices has " + std::to_string(indices.shape(0)) + " entries, expected the " +
                              std::to_string(data.shape(0)) + " of data");
    }
    if (indptr.shape(0) < 1) throw py::value_error("indptr is empty, expected one entry more than there are rows");
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    if (n_columns < 1 || n_columns > most) {
        throw py::value_error("n_columns is " + std::to_string(n_columns) + ", expected 1 to " + std::to_string(most));
    }
    const Csr csr{static_cast<const std::byte*>(data.data()),
                  number_of(data),
                  static_cast<const std::byte*>(indices.data()),
                  static_cast<const std::byte*>(indptr.data()),
                  is_wide(indices, indptr),
                  data.shape(0),
                  indptr.shape(0) - 1,
                  n_columns};
    const Unlocked unlocked;
    return std::make_shared<SparseRows>(csr);
}

py::object normalized(const py::object& owner, std::optional<double> target, bool log1p) {
    const auto& rows = owner.cast<const SparseRows&>();
    std::shared_ptr<SparseRows> result;
    {
        const Unlocked unlocked;
        result = std::make_shared<SparseRows>(rows, target, log1p);
    }
    return kept_with(std::move(result), owner);
}

py::array_t<double> sums(const SparseRows& rows) {
    py::array_t<double> result(rows.n_rows());
    rows.sums(result.mutable_data());
    return result;
}

}  // namespace

void bind_sparse(py::module_& m) {
    py::class_<SparseRows, Rows, std::shared_ptr<SparseRows>>(
        m, "SparseRows", "The rows of a matrix in compressed sparse rows, of shape [len(indptr) - 1, n_columns].")
        .def(py::init(&make_sparse_rows), py::arg("data"), py::arg("indices"), py::arg("indptr"), py::kw_only(),
             py::arg("n_columns"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("normalized", &normalized, py::arg("target"), py::arg("log1p"),
             "The same rows, brought to sum to `target` unless it is None, and their log(1 + x) if `log1p`.")
        .def_property_readonly("sums", &sums, "The sum of each row as it is kept, float64 [N].")
        .def_property_readonly("range", &SparseRows::range, "The smallest and the largest value as they are kept.");
}

}  // namespace fastvae
