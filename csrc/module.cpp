#include <pybind11/pybind11.h>

#include "bindings.hpp"

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastvae's native code: the data loader, and for CPU tensors the ELBO operators, Adam, and"
              " products of matrices.";
    fastvae::bind_adam(m);
    fastvae::bind_buffers(m);
    fastvae::bind_elbo(m);
    fastvae::bind_flips(m);
    fastvae::bind_rows(m);
    fastvae::bind_shapes(m);
    fastvae::bind_mapped(m);
    fastvae::bind_product(m);
    fastvae::bind_sparse(m);
    fastvae::bind_loader(m);
}
