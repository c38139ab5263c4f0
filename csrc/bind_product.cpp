#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "product.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = std::uintptr_t;
using Strides = std::array<std::int64_t, 2>;

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }

Factor factor(const char* name, const Strides& strides) {
    if (strides[0] != 1 && strides[1] != 1)
        throw std::invalid_argument(
            std::string(name) + ": got strides " + std::to_string(strides[0]) + ", " + std::to_string(strides[1])
            + ", expected one of them to be 1");
    return {nullptr, strides[0], strides[1]};
}

// A product that is made again and again, of matrices that lie elsewhere each time.
class ProductCall {
public:
    ProductCall(
        bool bf16, const std::array<std::int64_t, 3>& extents, const Strides& a, const Strides& b, bool relu,
        int threads, std::shared_ptr<ProductMemory> memory)
        : multiply_(product_kernel(bf16)), memory_(std::move(memory)) {
        if (multiply_ == nullptr)
            throw std::runtime_error(
                std::string("ProductCall: expected a CPU with ")
                + (bf16 ? "AVX512_BF16 and without AMX" : "AVX512"));
        if (std::ranges::min(extents) < 0) throw std::invalid_argument("extents: got a negative size");
        if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
        std::tie(product_.m, product_.n, product_.k) = std::tuple_cat(extents);
        product_.threads = threads;
        product_.a = factor("a", a);
        product_.b = factor("b", b);
        product_.relu = relu;
    }

    void run(Address a, Address b, Address bias, Address where, Address c) {
        Product product = product_;
        product.a.data = pointer(a);
        product.b.data = pointer(b);
        product.bias = pointer(bias);
        product.where = pointer(where);
        product.c = reinterpret_cast<void*>(c);
        const Unlocked unlocked;
        if (product.m > 0 && product.n > 0) multiply_(product, *memory_);
    }

private:
    Multiply multiply_;
    Product product_;
    std::shared_ptr<ProductMemory> memory_;
};

}  // namespace

void bind_product(py::module_& m) {
    py::class_<ProductMemory, std::shared_ptr<ProductMemory>>(
        m, "ProductMemory", "Memory in which factors lie as they are multiplied; for one product at a time.")
        .def(py::init<>());
    py::class_<ProductCall>(m, "ProductCall", "A product of matrices, [m, k] [k, n]; see csrc/product.hpp.")
        .def(
            py::init<bool, const std::array<std::int64_t, 3>&, const Strides&, const Strides&, bool, int,
                     std::shared_ptr<ProductMemory>>(),
            py::arg("bf16"), py::arg("extents"), py::arg("a_strides"), py::arg("b_strides"), py::arg("relu"),
            py::arg("threads"), py::arg("memory"),
            "bf16: else float32. extents: m, n, k. One stride of each matrix is 1.")
        .def(
            "run", &ProductCall::run, py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("where"), py::arg("c"),
            "With these addresses; 0 for no bias, [n], and no where, [m, n].");
    m.def(
        "products_supported", [](bool bf16) { return product_kernel(bf16) != nullptr; }, py::arg("bf16"),
        "Whether it has AVX512; for bfloat16, AVX512_BF16 and not AMX.");
    m.def("prefers_bf16", &prefers_bf16, "Whether this CPU multiplies bfloat16 matrices faster than float32 ones.");
}

}  // namespace fastvae
