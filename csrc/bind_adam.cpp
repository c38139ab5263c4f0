#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adam.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = std::uintptr_t;
// n, weight, mean, square, copy, its dtype, average, lr_factor, weight_decay
using Place = std::tuple<std::int64_t, Address, Address, Address, Address, int, Address, double, double>;
using Gradients = std::vector<std::pair<Address, int>>;  // and their dtypes

DType checked(const char* name, int dtype) {
    const auto found = static_cast<DType>(dtype);
    if (found != DType::float32 && found != DType::bfloat16 && found != DType::float16)
        throw std::invalid_argument(std::string(name) + ": got dtype code " + std::to_string(dtype) + ", expected 0, 2 or 3");
    return found;
}

// The parameters that are updated together. All that changes from step to step is where their gradients are.
class AdamParts {
public:
    explicit AdamParts(const std::vector<Place>& places) {
        for (const auto& [n, weight, mean, square, copy, copy_dtype, average, lr_factor, weight_decay] : places) {
            if (n > 0 && !(weight && mean && square))
                throw std::invalid_argument("places: got a null address, expected only copy and average to be absent");
            parts_.push_back(
                {n, nullptr, DType::float32, reinterpret_cast<float*>(weight), reinterpret_cast<float*>(mean),
                 reinterpret_cast<float*>(square), reinterpret_cast<void*>(copy), checked("copy", copy_dtype),
                 reinterpret_cast<float*>(average), lr_factor, weight_decay});
        }
    }

    std::int64_t step(
        const Gradients& gradients, std::int64_t step, double lr, double beta1, double beta2, double eps,
        double gradient_factor, double average_new, bool check, int threads) const {
        if (step < 1) throw std::invalid_argument("step: got " + std::to_string(step) + ", expected at least 1");
        const auto parts = with(gradients, threads);
        const Unlocked unlocked;
        return update({lr, beta1, beta2, eps, step, gradient_factor, average_new}, parts, check, threads);
    }

    // As torch.nn.utils.clip_grad_norm_ has it; NaN where the norm is NaN.
    double clip_factor(const Gradients& gradients, double max_norm, int threads) const {
        const auto parts = with(gradients, threads);
        const Unlocked unlocked;
        const double factor = max_norm / (std::sqrt(sum_of_squares(parts, threads)) + 1e-6);
        return factor > 1 ? 1 : factor;
    }

private:
    std::vector<AdamPart> with(const Gradients& gradients, int threads) const {
        if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
        if (gradients.size() != parts_.size())
            throw std::invalid_argument(
                "gradients: got " + std::to_string(gradients.size()) + ", expected " + std::to_string(parts_.size()));
        auto parts = parts_;
        for (std::size_t i = 0; i < parts.size(); ++i) {
            parts[i].gradient = reinterpret_cast<const void*>(gradients[i].first);
            parts[i].gradient_dtype = checked("gradient", gradients[i].second);
        }
        return parts;
    }

    std::vector<AdamPart> parts_;
};

}  // namespace

void bind_adam(py::module_& m) {
    py::class_<AdamParts>(
        m, "AdamParts",
        "Parameters that Adam updates in place: (n, weight, mean, square, copy, its dtype, average, factor of lr,\n"
        "weight decay) of each, with addresses as integers, and 0 for no copy and no average. Gradients are\n"
        "(address, dtype) of each; those at 0 are absent, and their parameters stay.")
        .def(py::init<const std::vector<Place>&>(), py::arg("places"))
        .def(
            "step", &AdamParts::step, py::arg("gradients"), py::arg("step"), py::arg("lr"), py::arg("beta1"),
            py::arg("beta2"), py::arg("eps"), py::arg("gradient_factor"), py::arg("average_new"), py::arg("check"),
            py::arg("threads"),
            "One step; the number of parameters. With `check` an inf or a NaN in a gradient leaves all as it is,\n"
            "and the index of the first such gradient is given.")
        .def(
            "clip_factor", &AdamParts::clip_factor, py::arg("gradients"), py::arg("max_norm"), py::arg("threads"),
            "The factor, at most 1, that brings the norm of all gradients to max_norm.");
}

}  // namespace fastvae
