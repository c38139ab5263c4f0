// What happens to a row between its source and its batch: crop, flip, binarisation, scale and element type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastvae {

enum class Element { uint8, float16, bfloat16, float32, float64 };

std::size_t size_of(Element element);

// How a row lies in memory: [pixels, channels], which comes out as [channels, pixels].
struct RowLayout {
    Element element;  // uint8, float32 or float64
    std::int64_t pixels;
    std::int64_t channels;    // 1, 3 or 4
    std::int64_t height = 0;  // of an image, for crop and flip; with one channel, pixels may be several such planes
    std::int64_t width = 0;

    std::size_t bytes() const { return static_cast<std::size_t>(pixels * channels) * size_of(element); }
};

// In the order in which they are done. x is uint8 / 255, or the floating point number.
struct Transform {
    std::int64_t padding = 0;       // zeros put around an image before it is cropped
    std::int64_t crop_height = 0;   // 0: as high and wide as it is
    std::int64_t crop_width = 0;
    bool center = false;            // the crop is the middle, rather than anywhere
    bool hflip = false;             // with probability 1/2
    bool binarize = false;          // 1 with probability x, else 0
    bool scaled = false;            // the number as it is stored * scale + shift, in float64
    double scale = 1.0;
    double shift = 0.0;
    bool fixed = false;             // the same in all epochs

    bool moves() const { return padding > 0 || crop_height > 0 || hflip; }
    bool any() const { return moves() || binarize || scaled; }
};

// What a batch is to be like, beside which rows are in it. Whatever is random in a row is a function of the two
// keys and of the row's number, never of its place in the batch or of the thread.
struct Form {
    Element element = Element::float32;  // uint8 only from uint8, and then it is not scaled
    Transform transform;
    std::uint64_t seed = 0;
    std::uint64_t epoch = 0;
    const struct RowKernels* kernels = nullptr;  // null is the best

    // The shape of an item whose shape is `shape` where it lies.
    std::vector<std::int64_t> item_shape(std::vector<std::int64_t> shape) const;
};

// All that a kernel has to know to write a row.
struct RowTask {
    RowLayout layout;
    Element element;
    Transform transform;
    std::int64_t planes, height, width;  // of what comes out, where the row is an image
    std::uint64_t key;
    std::byte* moved;  // room for a row that was cropped and flipped, in the element type of the layout
};

// Some pixels of a row, all of them where it is transformed.
struct Part {
    std::int64_t first;
    std::int64_t count;
};

// Writes a part of the row that lies at `row` to where it belongs in `out`, the place of the whole row.
using RowKernel = void (*)(const RowTask& task, const std::byte* row, std::int64_t number, Part part, std::byte* out);

// Compiled once for each instruction set. All give the same bits.
struct RowKernels {
    std::string name;
    RowKernel (*choose)(const RowTask& task);
};

// Those that this machine can run, best first.
const std::vector<RowKernels>& row_kernels();

// The Philox key of the transforms of an epoch.
std::uint64_t transform_key(const Form& form);

}  // namespace fastvae
