#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adam.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = std::uintptr_t;
// n, gradient, its dtype, weight, mean, square, copy, its dtype, average
using Part = std::tuple<std::int64_t, Address, int, Address, Address, Address, Address, int, Address>;

DType checked(const char* name, int dtype) {
    const auto found = static_cast<DType>(dtype);
    if (found != DType::float32 && found != DType::bfloat16 && found != DType::float16)
        throw std::invalid_argument(std::string(name) + ": got dtype code " + std::to_string(dtype) + ", expected 0, 2 or 3");
    return found;
}

std::vector<AdamPart> checked(const std::vector<Part>& parts, int threads) {
    if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
    std::vector<AdamPart> checked_parts;
    checked_parts.reserve(parts.size());
    for (const auto& [n, gradient, gradient_dtype, weight, mean, square, copy, copy_dtype, average] : parts) {
        if (n > 0 && !(gradient && weight && mean && square))
            throw std::invalid_argument("parts: got a null address, expected only copy and average to be absent");
        checked_parts.push_back(
            {n, reinterpret_cast<const void*>(gradient), checked("gradient", gradient_dtype),
             reinterpret_cast<float*>(weight), reinterpret_cast<float*>(mean), reinterpret_cast<float*>(square),
             reinterpret_cast<void*>(copy), checked("copy", copy_dtype),
             reinterpret_cast<float*>(average)});
    }
    return checked_parts;
}

void adam(
    const std::vector<Part>& parts, std::int64_t step, double lr, double beta1, double beta2, double eps,
    double weight_decay, double gradient_factor, double average_new, int threads) {
    if (step < 1) throw std::invalid_argument("step: got " + std::to_string(step) + ", expected at least 1");
    const auto checked_parts = checked(parts, threads);
    const py::gil_scoped_release release;
    update({lr, beta1, beta2, eps, weight_decay, step, gradient_factor, average_new}, checked_parts, threads);
}

std::int64_t not_finite(const std::vector<Part>& parts, int threads) {
    const auto checked_parts = checked(parts, threads);
    const py::gil_scoped_release release;
    return first_not_finite(checked_parts, threads);
}

// As torch.nn.utils.clip_grad_norm_ has it; NaN where the norm is NaN.
double clip_factor(const std::vector<Part>& parts, double max_norm, int threads) {
    const auto checked_parts = checked(parts, threads);
    const py::gil_scoped_release release;
    const double factor = max_norm / (std::sqrt(sum_of_squares(checked_parts, threads)) + 1e-6);
    return factor > 1 ? 1 : factor;
}

}  // namespace

void bind_adam(py::module_& m) {
    m.def(
        "adam", &adam, py::arg("parts"), py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("weight_decay"), py::arg("gradient_factor"), py::arg("average_new"),
        py::arg("threads"),
        "One step of Adam, in place. A part is (n, gradient, its dtype, weight, mean, square, copy, its dtype,\n"
        "average), with addresses as integers, and 0 for no copy and no average.");
    m.def(
        "first_not_finite", &not_finite, py::arg("parts"), py::arg("threads"),
        "The index of the first part whose gradient has an inf or a NaN; the number of parts if none has.");
    m.def(
        "clip_factor", &clip_factor, py::arg("parts"), py::arg("max_norm"), py::arg("threads"),
        "The factor, at most 1, that brings the norm of the gradients of all parts to max_norm.");
}

}  // namespace fastvae
