"""Makes the pictures of docs/after-training.md: python scripts/gallery.py; minutes on two cores.

Two runs on Fashion-MNIST, with ten latents and with two, then the commands below; docs/gallery has the
pictures, in fewer colours.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageSequence

from fastvae.cli import main

GALLERY = Path(__file__).resolve().parent.parent / "docs/gallery"
TRAIN = "train --data fashion-mnist --likelihood gaussian --epochs 15 --no-report --amp"
RUNS = {"ten": "--latent-dim 10", "two": "--latent-dim 2 --weights-epochs 1"}
COMMANDS = """
sample ten --n 32 --out sample.png
sample ten --n 32 --from posterior --out sample-posterior.png
reconstruct ten --n 16 --out reconstruct.png
reconstruct ten --n 8 --worst --out worst.png
traverse ten --index 3 --out traverse.png
traverse ten --index 3 --steps 11 --out traverse.gif
traverse two --grid --out grid.png
interpolate ten --from 0 1 6 --to 3 8 11 --out interpolate.png
latents two --out latents.png
latents ten --out latents-pca.png
latents ten --tsne --out latents-tsne.png
latents two --n 3000 --animate --out latents.gif
"""
GREYS = 32
COLOURS = 48
WIDTH = 640  # of the scatters


def shrink(source: Path, target: Path) -> None:
    """The picture with less colours, and not wider than WIDTH where it has colours."""
    with Image.open(source) as image:
        mode = "RGB" if "latents" in source.name else "L"
        frames, duration = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(frame.convert(mode))
            duration.append(frame.info.get("duration", 0))
    if frames[0].mode == "RGB":
        size = (WIDTH, round(WIDTH * frames[0].height / frames[0].width))
        frames = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    count = COLOURS if frames[0].mode == "RGB" else GREYS
    few = [frame.quantize(count, dither=Image.Dither.NONE) for frame in frames]
    if source.suffix == ".gif":
        few[0].save(target, save_all=True, append_images=few[1:], duration=duration, loop=0)
    else:
        few[0].save(target, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, options in RUNS.items():
            if main(shlex.split(f"{TRAIN} {options} --out {work / name}")):
                sys.exit(1)
        for line in COMMANDS.split("\n")[1:-1]:
            command, run, *options = shlex.split(line)
            options[-1] = str(work / options[-1])
            if main([command, str(work / run), *options]):
                sys.exit(1)
        GALLERY.mkdir(exist_ok=True)
        for picture in sorted([*work.glob("*.png"), *work.glob("*.gif")]):
            shrink(picture, GALLERY / picture.name)
            print(f"{GALLERY / picture.name}: {(GALLERY / picture.name).stat().st_size // 1024} KiB")
