"""Images with shapes of many sizes, as photos have them, that differ for every seed."""

from pathlib import Path

import numpy as np
from PIL import Image


def scene(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((3, 60), (6, 50), (12, 40), (24, 30), (48, 15)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        smooth = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float)
        pixels += weight / 100 * (smooth - 128)
    return Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def write_scenes(root: Path, per_class: dict[str, int], classes: tuple[str, ...]) -> Path:
    """Write JPEG class folders, no two pictures alike. per_class: by split."""
    seed = 0
    for split, count in per_class.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                scene(seed).save(folder / f"{number}.jpg", quality=90)
                seed += 1
    return root
