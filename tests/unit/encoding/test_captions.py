"""Text encoders need captions: none at all is an error before anything is encoded, some missing
ones are counted.
"""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from lpl_pretrain.encoding.encode import encode
from lpl_pretrain.errors import DataError
from tests.support.image_tars import (
    FakeAutoencoder,
    encode_config,
    encode_dataset,
    tar_sample,
    write_tar,
)
from tests.support.latents import draw_images
from tests.support.text_encoders import text_encoder_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {"clip": {"folder": text_encoder_folder(tmp_path_factory.mktemp("clip"), "clip")}}


def tar_of_captions(path: Path, *captions: bytes | None) -> Path:
    return write_tar(
        path,
        [member for n, caption in enumerate(captions) for member in tar_sample(n, txt=caption)],
    )


class UnusedAutoencoder(FakeAutoencoder):
    def encode_moments(self, images):
        raise AssertionError("encoded before the captions were looked at")


def test_image_folders_have_no_captions(tmp_path: Path, text: dict) -> None:
    config = encode_config(draw_images(tmp_path / "images", 6), tmp_path / "latents", text=text)
    with pytest.raises(
        DataError,
        match=r"text=\['clip'\]: none of the 6 images of source=.* has a caption .100 % lack "
        r"one.*, wanted",
    ):
        encode(config, UnusedAutoencoder())
    assert not (tmp_path / "latents").exists()
    assert (
        encode_dataset(
            encode_config(tmp_path / "images", tmp_path / "latents"), FakeAutoencoder()
        ).captions
        == 0
    )


@pytest.mark.parametrize("blank", [None, b"", b" \n"])
def test_tars_without_captions(tmp_path: Path, text: dict, blank: bytes | None) -> None:
    tar = tar_of_captions(tmp_path / "x.tar", blank, blank, None)
    with pytest.raises(DataError, match="none of the 3 images"):
        encode(encode_config(tar, tmp_path / "latents", text=text), UnusedAutoencoder())


def test_some_missing_captions_log_one_line(
    tmp_path: Path, text: dict, caplog: pytest.LogCaptureFixture
) -> None:
    tar = tar_of_captions(tmp_path / "x.tar", b"a cat", None, b"a dog", b" ")
    with caplog.at_level("WARNING", logger="lpl_pretrain"):
        index = encode_dataset(
            encode_config(tar, tmp_path / "latents", text=text), FakeAutoencoder()
        )
    assert index.samples == 4 and caplog.text.count("2 of 4 images (50 %) have no caption") == 1
    caplog.clear()
    encode_dataset(
        encode_config(tar_of_captions(tmp_path / "y.tar", b"a"), tmp_path / "all", text=text),
        FakeAutoencoder(),
    )
    encode_dataset(encode_config(tar, tmp_path / "no_text"), FakeAutoencoder())
    assert "have no caption" not in caplog.text


def test_captions_of_remote_tars_are_checked_before_the_index(
    tmp_path: Path, text: dict, caplog: pytest.LogCaptureFixture
) -> None:
    memory = fsspec.filesystem("memory")
    for name, captions in (("none", (None, b" ")), ("some", (b"a cat", None))):
        memory.pipe(
            f"/captions/{name}.tar",
            tar_of_captions(tmp_path / f"{name}.tar", *captions).read_bytes(),
        )
    with pytest.raises(DataError, match="none of the 2 images"):
        encode(
            encode_config(["memory://captions/none.tar"], tmp_path / "none", text=text),
            FakeAutoencoder(),
        )
    assert not (tmp_path / "none" / "index.json").exists()
    with caplog.at_level("WARNING", logger="lpl_pretrain"):
        encode_dataset(
            encode_config(["memory://captions/some.tar"], tmp_path / "some", text=text),
            FakeAutoencoder(),
        )
    assert caplog.text.count("1 of 2 images (50 %) have no caption") == 1
