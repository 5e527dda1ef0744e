"""Random crops of the photographs that scikit-image and scikit-learn carry: real images for ImageNet models.

18 photographs, 16 crops each: 288 crops of 224x224. A crop is a square of 50 to 100 % of the shorter side at a random
place, mirrored half of the time, resized with antialiasing. Every figure on them is a figure on held-out images: no
photograph is used for calibration, except where a table says so and then by halves of the photographs.
"""

from __future__ import annotations

import numpy as np
import skimage.data
import sklearn.datasets
from numpy.typing import NDArray
from PIL import Image

from recipes.images import ImageSet, from_bytes

NAMES = [
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "text",
]
CROPS, SIDE = 16, 224


def photographs() -> list[NDArray[np.uint8]]:
    """The 18 photographs, RGB [H, W, 3]."""
    images = [np.asarray(getattr(skimage.data, name)()) for name in NAMES]
    images += [sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else image[:, :, :3] for image in images]


def random_crops(chosen: slice = slice(None), crops: int = CROPS, seed: int = 0) -> ImageSet:
    """`crops` crops of each of the chosen photographs, in the photographs' order."""
    generator = np.random.default_rng(seed)
    found = []
    for image in photographs()[chosen]:
        height, width = image.shape[:2]
        for _ in range(crops):
            side = int(min(height, width) * generator.uniform(0.5, 1.0))
            top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
            square = Image.fromarray(image[top : top + side, left : left + side])
            if generator.random() < 0.5:
                square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            found.append(np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    return ImageSet(from_bytes(np.stack(found)), source="photograph crops")
