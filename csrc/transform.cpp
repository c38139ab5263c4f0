#include "transform.hpp"

#include <stdexcept>

#include "mix.hpp"
#include "rows.hpp"

namespace fastvae {

RowKernel choose_rows_base(const RowTask& task);
#if defined(__x86_64__)
RowKernel choose_rows_avx2(const RowTask& task);
RowKernel choose_rows_avx512(const RowTask& task);
#endif

std::size_t size_of(Element element) {
    switch (element) {
        case Element::uint8: return 1;
        case Element::float16:
        case Element::bfloat16: return 2;
        case Element::float32: return 4;
        case Element::float64: return 8;
    }
    return 0;
}

const std::vector<RowKernels>& row_kernels() {
    static const std::vector<RowKernels> all = [] {
        std::vector<RowKernels> found;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found.push_back({"avx512", choose_rows_avx512});
        }
        if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", choose_rows_avx2});
#endif
        found.push_back({"base", choose_rows_base});
        return found;
    }();
    return all;
}

std::uint64_t transform_key(const Form& form) {
    constexpr std::uint64_t kTransforms = 0x7472616e73666f72;  // not the order's keys
    return mix(epoch_key(form.seed, form.transform.fixed ? ~std::uint64_t{0} : form.epoch) + kTransforms);
}

std::vector<std::int64_t> Form::item_shape(std::vector<std::int64_t> shape) const {
    if (shape.size() < 2) return shape;
    const auto set = [&](std::size_t from_end, std::int64_t crop) {
        std::int64_t& size = shape[shape.size() - from_end];
        if (crop > 0) size = crop;
    };
    set(2, transform.crop_height);
    set(1, transform.crop_width);
    return shape;
}

RowWriter::RowWriter(const RowLayout& layout, const Form& form)
    : task_{layout, form.element, form.transform, 1, 1, layout.pixels * layout.channels, 0, nullptr} {
    const Transform& transform = form.transform;
    if (layout.channels != 1 && layout.channels != 3 && layout.channels != 4) {
        throw std::invalid_argument("channels is " + std::to_string(layout.channels) + ", expected 1, 3 or 4");
    }
    if (form.element == Element::uint8 && (layout.element != Element::uint8 || transform.scaled)) {
        throw std::invalid_argument("dtype is uint8, expected it for uint8 samples that are not scaled");
    }
    if (transform.moves()) {
        if (layout.height < 1 || layout.width < 1) {
            throw std::invalid_argument("transform crops or flips, expected samples that are images");
        }
        task_.planes = layout.pixels * layout.channels / (layout.height * layout.width);
        task_.height = transform.crop_height > 0 ? transform.crop_height : layout.height;
        task_.width = transform.crop_width > 0 ? transform.crop_width : layout.width;
        if (task_.height > layout.height + 2 * transform.padding ||
            task_.width > layout.width + 2 * transform.padding) {
            throw std::invalid_argument("crop is larger than the padded image, expected at most its size");
        }
    }
    const auto features = static_cast<std::size_t>(task_.planes * task_.height * task_.width);
    moved_ = std::make_unique_for_overwrite<std::byte[]>(
        transform.any() ? features * size_of(layout.element) : 0);
    task_.moved = moved_.get();
    task_.key = transform_key(form);
    kernel_ = (form.kernels ? *form.kernels : row_kernels().front()).choose(task_);
    bytes_ = features * size_of(form.element);
}

}  // namespace fastvae
