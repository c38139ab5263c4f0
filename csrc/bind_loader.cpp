#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
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

const std::int64_t* vector_of_int64(const std::optional<py::array>& array, const char* name) {
    if (!array) return nullptr;
    if (!py::isinstance<Labels>(*array) || array->ndim() != 1 || !is_plain(*array)) {
        throw py::type_error(std::string(name) + " is " + text(array->dtype()) + " of shape " +
                             text(array->attr("shape")) + ", expected a contiguous, aligned int64 vector");
    }
    return static_cast<const std::int64_t*>(array->data());
}

void check_indices(const Table& table) {
    if (!table.indices) return;
    for (std::int64_t i = 0; i < table.n_samples; ++i) {
        if (table.indices[i] < 0 || table.indices[i] >= table.rows->n_rows()) {
            throw py::value_error("indices[" + std::to_string(i) + "] is " + std::to_string(table.indices[i]) +
                                  ", expected 0 <= index < " + std::to_string(table.rows->n_rows()) +
                                  ", the number of samples");
        }
    }
}

Table table_of(std::shared_ptr<const Rows> rows, const std::optional<py::array>& y,
               const std::optional<py::array>& indices, const Form& form) {
    const std::int64_t n_rows = rows->n_rows();
    Table table{std::move(rows), vector_of_int64(y, "y"), vector_of_int64(indices, "indices"),
                indices ? indices->shape(0) : n_rows, form};
    if (y && y->shape(0) != n_rows) {
        throw py::value_error("y has " + std::to_string(y->shape(0)) + " labels, expected one for each of the " +
                              std::to_string(n_rows) + " samples of x");
    }
    check_indices(table);
    return table;
}

// blocks: samples a block and blocks a window, or (0, 0) for an order without them.
Blocks blocks_of(const std::pair<std::int64_t, std::int64_t>& blocks) {
    if (blocks == std::pair<std::int64_t, std::int64_t>{}) return {};
    if (blocks.first < 1 || blocks.second < 1) {
        throw py::value_error("blocks is (" + std::to_string(blocks.first) + ", " + std::to_string(blocks.second) +
                              "), expected samples a block and blocks a window, at least 1 each");
    }
    return {blocks.first, blocks.second};
}

// An array over a part of the batch's memory that keeps all of it alive.
py::array array_over(const Batch& batch, const py::dtype& dtype, void* data, const std::vector<py::ssize_t>& shape) {
    using Memory = std::shared_ptr<std::byte>;
    auto memory = std::make_unique<Memory>(batch.memory);
    py::capsule owner(memory.get(), [](void* held) { std::unique_ptr<Memory>(static_cast<Memory*>(held)); });
    static_cast<void>(memory.release());
    return py::array(dtype, shape, data, owner);
}

// Waits for threads, and so without the interpreter's lock.
struct End {
    void operator()(Batches* batches) const {
        const Unlocked unlocked;
        delete batches;
    }
};

struct PyBatches {
    std::unique_ptr<Batches, End> batches;
    std::vector<py::ssize_t> shape;  // of a batch; its first entry is the batch's own
    py::dtype dtype;

    py::object next() {
        std::optional<Batch> batch;
        {
            const Unlocked unlocked;
            batch = batches->next();
        }
        if (!batch) throw py::stop_iteration();
        shape[0] = batch->size;
        py::array x = array_over(*batch, dtype, batch->memory.get(), shape);
        if (!batch->y) return x;
        return py::make_tuple(std::move(x), array_over(*batch, py::dtype::of<std::int64_t>(), batch->y, {batch->size}));
    }
};

constexpr std::pair<const char*, Element> kElements[] = {{"float32", Element::float32},
                                                         {"bfloat16", Element::bfloat16},
                                                         {"float16", Element::float16},
                                                         {"uint8", Element::uint8}};

Element element_named(const std::string& name) {
    for (const auto& [known, element] : kElements) {
        if (name == known) return element;
    }
    throw py::value_error("dtype is " + name + ", expected float32, bfloat16, float16 or uint8");
}

