"""How evaluation writes: under a temporary name, then renamed, so that a file that exists is whole; pictures as a grid."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lpl_pretrain.runtime.files import published

GAP_PX = 2


def publish_json(path: Path, value: dict[str, Any]) -> None:
    with published(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def publish_grid(path: Path, pixels: Tensor) -> None:
    """uint8 (N, 3, H, W), row by row, as square a grid as N allows, on white."""
    with published(path) as temporary:
        grid(pixels).save(temporary, format="PNG", optimize=True)


def grid(pixels: Tensor) -> Image.Image:
    count, _, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + GAP_PX) - GAP_PX, columns * (width + GAP_PX) - GAP_PX, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        top, left = i // columns * (height + GAP_PX), i % columns * (width + GAP_PX)
        canvas[top : top + height, left : left + width] = picture
    return Image.fromarray(canvas)
