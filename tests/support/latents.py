"""Small encoded data sets, made by the real encoder from drawn images."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lpl_pretrain.config.dataset import INDEX_NAME, index_bytes, read_index, sealed
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.encoding.encode import encode
from tests.support.autoencoders import tiny_folder
from tests.support.image_tars import encode_config, tar_sample, write_tar
from tests.support.text_encoders import WORDS, text_encoder_folder


def draw_images(
    folder: Path, count: int = 32, side: int = 32, sizes: list[tuple[int, int]] | None = None
) -> Path:
    """Write `class/name.png`: coloured discs and squares.

    Images are resized to the (height, width) pairs of `sizes` in turn.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for i in range(count):
        name = ("disc", "square")[i % 2]
        y, x = rng.integers(8, side - 8, 2)
        inside = (
            ((rows - y) ** 2 + (columns - x) ** 2 < 36)
            if name == "disc"
            else (abs(rows - y) < 6) & (abs(columns - x) < 6)
        )
        pixels = np.full((side, side, 3), 255, np.uint8)
        pixels[inside] = rng.integers(0, 255, 3)
        (folder / name).mkdir(parents=True, exist_ok=True)
        height, width = sizes[i // 2 % len(sizes)] if sizes else (side, side)
        Image.fromarray(pixels).resize((width, height)).save(folder / name / f"{i:03d}.png")
    return folder


def mixed_dataset(folder: Path) -> tuple[dict[str, float], str]:
    """Encode two folders with three aspect ratios and flips; ({folder: weight}, autoencoder)."""
    autoencoder = tiny_folder(folder / "autoencoder")
    weights = {}
    for name, sizes, weight in (("a", [(32, 32), (48, 24)], 3.0), ("b", [(32, 32), (24, 48)], 1.0)):
        draw_images(folder / name, 12, sizes=sizes)
        config = {
            "source": str(folder / name),
            "output": str(folder / f"{name}_latents"),
            "autoencoder": autoencoder,
        }
        more = {
            "resolution_px": 32,
            "buckets": {"max_aspect": 2.0, "step_px": 8},
            "flips": True,
            "shard_samples": 5,
        }
        encode(EncodeConfig.model_validate(config | more))
        weights[config["output"]] = weight
    return weights, autoencoder


def tiny_dataset(folder: Path, count: int = 32, **options) -> tuple[str, str]:
    """Encode `count` images to latents of 4 x 8 x 8; (latents, autoencoder) folders."""
    autoencoder = tiny_folder(folder / "autoencoder", **options)
    draw_images(folder / "images", count)
    encode(
        EncodeConfig(
            source=str(folder / "images"),
            output=str(folder / "latents"),
            autoencoder=autoencoder,
            resolution_px=32,
        )
    )
    return str(folder / "latents"), autoencoder


def captioned_dataset(folder: Path, count: int = 24) -> tuple[str, str]:
    """Encode images with captions of different lengths by a tiny CLIP and a tiny T5.

    Returns (latents, autoencoder) folders; the text encoders are `clip` and `t5` beside them.
    """
    autoencoder = tiny_folder(folder / "autoencoder")
    captions = [
        f"a {' and '.join(WORDS[3 : 4 + n % 4])} cat".encode() if n % 5 else None
        for n in range(count)
    ]
    tar = write_tar(
        folder / "images.tar",
        [member for n, text in enumerate(captions) for member in tar_sample(n, txt=text)],
    )
    text = {
        "clip": {
            "folder": text_encoder_folder(folder / "clip", "clip"),
            "pooled": True,
            "max_tokens": 9,
        },
        "t5": {
            "folder": text_encoder_folder(folder / "t5", "t5"),
            "max_tokens": 8,
            "storage": "fp16",
        },
    }
    encode(
        encode_config(
            tar,
            folder / "latents",
            autoencoder=autoencoder,
            resolution_px=32,
            text=text,
            shard_samples=7,
        )
    )
    return str(folder / "latents"), autoencoder


def poison_shard(folder: str, shard: int, factor: float) -> None:
    """Multiply the float16 latents of one shard by `factor` and fix its checksums.

    The result is finite and verifies, like the output of a faulty encode.
    """
    index = read_index(folder)
    tar = Path(folder) / index.shards[shard].file
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        ranges = [(m.offset_data, m.size) for m in members if m.name.endswith("moments.npy")]
    assert ranges and index.moments_dtype == "fp16"
    for start, size in ranges:
        stored = np.load(io.BytesIO(content[start : start + size]))
        content[start + size - stored.nbytes : start + size] = (
            (stored * factor).astype("<f2").tobytes()
        )
    tar.write_bytes(content)
    shards = list(index.shards)
    sha256 = hashlib.sha256(content).hexdigest()
    shards[shard] = shards[shard].model_copy(update={"sha256": sha256})
    (Path(folder) / INDEX_NAME).write_bytes(
        index_bytes(sealed(index.model_copy(update={"shards": shards})))
    )
