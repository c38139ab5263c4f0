#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "elbo.hpp"
#include "flips.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = std::uintptr_t;

const float* reals(Address address) {
    return reinterpret_cast<const float*>(address);  // NOLINT: addresses cross from Python as integers
}

void flips(
    const std::array<std::int64_t, 4>& extents, int threads, Address noise, Address layer, Address cross,
    Address square, Address gram, Address values, const std::optional<std::string>& instruction_set) {
    const auto [samples, batch, latents, units] = extents;
    if (std::ranges::min(extents) < 1) throw std::invalid_argument("extents: got a size below 1");
    if (units % flip_columns != 0)
        throw std::invalid_argument(
            "units: got " + std::to_string(units) + ", expected a multiple of " + std::to_string(flip_columns));
    if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
    const Flips call{samples, batch, latents, units, threads, reals(noise), reals(layer), reals(cross),
                     reals(square), reals(gram), reinterpret_cast<double*>(values)};
    const FlipsKernel kernel = fastvae::instruction_set(instruction_set).flips;
    const Unlocked unlocked;
    run(call, kernel);
}

}  // namespace

void bind_flips(py::module_& m) {
    m.attr("FLIP_COLUMNS") = flip_columns;
    m.def(
        "flips", &flips, py::arg("extents"), py::arg("threads"), py::arg("noise"), py::arg("layer"), py::arg("cross"),
        py::arg("square"), py::arg("gram"), py::arg("values"), py::arg("instruction_set") = py::none(),
        "The values of csrc/flips.hpp, float64 [samples, batch]. extents: samples, batch, latents, units. Addresses are\n"
        "integers, of contiguous float32.");
}

}  // namespace fastvae
