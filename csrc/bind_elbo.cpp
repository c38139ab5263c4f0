#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "elbo.hpp"
#include "philox.hpp"

namespace py = pybind11;

namespace fastvae {
namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);  // NOLINT: addresses cross from Python as integers
}

// (address, dtype, sample stride, row stride, column stride), or None for a tensor that is not given
View view(const char* name, const py::object& given) {
    if (given.is_none()) return {};
    const auto [address, dtype, sample, row, column] =
        given.cast<std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>>();
    if (dtype < 0 || dtype > static_cast<int>(DType::uint8))
        throw std::invalid_argument(std::string(name) + ": got dtype code " + std::to_string(dtype) + ", expected 0 to 4");
    return {pointer<const void>(address), static_cast<DType>(dtype), sample, row, column};
}

// (address, stride), or None
PerRow per_row(const py::object& given) {
    if (given.is_none()) return {};
    const auto [address, stride] = given.cast<std::pair<Address, std::int64_t>>();
    return {pointer<const void>(address), stride};
}

// One call, its arguments checked, and the instruction set that is to run it.
struct Call {
    Elbo call;
    const InstructionSet& isa;
};

Call checked_call(
    bool real64, const std::array<std::int64_t, 4>& extents, int threads, int likelihood, bool half, bool per_sample,
    std::optional<std::pair<double, double>> clamp, std::optional<double> free_bits,
    const std::array<double, 5>& factors, const py::object& x_hat,
    const py::object& x, const py::object& mu, const py::object& logvar, Address kl, Address weight,
    Address beta_latents, const std::optional<std::array<std::int64_t, 3>>& noise,
    const std::array<Address, 5>& values, const std::optional<std::array<py::object, 5>>& upstream,
    const std::array<Address, 5>& gradients, const std::optional<std::string>& instruction_set) {
    Elbo call;
    call.real64 = real64;
    std::tie(call.samples, call.batch, call.features, call.latents) = std::tuple_cat(extents);
    if (std::ranges::min(extents) < 0) throw std::invalid_argument("extents: got a negative size");
    if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
    if (likelihood < 0 || likelihood > static_cast<int>(Likelihood::bernoulli))
        throw std::invalid_argument("likelihood: got code " + std::to_string(likelihood) + ", expected 0 to 3");
    call.threads = threads;
    call.likelihood = static_cast<Likelihood>(likelihood);
    call.half = half;
    call.per_sample = per_sample;
    call.clamp = clamp.has_value();
    if (clamp) std::tie(call.clamp_low, call.clamp_high) = *clamp;
    call.floor = free_bits.has_value();
    call.free_bits = free_bits.value_or(0);
    std::tie(call.recon_scale, call.kl_scale, call.beta, call.log_variance, call.constant) = std::tuple_cat(factors);
    call.x_hat = view("x_hat", x_hat);
    call.x = view("x", x);
    call.mu = view("mu", mu);
    call.logvar = view("logvar", logvar);
    call.kl = pointer(kl);
    call.weight = pointer(weight);
    call.beta_latents = pointer(beta_latents);
    call.sample = noise.has_value();
    if (noise) {
        call.seed = static_cast<std::uint64_t>((*noise)[0]);
        call.offset = static_cast<std::uint64_t>((*noise)[1]);
        call.first_row = (*noise)[2];
    }
    call.loss = pointer(values[0]);
    call.recon = pointer(values[1]);
    call.kl_term = pointer(values[2]);
    call.z = pointer(values[3]);
    call.kl_rows = pointer(values[4]);
    call.upstream = upstream.has_value();
    if (upstream) {
        call.g_loss = per_row((*upstream)[0]);
        call.g_recon = per_row((*upstream)[1]);
        call.g_kl_term = per_row((*upstream)[2]);
        call.g_z = view("g_z", (*upstream)[3]);
        call.g_kl_rows = per_row((*upstream)[4]);
    }
    call.g_x_hat = pointer(gradients[0]);
    call.g_mu = pointer(gradients[1]);
    call.g_logvar = pointer(gradients[2]);
    call.g_kl = pointer(gradients[3]);
    call.g_log_variance = pointer(gradients[4]);
    return {call, fastvae::instruction_set(instruction_set)};
}

void run_call(const Call& call) {
    const Unlocked unlocked;
    run(call.call, call.isa);
}

template <class... Arguments>
auto run_once(Call (*make)(Arguments...)) {
    return [make](Arguments... arguments) { run_call(make(std::forward<Arguments>(arguments)...)); };
}

