#include <pybind11/pybind11.h>

#include "bindings.hpp"

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastvae's native code: the data loader and the ELBO operators for CPU tensors.";
    fastvae::bind_elbo(m);
    fastvae::bind_loader(m);
}
