// A procedural set after dSprites (Matthey et al. 2017): every combination of five factors is one image.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.hpp"

namespace fastvae {

inline constexpr std::int64_t kShapeSide = 64;  // pixels
inline constexpr std::int64_t kShapeFactors[5] = {3, 6, 40, 32, 32};  // shape, scale, orientation, x, y
inline constexpr std::int64_t kShapeImages = 3 * 6 * 40 * 32 * 32;

// Draws image `number`, in [0, kShapeImages), to uint8 [64, 64]. Its factors are the digits of the number, y the
// fastest. The result is the same on every instruction set.
void draw_shape(std::int64_t number, std::uint8_t* image);

// Row i is image numbers[i], or image i where numbers is null. The array belongs to the caller and must outlive this.
class ShapeRows final : public Rows {
public:
    ShapeRows(const std::int64_t* numbers, std::int64_t n_rows)
        : Rows(n_rows, {1, kShapeSide, kShapeSide}), numbers_(numbers) {}

    std::int64_t number(std::int64_t row) const { return numbers_ ? numbers_[row] : row; }
    void gather(const std::int64_t* rows, std::int64_t n, const Form& form, std::byte* out) const override;
    RowLayout layout() const override {
        return {Element::uint8, kShapeSide * kShapeSide, 1, kShapeSide, kShapeSide};
    }

private:
    const std::int64_t* const numbers_;
};

}  // namespace fastvae
