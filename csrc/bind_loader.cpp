#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "loader.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Labels = py::array_t<std::int64_t, py::array::c_style>;

std::string text(const py::handle& object) { return py::str(object); }

Element element_of(const py::array& x) {
    if (py::isinstance<py::array_t<std::uint8_t>>(x)) return Element::uint8;
    if (py::isinstance<py::array_t<float>>(x)) return Element::float32;
    if (py::isinstance<py::array_t<double>>(x)) return Element::float64;
    throw py::type_error("x has dtype " + text(x.dtype()) + ", expected uint8, float32 or float64");
}

const std::int64_t* vector_of_int64(const std::optional<py::array>& array, const char* name) {
    if (!array) return nullptr;
    if (!py::isinstance<Labels>(*array) || array->ndim() != 1) {
        throw py::type_error(std::string(name) + " is " + text(array->dtype()) + " of shape " +
                             text(array->attr("shape")) + ", expected a contiguous int64 vector");
    }
    return static_cast<const std::int64_t*>(array->data());
}

void check_indices(const Table& table) {
    if (!table.indices) return;
    for (std::int64_t i = 0; i < table.n_samples; ++i) {
        if (table.indices[i] < 0 || table.indices[i] >= table.n_rows) {
            throw py::value_error("indices[" + std::to_string(i) + "] is " + std::to_string(table.indices[i]) +
                                  ", expected 0 <= index < " + std::to_string(table.n_rows) +
                                  ", the number of samples");
        }
    }
}

Table table_of(const py::array& x, const std::optional<py::array>& y, const std::optional<py::array>& indices,
               bool channels_last) {
    if (x.ndim() < 2 || !(x.flags() & py::array::c_style)) {
        throw py::value_error("x has shape " + text(x.attr("shape")) +
                              ", expected a contiguous array of at least 2 dimensions");
    }
    Table table{};
    table.rows = static_cast<const std::byte*>(x.data());
    table.element = element_of(x);
    table.n_rows = x.shape(0);
    table.channels = channels_last ? x.shape(x.ndim() - 1) : 1;
    table.pixels = 1;
    for (py::ssize_t d = 1; d < x.ndim(); ++d) table.pixels *= x.shape(d);
    if (table.pixels == 0) {
        throw py::value_error("x has shape " + text(x.attr("shape")) + ", expected at least one feature a sample");
    }
    table.pixels /= table.channels;
    table.labels = vector_of_int64(y, "y");
    if (y && y->shape(0) != table.n_rows) {
        throw py::value_error("y has " + std::to_string(y->shape(0)) + " labels, expected one for each of the " +
                              std::to_string(table.n_rows) + " samples of x");
    }
    table.indices = vector_of_int64(indices, "indices");
    table.n_samples = indices ? indices->shape(0) : table.n_rows;
    check_indices(table);
    return table;
}

Order order_of(std::int64_t n, std::uint64_t seed, std::uint64_t epoch, bool shuffle) {
    return shuffle ? Order::shuffled(n, seed, epoch) : Order::sequential(n);
}

// An array over a part of the batch's memory that keeps all of it alive.
template <typename T>
py::array array_over(const Batch& batch, T* data, std::vector<py::ssize_t> shape) {
    using Memory = std::shared_ptr<std::byte>;
    auto memory = std::make_unique<Memory>(batch.memory);
    py::capsule owner(memory.get(), [](void* held) { std::unique_ptr<Memory>(static_cast<Memory*>(held)); });
    static_cast<void>(memory.release());
    return py::array_t<T>(std::move(shape), data, owner);
}

// What Python holds: the C++ loader with the shape that its flat rows have outside.
struct PyLoader {
    Loader loader;
    std::vector<py::ssize_t> item_shape;
};

struct PyBatches {
    std::unique_ptr<Batches> batches;
    std::vector<py::ssize_t> shape;  // of a batch; its first entry is the batch's own