const RowKernels* kernels_named(const std::optional<std::string>& name) {
    for (const RowKernels& kernels : row_kernels()) {
        if (!name || kernels.name == *name) return &kernels;
    }
    throw py::value_error("instruction_set is " + *name + ", which this machine does not have");
}

// NumPy has no bfloat16: its bits come as int16.
py::dtype dtype_of(Element element) {
    switch (element) {
        case Element::uint8: return py::dtype::of<std::uint8_t>();
        case Element::float16: return py::dtype("float16");
        case Element::bfloat16: return py::dtype::of<std::int16_t>();
        default: return py::dtype::of<float>();
    }
}

std::unique_ptr<Loader> make_loader(std::shared_ptr<Rows> rows, const std::optional<py::array>& y,
                                    const std::optional<py::array>& indices, std::int64_t batch_size, bool drop_last,
                                    int workers, const std::string& dtype, const std::optional<Transform>& transform,
                                    const std::optional<std::string>& instruction_set) {
    if (batch_size < 1) {
        throw py::value_error("batch_size is " + std::to_string(batch_size) + ", expected at least 1");
    }
    if (workers < 0) throw py::value_error("workers is " + std::to_string(workers) + ", expected at least 0");
    Form form;
    form.element = element_named(dtype);
    form.transform = transform.value_or(Transform{});
    form.kernels = kernels_named(instruction_set);
    static_cast<void>(RowWriter(rows->layout(), form));  // throws for a form that the rows cannot have
    return std::make_unique<Loader>(table_of(std::move(rows), y, indices, form), batch_size, drop_last, workers);
}

py::object start(const py::object& owner, std::uint64_t seed, std::uint64_t epoch, bool shuffle,
                 const std::pair<std::int64_t, std::int64_t>& blocks, std::int64_t first_batch, std::int64_t rank,
                 std::int64_t ranks) {
    auto& self = owner.cast<Loader&>();
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();  // Share multiplies two of them
    if (ranks < 1 || ranks > most) {
        throw py::value_error("ranks is " + std::to_string(ranks) + ", expected 1 to " + std::to_string(most));
    }
    if (rank < 0 || rank >= ranks) {
        throw py::value_error("rank is " + std::to_string(rank) + ", expected 0 <= rank < " +
                              std::to_string(ranks));
    }
    if (first_batch < 0 || first_batch > self.n_batches()) {
        throw py::value_error("first_batch is " + std::to_string(first_batch) + ", expected 0 to " +
                              std::to_string(self.n_batches()) + ", the batches of a pass");
    }
    const std::vector<std::int64_t> item_shape = self.table().item_shape();
    std::vector<py::ssize_t> shape{0};
    shape.insert(shape.end(), item_shape.begin(), item_shape.end());
    const std::int64_t n = self.table().n_samples;
    const Order order = shuffle ? Order::shuffled(n, seed, epoch, blocks_of(blocks))
                                : Order::sequential(n, blocks_of(blocks));
    auto started = self.start(order, seed, epoch, first_batch, Share{rank, ranks});
    PyBatches batches{std::unique_ptr<Batches, End>(started.release()), std::move(shape),
                      dtype_of(self.table().form.element)};
    return kept_with(std::move(batches), owner);
}

py::array_t<std::int64_t> epoch_order(std::int64_t n, std::uint64_t seed, std::uint64_t epoch,
                                      const std::pair<std::int64_t, std::int64_t>& blocks, std::int64_t first,
                                      std::optional<std::int64_t> count) {
    if (n < 0) throw py::value_error("n is " + std::to_string(n) + ", expected at least 0");
    if (first < 0 || first > n) {
        throw py::value_error("first is " + std::to_string(first) + ", expected 0 to " + std::to_string(n));
    }
    const std::int64_t most = n - first;
    if (count && (*count < 0 || *count > most)) {
        throw py::value_error("count is " + std::to_string(*count) + ", expected 0 to " + std::to_string(most));
    }
    const Order order = Order::shuffled(n, seed, epoch, blocks_of(blocks));
    py::array_t<std::int64_t> result(count.value_or(most));
    std::int64_t* const samples = result.mutable_data();
    const Unlocked unlocked;
    order.fill(first, count.value_or(most), samples);
    return result;
}

