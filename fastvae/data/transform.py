"""What a loader does to samples on their way into a batch: crop, flip, binarisation, scale."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal

from .. import _native


@dataclass(frozen=True)
class Transform:
    """What is done to each sample, in this order; x is uint8 / 255, or the floating point number.

    padding: zeros put on each side of an image before it is cropped, in pixels.
    crop: (height, width) of the part that is kept; by default the image's own size, so that `padding=4` alone
        is the usual random shift by up to 4 pixels.
    crop_at: "random", each place equally likely, or "center".
    hflip: mirror left and right with probability 1/2.
    binarize: a pixel becomes 1 with probability x (at 0 never, at 1 always), else 0, drawn anew in each
        epoch: dynamic binarisation (Salakhutdinov and Murray 2008; Burda, Grosse and Salakhutdinov 2016).
    scale, shift: the number as it is stored (0 to 255 for uint8) times `scale` plus `shift`, computed in
        float64, rounded to float32 and then to the loader's dtype. By default `scale` is 1/255 for uint8 and
        1 for floats.
    fixed: draw the same in every epoch, for evaluation and for data that are binarised once.

    What is drawn for a sample is a function of (seed, epoch, its number in the source) and of nothing else:
    batch size, threads, ranks, `indices` and dtype make no difference.

    Raises TypeError and ValueError.
    """

    scale: float | None = None
    shift: float = 0.0
    hflip: bool = False
    crop: tuple[int, int] | None = None
    crop_at: Literal["random", "center"] = "random"
    padding: int = 0
    binarize: bool = False
    fixed: bool = False

    def __post_init__(self) -> None:
        for name, value in (("scale", 1.0 if self.scale is None else self.scale), ("shift", self.shift)):
            try:
                finite = math.isfinite(value)
            except TypeError as error:
                raise TypeError(f"{name} is {value!r}, expected a number") from error
            if not finite:
                raise ValueError(f"{name} is {value}, expected a finite number")
        if self.crop is not None:
            object.__setattr__(self, "crop", _size(self.crop))
        if self.crop_at not in ("random", "center"):
            raise ValueError(f"crop_at is {self.crop_at!r}, expected 'random' or 'center'")
        try:
            padding = operator.index(self.padding)
        except TypeError as error:
            raise TypeError(f"padding is {self.padding!r}, expected an integer") from error
        if padding < 0:
            raise ValueError(f"padding is {padding}, expected at least 0")
        if self.binarize and self.is_scaled:
            got = f"scale {self.scale} and shift {self.shift}"
            raise ValueError(f"binarize is given with {got}, expected 0 and 1 as they are")

    @property
    def is_scaled(self) -> bool:
        """Whether `scale` or `shift` does anything that is not done without them."""
        return self.scale is not None or self.shift != 0

    @property
    def moves(self) -> bool:
        """Whether samples must be images."""
        return self.hflip or self.crop is not None or self.padding > 0

    @property
    def draws(self) -> bool:
        """Whether anything can depend on chance."""
        return self.moves or self.binarize

    def check(self, item_shape: tuple[int, ...]) -> None:
        """Raises ValueError where samples of this shape cannot be cropped or flipped so."""
        if not self.moves:
            return
        if len(item_shape) != 3:
            raise ValueError(
                f"transform crops or flips, got items of {list(item_shape)}, expected images [C, H, W]"
            )
        height, width = item_shape[1] + 2 * self.padding, item_shape[2] + 2 * self.padding
        if self.crop is not None and (self.crop[0] > height or self.crop[1] > width):
            padded = f"{height} x {width}, the size of the padded image"
            raise ValueError(f"crop is {self.crop[0]} x {self.crop[1]}, expected at most {padded}")

    def affine(self, is_uint8: bool) -> tuple[float, float] | None:
        """Scale and shift of samples of uint8 or of floats; None where they are not scaled."""
        if not self.is_scaled:
            return None
        return self.scale if self.scale is not None else 1 / 255 if is_uint8 else 1.0, self.shift

    def native(self, is_uint8: bool) -> _native.Transform:
        """For the native loader, over samples of uint8 or of floats."""
        return _native.Transform(
            padding=self.padding,
            crop=self.crop,
            center=self.crop_at == "center",
            hflip=bool(self.hflip),
            binarize=bool(self.binarize),
            affine=self.affine(is_uint8),
            fixed=bool(self.fixed),
        )


def _size(crop: object) -> tuple[int, int]:
    try:
        height, width = (operator.index(size) for size in crop)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise TypeError(f"crop is {crop!r}, expected (height, width)") from error
    if height < 1 or width < 1:
        raise ValueError(f"crop is {height} x {width}, expected at least 1 x 1")
    return height, width
