#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

namespace fastvae {

void bind_adam(pybind11::module_& m);
void bind_buffers(pybind11::module_& m);
void bind_elbo(pybind11::module_& m);
void bind_flips(pybind11::module_& m);
void bind_loader(pybind11::module_& m);
void bind_mapped(pybind11::module_& m);
void bind_product(pybind11::module_& m);
void bind_rows(pybind11::module_& m);
void bind_shapes(pybind11::module_& m);
void bind_sparse(pybind11::module_& m);

// Whether C++ may read the array from its first byte to its last as what its dtype says.
inline bool is_plain(const pybind11::array& array) {
    const int flags = array.flags();
    return (flags & pybind11::array::c_style) && (flags & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_);
}

// The object for what a call returns, which keeps `owner` alive. For py::keep_alive<0, 1>, with which pybind11 3.1.0
// crashes where an argument of the call has a wrong type.
template <typename T>
pybind11::object kept_with(T&& result, const pybind11::handle& owner) {
    pybind11::object object = pybind11::cast(std::forward<T>(result));
    pybind11::detail::keep_alive_impl(object, owner);
    return object;
}

}  // namespace fastvae
