#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

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

// Takes the interpreter's lock by `take`. Before Python 3.14 a process that ends unwinds a daemon thread that asks for
// it, which would abort it in a destructor: such a thread waits here for the end instead.
template <typename Take>
auto take_lock(Take take) {
    try {
        return take();
    } catch (...) {
        for (;;) pause();
    }
}

// Lets go of the interpreter's lock for a scope.
class Unlocked {
public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() {
        take_lock([this] { PyEval_RestoreThread(state_); });
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    PyThreadState* state_;
};

// Has the interpreter's lock for a scope, in any thread.
class Locked {
public:
    Locked() : state_(take_lock(PyGILState_Ensure)) {}
    ~Locked() { PyGILState_Release(state_); }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;

private:
    PyGILState_STATE state_;
};

}  // namespace fastvae
