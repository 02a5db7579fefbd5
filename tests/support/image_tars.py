"""Random images, tars of them, and a fake autoencoder, for tests of encoding and data."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.encoders import Autoencoder

CLASSES = ("flags", "food", "symbols")
RESOLUTION_PX = 16


class FakeAutoencoder:
    """Stand-in for an autoencoder: average pooling by 4, 2 channels.

    Means come from red and green, standard deviations from blue.
    """

    identity = "fake"
    downscale = 4
    latent_channels = 2
    shift, scale = 0.25, 2.0

    def to(self, device: torch.device) -> FakeAutoencoder:
        return self

    def encode_moments(self, images: Tensor) -> Tensor:
        red_green_blue = torch.nn.functional.avg_pool2d(images, self.downscale)
        return torch.cat(
            [red_green_blue[:, :2], (red_green_blue[:, 2:] + 1.5).expand(-1, 2, -1, -1)], dim=1
        )


def random_image(
    number: int, height: int = RESOLUTION_PX, width: int = RESOLUTION_PX
) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode_image(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_sample(number: int, **replaced: bytes | None) -> list[tuple[str, bytes]]:
    """Members of one labelled tar sample; `cls=b"7"` replaces a member, `cls=None` omits it."""
    members: dict[str, bytes | None] = {
        "png": encode_image(random_image(number)),
        "cls": str(number % len(CLASSES)).encode(),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"class_name": CLASSES[number % len(CLASSES)]}).encode(),
    } | replaced
    return [
        (f"p{number:04d}.{extension}", data)
        for extension, data in members.items()
        if data is not None
    ]


def image_tar(path: Path, count: int) -> Path:
    return write_tar(path, [member for number in range(count) for member in tar_sample(number)])


def encode_config(source: Path | list[str], output: Path, **options: object) -> EncodeConfig:
    base = {
        "source": str(source) if isinstance(source, Path) else source,
        "output": str(output),
        "autoencoder": "fake",
        "resolution_px": RESOLUTION_PX,
        "batch_size": 4,
    }
    return EncodeConfig.model_validate(base | options)


def encode_dataset(config: EncodeConfig, autoencoder: Autoencoder, **networks) -> DatasetIndex:
    """Encode in one process, which also writes the index."""
    index = encode(config, autoencoder, **networks)
    assert index is not None
    return index


def data_config(folder: Path | str | dict[str, float], **options: object) -> DataConfig:
    return DataConfig.model_validate(
        {"folder": folder if isinstance(folder, dict) else str(folder)} | options
    )


def encode_tar(folder: Path, count: int, **options: object) -> tuple[Path, DatasetIndex]:
    tar = image_tar(folder / "images.tar", count)
    output = folder / "latents"
    return output, encode_dataset(encode_config(tar, output, **options), FakeAutoencoder())
