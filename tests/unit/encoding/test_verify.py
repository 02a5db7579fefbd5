"""`encode --verify` and `data show`: a sound folder passes, every kind of corruption is named."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lpl_pretrain.cli.main import commands
from lpl_pretrain.config.dataset import DatasetIndex, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.data.offsets import Offsets
from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.encoding.show import contact_sheet, describe
from lpl_pretrain.encoding.verify import verify
from lpl_pretrain.errors import DataError
from tests.support.autoencoders import tiny_folder
from tests.support.image_tars import (
    FakeAutoencoder,
    encode_config,
    encode_dataset,
    encode_image,
    random_image,
    tar_sample,
    write_tar,
)
from tests.support.indexes import rewrite_index
from tests.support.latents import draw_images
from tests.support.text_encoders import text_encoder_folder


class SmoothAutoencoder(FakeAutoencoder):
    """Encodes red and green at a quarter of the size, and decodes them."""

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        red_green = torch.nn.functional.interpolate(
            raw, scale_factor=self.downscale, mode="nearest"
        )
        return torch.cat([red_green, red_green[:, :1]], dim=1)


def smooth(number: int, height: int = 16, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(number)
    return np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)).astype(np.uint8)


def smooth_tar(path: Path, count: int = 13) -> Path:
    sizes = [(16, 16), (24, 12), (12, 24)]
    return write_tar(
        path,
        [
            m
            for n in range(count)
            for m in tar_sample(n, png=encode_image(smooth(n, *sizes[n % 3])))
        ],
    )


@pytest.fixture(scope="module")
def encoded_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncodeConfig, DatasetIndex]:
    """A folder with buckets, flips and text."""
    base = tmp_path_factory.mktemp("whole")
    config = encode_config(
        smooth_tar(base / "x.tar"),
        base / "latents",
        buckets={"max_aspect": 3.0, "step_px": 4},
        flips=True,
        shard_samples=13,
        text={"bert": {"folder": text_encoder_folder(base / "bert", "bert")}},
    )
    return config, encode_dataset(config, SmoothAutoencoder())


@pytest.fixture
def folder(encoded_once, tmp_path: Path) -> tuple[EncodeConfig, DatasetIndex]:
    """A copy that the test may change."""
    config, index = encoded_once
    shutil.copytree(config.output, tmp_path / "latents")
    shutil.copy(str(config.source), tmp_path / "x.tar")
    return config.model_copy(
        update={"source": str(tmp_path / "x.tar"), "output": str(tmp_path / "latents")}
    ), index


def problems(config: EncodeConfig) -> str:
    report = verify(config, 15, SmoothAutoencoder())
    assert not report.is_sound and "NOT SOUND" in report.table()
    return report.table()


def test_sound(folder) -> None:
    config, index = folder
    report = verify(config, 15, SmoothAutoencoder())
    assert report.is_sound, report.table()
    table = report.table()
    assert "13 samples, 3 classes, 13 captions, 3 buckets" in table and "13 decoded: PSNR" in table
    assert f"{3 * 13} arrays" in table and f"{len(index.shards)} shards" in table


def test_every_flipped_byte_is_detected(folder) -> None:
    config, index = folder
    shard = Path(config.output) / index.shards[1].file
    raw = bytearray(shard.read_bytes())
    for position in range(0, len(raw), len(raw) // 7):
        raw[position] ^= 1
        shard.write_bytes(raw)
        assert shard.name in problems(config)
        raw[position] ^= 1
    shard.write_bytes(raw[:-512])
    assert f"{shard.name}: has {len(raw) - 512} bytes" in problems(config)
    shard.unlink()
    assert f"{shard.name}: missing" in problems(config)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda index: index["class_counts"].reverse(), "class counts"),
        (lambda index: index.update(captions=3), "captions: 13 in the shards, index.json says 3"),
        (lambda index: index.update(fingerprint="0" * 64), "fingerprint"),
        (lambda index: index.update(plan="other"), "are not those of this folder"),
        (lambda index: index["latent"]["mean"].__setitem__(0, 0.25), "latent.mean: ["),
        (lambda index: index["latent"]["std"].__setitem__(1, 0.25), "latent.std: ["),
        (
            lambda index: index.update(classes=["x", "y", "z"]),
            "classes: index.json names them otherwise than 13 samples",
        ),
        (lambda index: index.update(source_fingerprint="0" * 64), "source_fingerprint: "),
        (
            lambda index: index["autoencoder"].update(shift=0.5),
            "autoencoder: index.json says ('fake', 4, 0.5, 2.0), wanted",
        ),
        (
            lambda index: index["autoencoder"].update(scale=1.0),
            "autoencoder: index.json says ('fake', 4, 0.25, 1.0), wanted",
        ),
        (
            lambda index: index["autoencoder"].update(downscale=2),
            "autoencoder: index.json says ('fake', 2, 0.25, 2.0), wanted",
        ),
        (
            lambda index: index.update(resolution_px=17),
            "resolution_px: index.json says 17, wanted 16",
        ),
        (lambda index: index.update(config="{}"), "config: index.json says {}, wanted {"),
        (lambda index: index["text"]["bert"].update(max_tokens=78), "text: index.json says "),
        (lambda index: index["text"]["bert"].update(identity="x"), "text: index.json says "),
        (
            lambda index: index["null_text"]["bert"].update(sha256="0" * 64),
            "text_bert.null.safetensors: sha256 is",
        ),
        (lambda index: index["buckets"].reverse(), "is not the array that index.json describes"),
        (
            lambda index: index["text"]["bert"].update(width=17),
            "text_bert.npy is not a int8 array of width 17",
        ),
    ],
)
def test_an_index_that_differs_from_its_shards(
    folder, change: Callable[[dict], None], fragment: str
) -> None:
    config, _ = folder
    rewrite_index(Path(config.output), change)
    assert fragment in problems(config)


def test_a_corrupt_index_or_null_text(folder) -> None:
    config, _ = folder
    null = Path(config.output) / "text_bert.null.safetensors"
    null.write_bytes(null.read_bytes()[:-1] + b"\x41")
    assert "text_bert.null.safetensors: sha256 is" in problems(config)
    path = Path(config.output) / "index.json"
    path.write_bytes(path.read_bytes().replace(b'"captions": 13', b'"captions": 12'))
    assert "index.json: digest is" in problems(config)


def test_a_changed_source_or_autoencoder(folder) -> None:
    config, _ = folder
    smooth_tar(Path(str(config.source)), 11)
    assert "are not those of this folder" in problems(config)
    Path(str(config.source)).unlink()
    assert "found nothing" in problems(config)


def test_a_latent_of_another_image_decodes_to_the_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All checksums are valid: the latents were swapped while encoding."""
    config = encode_config(smooth_tar(tmp_path / "x.tar"), tmp_path / "latents", shard_samples=4)

    class Swapping(SmoothAutoencoder):
        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode_moments(images.flip(0))

    encode(config, Swapping())
    table = problems(config)
    assert (
        table.count("the latent belongs to another image") >= 4
        and "checksums                 ok" in table
    )


