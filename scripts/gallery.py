"""Makes the pictures of docs/after-training.md: python scripts/gallery.py [FOLDER]; minutes on two cores.

Two runs on Fashion-MNIST, with ten latents and with two, then the commands below; docs/gallery has the
pictures, in fewer colours. Runs are kept in FOLDER, if one is given, and those that are there are used.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageSequence

from fastvae.cli import main

GALLERY = Path(__file__).resolve().parent.parent / "docs/gallery"
TRAIN = "train --data fashion-mnist --likelihood gaussian --no-report --amp"
RUNS = {"ten": "--latent-dim 10 --epochs 15", "two": "--latent-dim 2 --epochs 10 --weights-epochs 1"}
COMMANDS = """
sample ten --n 32 --out sample.png
sample ten --n 32 --from posterior --out sample-posterior.png
reconstruct ten --n 16 --out reconstruct.png
reconstruct ten --n 8 --worst --out worst.png
traverse ten --index 3 --range 2 --out traverse.png
traverse ten --index 3 --range 2 --steps 11 --out traverse.gif
traverse two --grid --out grid.png
interpolate ten --from 0 1 6 --to 2 3 11 --out interpolate.png
latents two --out latents.png
latents ten --out latents-pca.png
latents ten --tsne --out latents-tsne.png
latents two --n 3000 --animate --out latents.gif
"""
GREYS = 32
COLOURS = 256
WIDTH = 640  # pixels of a scatter


def shrink(source: Path, target: Path) -> None:
    """The picture with fewer colours, and not wider than WIDTH where it has colours."""
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


def make(work: Path) -> None:
    """Train what is not there yet, look at it, and put the pictures into the gallery."""
    for name, options in RUNS.items():
        if not (work / name / "summary.json").exists():
            run(f"{TRAIN} {options} --out {work / name}")
    GALLERY.mkdir(exist_ok=True)
    for line in COMMANDS.strip().split("\n"):
        command, name, *options, picture = line.split()
        run(" ".join([command, str(work / name), *options, str(work / picture)]))
        shrink(work / picture, GALLERY / picture)
        print(f"{GALLERY / picture}: {(GALLERY / picture).stat().st_size // 1024} KiB")


def run(line: str) -> None:
    """A command of fastvae. Raises SystemExit where it fails."""
    if main(line.split()):
        sys.exit(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make(Path(sys.argv[1] if len(sys.argv) > 1 else folder))
