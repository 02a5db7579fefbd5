"""Shipped assets: the emoji tars rebuild from their npm package, the autoencoder's PSNR."""

import io
import json
import shutil
from pathlib import Path

import PIL
import pytest
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from tools import build_emoji, train_autoencoder

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "lpl_pretrain" / "assets"


def samples(tar):
    return {
        s["__key__"]: s
        for s in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    }


def test_splits_are_disjoint_and_complete():
    train = samples(ASSETS / "emoji" / "train.tar")
    held_out = samples(ASSETS / "emoji" / "held_out.tar")
    assert len(train) + len(held_out) == 1911 and not train.keys() & held_out.keys()
    assert {int(s["cls"]) for s in train.values()} == set(range(10))
    first = train["1f600"]
    assert first["txt"] == b"grinning face" and Image.open(io.BytesIO(first["png"])).size == (
        64,
        64,
    )


@pytest.mark.network
def test_the_tars_rebuild(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the package of the emoji images cannot be fetched")
    try:
        package = build_emoji.fetch_package(tmp_path)
    except Exception as error:
        pytest.skip(f"the npm registry does not answer: {error}")
    origin = build_emoji.build(package, tmp_path / "built")
    shipped = json.loads((ASSETS / "emoji" / "origin.json").read_text())
    if PIL.__version__ == shipped["pillow"]:
        assert origin["files"] == shipped["files"]
    for name in shipped["files"]:
        rebuilt = samples(tmp_path / "built" / name)
        original = samples(ASSETS / "emoji" / name)
        assert rebuilt.keys() == original.keys()
        for key in rebuilt:
            assert all(
                rebuilt[key][member] == original[key][member] for member in ("cls", "txt", "json")
            )
            assert (
                Image.open(io.BytesIO(rebuilt[key]["png"])).tobytes()
                == Image.open(io.BytesIO(original[key]["png"])).tobytes()
            )


def test_the_autoencoder_has_its_stated_psnr():
    quality = json.loads((ASSETS / "autoencoder_emoji" / "quality.json").read_text())
    images = train_autoencoder.read_images("held_out")
    measured = train_autoencoder.measure(
        AutoencoderKL.from_pretrained(ASSETS / "autoencoder_emoji"), images
    )
    assert measured["pictures"] == 197 and quality["parameters"] <= 3_000_000
    assert (
        measured["held_out_psnr_db"] == pytest.approx(quality["held_out_psnr_db"], abs=0.02)
        and measured["held_out_psnr_db"] >= 29
    )
    assert sum(f.stat().st_size for f in (ASSETS / "autoencoder_emoji").iterdir()) <= 8 * 2**20
