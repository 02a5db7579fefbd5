"""Stored embeddings of captions: trimmed, small, close to the encoder's output, read on request."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lpl_pretrain.config.dataset import read_index
from lpl_pretrain.config.encode import EncodeConfig, TextEncoderConfig
from lpl_pretrain.data.stream import LatentStream, RequestedFields
from lpl_pretrain.encoding.encoders import store_embedding
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.models.text import load_text_encoder
from tests.support.image_tars import (
    FakeAutoencoder,
    data_config,
    encode_config,
    encode_dataset,
    tar_sample,
    write_tar,
)
from tests.support.text_encoders import minilm, text_encoder_folder

CAPTIONS = ["a red cat", "", "a picture of a blue square dog and a round cat", "dog", "a dog"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_encoder_folder(tmp_path_factory.mktemp("clip"), "clip")


def text_config(folder: Path, text: dict, name: str = "latents") -> EncodeConfig:
    tar = write_tar(
        folder / "x.tar",
        [
            m
            for n, caption in enumerate(CAPTIONS)
            for m in tar_sample(n, txt=caption.encode() or None)
        ],
    )
    return encode_config(tar, folder / name, text=text)


def read_text(folder: Path, *names: str) -> tuple[list[str], LatentStream, object]:
    stream = LatentStream(data_config(folder), 0, 5, RequestedFields(captions=True, text=names))
    batch = stream.read(range(5))
    assert batch.captions is not None
    return batch.captions, stream, batch


@pytest.mark.parametrize("storage", ["int8", "fp16"])
def test_embeddings_come_back_with_their_captions(tmp_path: Path, clip: str, storage: str) -> None:
    text = {"clip_l": {"folder": clip, "storage": storage, "pooled": True, "max_tokens": 9}}
    index = encode_dataset(text_config(tmp_path, text), FakeAutoencoder())
    entry = index.text["clip_l"]
    assert (entry.width, entry.pooled_width, entry.max_tokens, entry.storage, index.captions) == (
        16,
        12,
        9,
        storage,
        4,
    )
    captions, _, batch = read_text(tmp_path / "latents", "clip_l")
    assert sorted(captions) == sorted(CAPTIONS)
    encoder = load_text_encoder(TextEncoderConfig(folder=clip, pooled=True, max_tokens=9), "x")
    got = batch.text["clip_l"]
    assert got.states.shape == (5, 9, 16) and got.states.dtype == torch.float16
    for row, caption in enumerate(captions):
        (states, pooled), *_ = encoder.encode([caption])
        assert got.lengths[row] == len(states) and (got.states[row, len(states) :] == 0).all()
        error = (got.states[row, : len(states)].float() - states).abs().max() / states.abs().max()
        assert error < (0.006 if storage == "int8" else 0.001)
        torch.testing.assert_close(got.pooled[row].float(), pooled, rtol=2e-3, atol=2e-3)


def test_several_encoders_and_only_the_requested_ones(tmp_path: Path, clip: str) -> None:
    t5 = text_encoder_folder(tmp_path / "t5", "t5")
    encode_dataset(
        text_config(
            tmp_path, {"clip_l": {"folder": clip}, "t5": {"folder": t5, "storage": "fp16"}}
        ),
        FakeAutoencoder(),
    )
    _, _, both = read_text(tmp_path / "latents", "clip_l", "t5")
    assert set(both.text) == {"clip_l", "t5"}
    plain = LatentStream(data_config(tmp_path / "latents"), 0, 5).read(range(5))
    assert plain.text == {} and plain.captions is None
    with pytest.raises(
        ConfigError, match=r"has no embeddings by 'bert', it has \['clip_l', 't5'\]"
    ):
        read_text(tmp_path / "latents", "bert")
    moved = both.to("meta").text["t5"]
    assert moved.states.device.type == moved.lengths.device.type == "meta" and moved.pooled is None


def test_the_empty_caption_for_guidance(tmp_path: Path, clip: str) -> None:
    encode_dataset(
        text_config(tmp_path, {"clip_l": {"folder": clip, "storage": "fp16", "pooled": True}}),
        FakeAutoencoder(),
    )
    null = load_file(tmp_path / "latents" / "text_clip_l.null.safetensors")
    (states, pooled), *_ = load_text_encoder(
        TextEncoderConfig(folder=clip, pooled=True), "x"
    ).encode([""])
    np.testing.assert_allclose(null["tokens"], states, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(null["pooled"], pooled, rtol=2e-3, atol=2e-3)


def test_int8_error_is_half_a_step_of_each_tokens_largest() -> None:
    states = torch.randn(50, 384) * torch.logspace(-1, 2, 50)[:, None]
    stored = store_embedding(states, None, "int8")
    error = (torch.from_numpy(stored.floats()) - states).abs().amax(dim=1) / states.abs().amax(
        dim=1
    )
    assert error.max() < 0.5 / 127 + 0.001
    zero = store_embedding(torch.zeros(3, 8), None, "int8")
    assert (zero.floats() == 0).all()
    coarse = torch.from_numpy(
        (stored.tokens // 16 * 16).astype(np.float32) * stored.scale.astype(np.float32)[:, None]
    )
    assert (
        (coarse - states).abs().amax(dim=1) / states.abs().amax(dim=1)
    ).max() > 0.05  # four bits would be seen


def test_minilm_costs_less_than_32_kb_a_caption(tmp_path: Path) -> None:
    long = " ".join(["word"] * 200)
    tar = write_tar(
        tmp_path / "x.tar", [m for n in range(3) for m in tar_sample(n, txt=long.encode())]
    )
    plain = encode_dataset(encode_config(tar, tmp_path / "plain"), FakeAutoencoder())
    text = {"minilm": {"folder": str(minilm()), "max_tokens": 77}}
    index = encode_dataset(encode_config(tar, tmp_path / "text", text=text), FakeAutoencoder())
    assert (index.shards[0].bytes - plain.shards[0].bytes) / 3 < 32_000
    batch = LatentStream(
        data_config(tmp_path / "text"), 0, 3, RequestedFields(text=("minilm",))
    ).read(range(3))
    assert batch.text["minilm"].states.shape == (3, 77, 384)


def test_another_encoder_changes_the_plan(tmp_path: Path, clip: str) -> None:
    encode_dataset(text_config(tmp_path, {"clip_l": {"folder": clip}}), FakeAutoencoder())
    bert = text_encoder_folder(tmp_path / "bert", "bert")
    with pytest.raises(DataError, match="made from other inputs .source or encoders have changed"):
        encode_dataset(text_config(tmp_path, {"clip_l": {"folder": bert}}), FakeAutoencoder())
    with pytest.raises(DataError, match="made from other inputs .text"):
        encode_dataset(text_config(tmp_path, {}), FakeAutoencoder())


def test_corrupt_text_is_named(tmp_path: Path, clip: str) -> None:
    encode_dataset(text_config(tmp_path, {"clip_l": {"folder": clip}}), FakeAutoencoder())
    shard = tmp_path / "latents" / read_index(tmp_path / "latents").shards[0].file
    raw = shard.read_bytes()
    at = raw.index(b"text_clip_l.npy")
    shard.write_bytes(raw[: at + 512 - at % 512] + b"junk" + raw[at + 512 - at % 512 + 4 :])
    with pytest.raises(
        DataError, match="sample 'p0000': text_clip_l.npy is not a int8 array of width 16"
    ):
        read_text(tmp_path / "latents", "clip_l")


@pytest.mark.parametrize("caption", [None, b"", b" \n"])
def test_text_encoders_without_captions_are_refused_before_encoding(
    tmp_path: Path, clip: str, caption: bytes | None
) -> None:
    tar = write_tar(
        tmp_path / "x.tar", [m for n in range(3) for m in tar_sample(n, txt=caption, json=None)]
    )
    with pytest.raises(
        DataError, match="none of the 3 images of source=.*x.tar has a caption .100 % lack one."
    ):
        encode_dataset(
            encode_config(tar, tmp_path / "latents", text={"clip_l": {"folder": clip}}),
            FakeAutoencoder(),
        )
    assert not (tmp_path / "latents").exists()
    encode_dataset(encode_config(tar, tmp_path / "latents"), FakeAutoencoder())


def test_a_remote_source_without_captions_is_never_published(tmp_path: Path, clip: str) -> None:
    """The captions of a remote source are not known before it is read."""
    tar = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in tar_sample(n, txt=None)])
    memory = fsspec.filesystem("memory")
    memory.pipe("/no_captions/x.tar", tar.read_bytes())
    config = encode_config(
        ["memory://no_captions/x.tar"], tmp_path / "latents", text={"clip_l": {"folder": clip}}
    )
    with pytest.raises(DataError, match="100 % lack one"):
        encode_dataset(config, FakeAutoencoder())
    assert not (tmp_path / "latents" / "index.json").exists()
