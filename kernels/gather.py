"""A batch of rows of data that lie on the GPU: gathered, cropped, flipped, binarised or scaled, widened.

The same numbers to the last bit as csrc/row_kernel.cpp, drawn from the same Philox words by (key, number of
the sample). A program makes BLOCK pixels of one sample. Rows begin at int64 offsets; places within a row are
int32. What a batch is like is compiled in, where it begins is not.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from .rng import words_at

# 1/255 in two parts: the product of a byte with the first is exact in float32, so that the sum rounds once
UNIT_HEAD = tl.constexpr(257 / 65536)
UNIT_REST = tl.constexpr(1 / 255 - 257 / 65536)


@triton.jit
def below(word, n):
    """A whole number in [0, n) from a random word, each equally likely but for 2^-32."""
    return ((word.to(tl.uint64) * n) >> 32).to(tl.int32)


@triton.jit
def pixels(
    p_row, b_pixel, top, left, flip,
    PLANES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CROP_HEIGHT: tl.constexpr, CROP_WIDTH: tl.constexpr, MOVES: tl.constexpr, HFLIP: tl.constexpr,
):  # fmt: skip
    """Pixels of the crop of a sample, as they are stored; 0 in the padding around the image."""
    b_inside = b_pixel < PLANES * CROP_HEIGHT * CROP_WIDTH
    if MOVES:
        b_line = b_pixel // CROP_WIDTH
        b_plane = b_line // CROP_HEIGHT
        b_x = b_pixel - b_line * CROP_WIDTH
        if HFLIP:
            b_x = tl.where(flip != 0, CROP_WIDTH - 1 - b_x, b_x)
        b_x += left
        b_y = b_line - b_plane * CROP_HEIGHT + top
        b_inside &= (b_x >= 0) & (b_x < WIDTH) & (b_y >= 0) & (b_y < HEIGHT)
        b_pixel = (b_plane * HEIGHT + b_y) * WIDTH + b_x
    return tl.load(p_row + b_pixel, mask=b_inside, other=0)


@triton.jit
def is_on(b_x, b_random):
    """Whether a random word, as a fraction in [0, 1), is less than x: never at 0, always at 1."""
    if b_x.dtype == tl.uint8:
        # x / 255 has the digits x, x, x, ... in base 256, of which a word is compared to four
        return (b_x == 255) | (b_random < b_x.to(tl.uint32) * 0x01010101)
    else:
        return (b_x >= 1.0) | (b_random.to(tl.int64) < tl.ceil(b_x * 4294967296.0).to(tl.int64))


@triton.jit
def random_digits(b_words, b_shift, DIGIT: tl.constexpr):
    """Digit number 1, 2, 3 or 4 of a random word in base 256, from each of the four bytes of some words."""
    return ((b_words[:, None] >> b_shift[None, :]) & 255) << (32 - 8 * DIGIT)  # [BLOCKS, 4]


@triton.jit
def unit(b_x):
    """x / 255 of bytes, correctly rounded; floating point as it is."""
    if b_x.dtype == tl.uint8:
        b_byte = b_x.to(tl.float32)
        return b_byte * UNIT_HEAD + b_byte * UNIT_REST
    else:
        return b_x


@triton.jit(do_not_specialize=["first", "key"])
def gather_kernel(
    p_data, p_rows, p_numbers, p_affine, p_labels, p_out, p_labels_out, first: tl.int64, key: tl.int64,
    PLANES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CROP_HEIGHT: tl.constexpr, CROP_WIDTH: tl.constexpr, PADDING: tl.constexpr,
    CENTER: tl.constexpr, HFLIP: tl.constexpr, BINARIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Samples of data [N, PLANES, HEIGHT, WIDTH] to out [B, PLANES, CROP_HEIGHT, CROP_WIDTH].

    rows: int64, the rows of the batch from `first` on; without them they are first, first + 1, ...
    numbers: int64 [N], the numbers of the samples, by which they draw; without them, a row's own.
    affine: float64 [2], scale and shift. labels: int64 [N], to labels_out [B]. Each of these may be None.
    """
    FEATURES: tl.constexpr = PLANES * CROP_HEIGHT * CROP_WIDTH
    DOWN: tl.constexpr = HEIGHT + 2 * PADDING - CROP_HEIGHT
    RIGHT: tl.constexpr = WIDTH + 2 * PADDING - CROP_WIDTH
    MOVES: tl.constexpr = HFLIP or PADDING > 0 or DOWN > 0 or RIGHT > 0
    PIECES: tl.constexpr = (FEATURES + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.program_id(0) % PIECES

    row = first + sample
    if p_rows is not None:
        row = tl.load(p_rows + row)
    number = row
    if p_numbers is not None:
        number = tl.load(p_numbers + row)
    if p_labels is not None:
        tl.store(p_labels_out + sample, tl.load(p_labels + row), mask=piece == 0)
    p_row = p_data + row * (PLANES * HEIGHT * WIDTH)
    p_sample = p_out + sample * FEATURES

    # where in the padded image the crop begins, and whether it is flipped
    top, left, flip = DOWN // 2, RIGHT // 2, 0
    if HFLIP or (not CENTER and DOWN + RIGHT > 0):
        flip_word, top_word, left_word, _ = words_at(number * 0, number, key)
        flip = flip_word >> 31
        if not CENTER:
            top, left = below(top_word, DOWN + 1), below(left_word, RIGHT + 1)
    top -= PADDING
    left -= PADDING

    if BINARIZE:
        # a Philox block has a byte for each of 16 pixels: pixel 64 j + 4 i + k of 256 has byte k of word j of
        # block i; digit number d of its random word comes from the blocks of stream d
        b_block = tl.arange(0, BLOCK // 16)  # [BLOCKS]
        b_byte = tl.arange(0, 4)  # [4]
        b_group = (piece * (BLOCK // 16) + b_block).to(tl.int64)
        b_words_1 = words_at(b_group + (1 << 32), number, key)
        b_words_2 = words_at(b_group + (2 << 32), number, key)
        b_words_3 = words_at(b_group + (3 << 32), number, key)
        b_words_4 = words_at(b_group + (4 << 32), number, key)
        b_first = piece * BLOCK + b_block // 16 * 256 + b_block % 16 * 4  # [BLOCKS]
        b_shift = (8 * b_byte).to(tl.uint32)
        for word in tl.static_range(4):
            b_random = (
                random_digits(b_words_1[word], b_shift, 1)
                | random_digits(b_words_2[word], b_shift, 2)
                | random_digits(b_words_3[word], b_shift, 3)
                | random_digits(b_words_4[word], b_shift, 4)
            )  # [BLOCKS, 4]
            b_pixel = (b_first + 64 * word)[:, None] + b_byte[None, :]  # [BLOCKS, 4]
            b_x = pixels(
                p_row, b_pixel, top, left, flip, PLANES, HEIGHT, WIDTH, CROP_HEIGHT, CROP_WIDTH, MOVES, HFLIP
            )
            b_on = is_on(b_x, b_random)
            if p_out.dtype.element_ty == tl.uint8:
                b_value = tl.where(b_on, 255, 0)
            else:
                b_value = tl.where(b_on, 1.0, 0.0)
            tl.store(p_sample + b_pixel, b_value.to(p_out.dtype.element_ty), mask=b_pixel < FEATURES)
    else:
        b_pixel = piece * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        b_x = pixels(
            p_row, b_pixel, top, left, flip, PLANES, HEIGHT, WIDTH, CROP_HEIGHT, CROP_WIDTH, MOVES, HFLIP
        )  # [BLOCK]
        if p_affine is not None:
            # in float64, as on the host; launched without fused multiply-add, which would round once less
            b_x = (b_x.to(tl.float64) * tl.load(p_affine) + tl.load(p_affine + 1)).to(tl.float32)
        elif p_out.dtype.element_ty != tl.uint8:
            b_x = unit(b_x)
        tl.store(p_sample + b_pixel, b_x.to(p_out.dtype.element_ty), mask=b_pixel < FEATURES)