// Run a call with its tensors in other memory, given in the order of Elbo's fields, but what is made last.
void run_again(
    const Call& plan, const std::vector<Address>& addresses, std::optional<std::int64_t> seed, double beta,
    double log_variance) {
    Elbo call = plan.call;
    std::size_t count = 0;
    const auto place = [&]<class T>(T*& field) {
        if (field && count++ < addresses.size()) field = pointer<T>(addresses[count - 1]);
    };
    for (View* given : {&call.x_hat, &call.x, &call.mu, &call.logvar}) place(given->data);
    for (const void** given : {&call.kl, &call.weight, &call.beta_latents}) place(*given);
    for (PerRow* given : {&call.g_loss, &call.g_recon, &call.g_kl_term}) place(given->data);
    place(call.g_z.data);
    place(call.g_kl_rows.data);
    for (void** value : {&call.loss, &call.recon, &call.kl_term, &call.z, &call.kl_rows}) place(*value);
    for (void** gradient : {&call.g_x_hat, &call.g_mu, &call.g_logvar, &call.g_kl, &call.g_log_variance})
        place(*gradient);
    if (count != addresses.size())
        throw std::invalid_argument(
            "addresses: got " + std::to_string(addresses.size()) + ", expected " + std::to_string(count)
            + ", one for each tensor that the call was made of");
    if (seed) call.seed = static_cast<std::uint64_t>(*seed);
    call.beta = beta;
    call.log_variance = log_variance;
    const Unlocked unlocked;
    run(call, plan.isa);
}

std::array<std::uint32_t, 4> philox_block(
    const std::array<std::uint32_t, 4>& counter, const std::array<std::uint32_t, 2>& key) {
    Words words = {};
    for (int i = 0; i < 4; ++i) words.w[i] += counter[i];
    words = philox(words, key[0], key[1]);
    return {words.w[0][0], words.w[1][0], words.w[2][0], words.w[3][0]};
}

using WordArray = py::array_t<std::uint32_t, py::array::c_style>;

std::pair<py::array_t<float>, py::array_t<float>> box_muller_arrays(const WordArray& radius, const WordArray& angle) {
    const py::ssize_t n = radius.size();
    if (angle.size() != n)
        throw std::invalid_argument(
            "angle_words: got " + std::to_string(angle.size()) + " words, expected " + std::to_string(n)
            + " as in radius_words");
    py::array_t<float> cosine(n), sine(n);
    for (py::ssize_t i = 0; i < n; i += 16) {
        const auto take = static_cast<std::size_t>(std::min<py::ssize_t>(16, n - i)) * sizeof(float);
        u32x16 radius_word = {}, angle_word = {};
        std::memcpy(&radius_word, radius.data() + i, take);
        std::memcpy(&angle_word, angle.data() + i, take);
        f32x16 c, s;
        box_muller(radius_word, angle_word, c, s);
        std::memcpy(cosine.mutable_data() + i, &c, take);
        std::memcpy(sine.mutable_data() + i, &s, take);
    }
    return {cosine, sine};
}

}  // namespace

void bind_elbo(py::module_& m) {
    const auto define = [&](auto... arguments) {
        m.def(
            "elbo", run_once(&checked_call), arguments...,
            "One call of the ELBO on CPU tensors; see csrc/elbo.hpp for the meaning of each argument. Addresses are\n"
            "integers, 0 or None for what is not given. extents: samples, batch, features, latents. factors:\n"
            "recon_scale, kl_scale, beta, log_variance, constant. noise: seed, offset, first_row.");
        py::class_<Call>(m, "ELBOCall", "A call of `elbo` that is made again and again.")
            .def(py::init(&checked_call), arguments...)
            .def(
                "run_again", &run_again, py::arg("addresses"), py::arg("seed"), py::arg("beta"), py::arg("log_variance"),
                "Run it with its tensors in other memory: the addresses of inputs, upstream gradients, values and\n"
                "gradients, of those that there were.");
    };
    define(
        py::arg("real64"), py::arg("extents"), py::arg("threads"), py::arg("likelihood"), py::arg("half"),
        py::arg("per_sample"), py::arg("clamp"), py::arg("free_bits"), py::arg("factors"), py::arg("x_hat"), py::arg("x"),
        py::arg("mu"), py::arg("logvar"), py::arg("kl"), py::arg("weight"), py::arg("beta_latents"), py::arg("noise"),
        py::arg("values"), py::arg("upstream"), py::arg("gradients"), py::arg("instruction_set") = py::none());
    m.def(
        "philox", &philox_block, py::arg("counter"), py::arg("key"),
        "The four words of one block of Philox4x32-10, as the operators use it.");
    m.def(
        "box_muller", &box_muller_arrays, py::arg("radius_words"), py::arg("angle_words"),
        "Two float32 arrays of normals, (r cos, r sin), from two uint32 arrays of words, as the operators do it.");
    m.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const auto& set : instruction_sets()) names.push_back(set.name);
            return names;
        },
        "The instruction sets that this CPU can run, the one in use first.");
}

}  // namespace fastvae