def test_recorded_crops_are_compared(tmp_path: Path) -> None:
    wide = write_tar(
        tmp_path / "x.tar",
        [m for n in range(6) for m in tar_sample(n, png=encode_image(smooth(n, 16, 64)))],
    )
    config = encode_config(wide, tmp_path / "latents", crop="random")
    encode_dataset(config, SmoothAutoencoder())
    index = read_index(tmp_path / "latents")
    entry = index.shards[0]
    path = (tmp_path / "latents" / entry.file).with_suffix(".offsets.safetensors")
    offsets = Offsets.read(path, entry)
    offsets.micro[2, 5] += 1
    path.write_bytes(offsets.to_bytes())
    rewrite_index(
        Path(config.output),
        lambda i: i["shards"][0].update(
            offsets_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        ),
    )
    assert "'p0002': its recorded sizes are not those of" in problems(config)


def test_describe(folder) -> None:
    config, _ = folder
    text = describe(config.output)
    for fragment in (
        "13 in 3 shards",
        "3: flags 5, food 4, symbols 4",
        "13; bert: up to 77 x 16 in int8",
        "16x16 px (4x4) 5",
        "2 channels, fp16, mirrored ones too",
        "fake (fake), 1/4 of the side",
    ):
        assert fragment in text, text
    with pytest.raises(DataError, match="index.json: not found"):
        describe(str(Path(config.output).parent))


def test_contact_sheet_shows_the_images(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    tar = write_tar(
        tmp_path / "x.tar",
        [
            m
            for n in range(9)
            for m in tar_sample(n, png=encode_image(red if n else random_image(0)))
        ],
    )
    encode_dataset(encode_config(tar, tmp_path / "latents"), SmoothAutoencoder())
    contact_sheet(
        str(tmp_path / "latents"),
        SmoothAutoencoder(),
        tmp_path / "sheet.png",
        images=9,
        side_px=16,
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (52, 52, 3)
    cells = [sheet[18 * y : 18 * y + 16, 18 * x : 18 * x + 16] for y in range(3) for x in range(3)]
    assert sum((cell[..., 0] > 250).all() and (cell[..., 1] < 5).all() for cell in cells) == 8

    class Other(SmoothAutoencoder):
        identity = "other"

    with pytest.raises(DataError, match="was encoded by autoencoder fake .fake., given is other"):
        contact_sheet(str(tmp_path / "latents"), Other(), tmp_path / "sheet.png")


def test_commands(tmp_path: Path) -> None:
    autoencoder = tiny_folder(tmp_path / "autoencoder")
    draw_images(tmp_path / "images", 6)
    config = tmp_path / "encode.yaml"
    config.write_text(
        f"source: {tmp_path}/images\noutput: {tmp_path}/latents\nautoencoder: "
        f"{autoencoder}\nresolution_px: 32\nflips: true\n"
    )
    run = CliRunner().invoke
    assert run(commands, ["encode", str(config)]).exit_code == 0
    sound = run(commands, ["encode", str(config), "--verify", "--pictures", "4"])
    assert sound.exit_code == 0 and "latents: sound" in sound.output and "4 decoded" in sound.output
    shown = run(commands, ["data", "show", f"{tmp_path}/latents", "--pictures", "4"])
    assert shown.exit_code == 0 and "6 in 1 shards" in shown.output
    assert Image.open(tmp_path / "latents" / "contact_sheet.png").size == (258, 258)
    shard = next((tmp_path / "latents").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    unsound = run(commands, ["encode", str(config), "--verify"])
    assert unsound.exit_code == 1 and "NOT SOUND" in unsound.output and shard.name in unsound.output


def test_many_shards_are_not_open_at_once(tmp_path: Path) -> None:
    """A data set may have more shards than a process may open files."""
    config = encode_config(
        smooth_tar(tmp_path / "x.tar", 60), tmp_path / "latents", shard_samples=1
    )
    encode_dataset(config, SmoothAutoencoder())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        assert verify(config, 8, SmoothAutoencoder()).is_sound
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
