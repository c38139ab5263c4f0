#pragma once
#include <pybind11/pybind11.h>

namespace fastvae {

void bind_adam(pybind11::module_& m);
void bind_buffers(pybind11::module_& m);
void bind_elbo(pybind11::module_& m);
void bind_loader(pybind11::module_& m);
void bind_mapped(pybind11::module_& m);
void bind_rows(pybind11::module_& m);
void bind_shapes(pybind11::module_& m);

}  // namespace fastvae