    py::object next() {
        std::optional<Batch> batch;
        {
            const py::gil_scoped_release unlocked;
            batch = batches->next();
        }
        if (!batch) throw py::stop_iteration();
        shape[0] = batch->size;
        py::array x = array_over(*batch, batch->x, shape);
        if (!batch->y) return x;
        return py::make_tuple(std::move(x), array_over(*batch, batch->y, {batch->size}));
    }
};

PyLoader make_loader(const py::array& x, const std::optional<py::array>& y, const std::optional<py::array>& indices,
                     std::vector<py::ssize_t> item_shape, bool channels_last, std::int64_t batch_size,
                     bool drop_last, int workers) {
    if (batch_size < 1) {
        throw py::value_error("batch_size is " + std::to_string(batch_size) + ", expected at least 1");
    }
    if (workers < 0) throw py::value_error("workers is " + std::to_string(workers) + ", expected at least 0");
    const Table table = table_of(x, y, indices, channels_last);
    const auto features = std::accumulate(item_shape.begin(), item_shape.end(), py::ssize_t{1}, std::multiplies<>());
    if (features != table.features()) {
        throw py::value_error("item_shape has " + std::to_string(features) + " features, expected the " +
                              std::to_string(table.features()) + " of a row of x");
    }
    return {Loader(table, batch_size, drop_last, workers), std::move(item_shape)};
}

PyBatches start(PyLoader& self, std::uint64_t seed, std::uint64_t epoch, bool shuffle, std::int64_t first_batch,
                std::int64_t rank, std::int64_t ranks) {
    if (rank < 0 || rank >= ranks) {
        throw py::value_error("rank is " + std::to_string(rank) + ", expected 0 <= rank < " +
                              std::to_string(ranks));
    }
    if (first_batch < 0 || first_batch > self.loader.n_batches()) {
        throw py::value_error("first_batch is " + std::to_string(first_batch) + ", expected 0 to " +
                              std::to_string(self.loader.n_batches()) + ", the batches of a pass");
    }
    std::vector<py::ssize_t> shape{0};
    shape.insert(shape.end(), self.item_shape.begin(), self.item_shape.end());
    const Order order = order_of(self.loader.table().n_samples, seed, epoch, shuffle);
    return {self.loader.start(order, first_batch, Share{rank, ranks}),
            std::move(shape)};
}

py::array_t<std::int64_t> epoch_order(std::int64_t n, std::uint64_t seed, std::uint64_t epoch) {
    if (n < 0) throw py::value_error("n is " + std::to_string(n) + ", expected at least 0");
    const Order order = Order::shuffled(n, seed, epoch);
    py::array_t<std::int64_t> result(n);
    order.fill(0, n, result.mutable_data());
    return result;
}

}  // namespace

void bind_loader(py::module_& m) {
    m.def("epoch_order", &epoch_order, py::arg("n"), py::arg("seed"), py::arg("epoch"),
          "The shuffled order of an epoch: int64 [n], a permutation that depends on (n, seed, epoch) alone.");

    py::class_<PyBatches>(m, "Batches", "One pass over the data; ends its threads when dropped.",
                          py::release_gil_before_calling_cpp_dtor())
        .def("__iter__", [](py::object self) { return self; })
        .def("__next__", &PyBatches::next, "x, float32 [B, *item_shape], or (x, y), y int64 [B].");

    py::class_<PyLoader>(m, "Loader", "Gathers rows of x [N, ...] into float32 batches.")
        .def(py::init(&make_loader), py::arg("x"), py::arg("y"), py::arg("indices"), py::kw_only(),
             py::arg("item_shape"), py::arg("channels_last"), py::arg("batch_size"), py::arg("drop_last"), py::arg("workers"),
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("__len__", [](const PyLoader& self) { return self.loader.n_batches(); })
        .def("start", &start, py::arg("seed"), py::arg("epoch"), py::arg("shuffle"), py::arg("first_batch"),
             py::arg("rank"), py::arg("ranks"), py::keep_alive<0, 1>(),
             "Starts the workers on a rank's rows of the batches of an epoch, from `first_batch` on.");
}

}  // namespace fastvae