// The memory of an array, which is kept as long as a batch lies there.
LentMemory lent_memory(const py::array& memory) {
    if (!py::isinstance<py::array_t<std::uint8_t>>(memory) || !is_plain(memory) || !memory.writeable()) {
        throw py::type_error("memory is " + text(memory.dtype()) + ", expected contiguous, writable uint8");
    }
    constexpr std::uintptr_t line = 64;
    if (reinterpret_cast<std::uintptr_t>(memory.data()) % line != 0) {
        throw py::value_error("memory does not begin at a multiple of 64 bytes");
    }
    auto* const bytes = const_cast<std::byte*>(static_cast<const std::byte*>(memory.data()));
    const std::shared_ptr<const py::array> owner(new py::array(memory), [](const py::array* array) {
        const Locked locked;
        delete array;
    });
    return {bytes, static_cast<std::size_t>(memory.nbytes()), owner};
}

}  // namespace

void bind_loader(py::module_& m) {
    m.def("epoch_order", &epoch_order, py::arg("n"), py::arg("seed"), py::arg("epoch"),
          py::arg("blocks") = std::pair<std::int64_t, std::int64_t>{}, py::arg("first") = 0,
          py::arg("count") = py::none(),
          "The shuffled order of an epoch: int64 [n], a permutation that depends on (n, seed, epoch, blocks) alone; "
          "blocks: samples a block and blocks a window, (0, 0) for none; first, count: a part of it.");

    py::class_<PyBatches>(m, "Batches", "One pass over the data; ends its threads when dropped.")
        .def("__iter__", [](py::object self) { return self; })
        .def("close", [](PyBatches& self) { self.batches->close(); }, py::call_guard<Unlocked>(),
             "Ends the threads and frees what is ready; `next` raises RuntimeError from now on.")
        .def("__next__", &PyBatches::next, "x [B, *item_shape], or (x, y), y int64 [B].");

    py::class_<Loader>(m, "Loader", "Gathers rows into batches.")
        .def(py::init(&make_loader), py::arg("rows"), py::arg("y"), py::arg("indices"), py::kw_only(),
             py::arg("batch_size"), py::arg("drop_last"), py::arg("workers"), py::arg("dtype") = "float32",
             py::arg("transform") = py::none(), py::arg("instruction_set") = py::none(), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("__len__", &Loader::n_batches)
        .def_property_readonly("item_shape",
                               [](const Loader& self) { return py::tuple(py::cast(self.table().item_shape())); })
        .def_property_readonly(
            "indices",
            [](const Loader& self) -> py::object {
                const Table& table = self.table();
                if (!table.indices) return py::none();
                return py::array_t<std::int64_t>(table.n_samples, table.indices);
            },
            "The rows of its samples, int64 [n_samples], or None for all rows.")
        .def_property_readonly("batch_bytes", &Loader::batch_bytes, "Bytes that a batch takes with its labels.")
        .def(
            "use", [](Loader& self, const py::array& memory) { self.use(lent_memory(memory)); }, py::arg("memory"),
            "Has batches made in pieces of this memory, uint8 [pieces * batch_bytes]; elsewhere where all are in use.")
        .def("release", &Loader::release, "Frees the memory that no batch uses.")
        .def_property_readonly("position", &Loader::position,
                               "Batches delivered of the epoch of the pass that was started last.")
        .def_property_readonly(
            "meter",
            [](const Loader& self) {
                const Meter& meter = self.meter();
                return py::make_tuple(meter.batches.load(), meter.samples.load(), meter.bytes_read.load(),
                                      static_cast<double>(meter.wait_nanoseconds.load()) * 1e-9,
                                      static_cast<double>(meter.pass_nanoseconds.load()) * 1e-9);
            },
            "Of all passes: batches, samples, bytes read, seconds within `next`, seconds of passes.")
        .def("start", &start, py::arg("seed"), py::arg("epoch"), py::arg("shuffle"), py::arg("blocks"),
             py::arg("first_batch"), py::arg("rank"), py::arg("ranks"),
             "Starts the workers on a rank's rows of the batches of an epoch, from `first_batch` on.");
}

}  // namespace fastvae
