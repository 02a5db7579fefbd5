"""Text encoders: states of the true tokens, the same whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.text import load_text_encoder
from tests.support.text_encoders import minilm, text_encoder_folder

CAPTIONS = ["a red cat", "", "a picture of a blue square dog and a round cat", "dog"]
LENGTHS = [5, 2, 13, 3]


def load(folder: str, **options: object):
    return load_text_encoder(
        TextEncoderConfig.model_validate({"folder": folder} | options), "text.x"
    )


@pytest.fixture(scope="module", params=["clip", "t5", "bert"])
def family(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return request.param, text_encoder_folder(tmp_path_factory.mktemp(request.param), request.param)


def test_true_lengths_and_no_trace_of_padding(family) -> None:
    _, folder = family
    encoder = load(folder)
    together = encoder.encode(CAPTIONS)
    assert [states.shape for states, _ in together] == [
        (length, 16) for length in LENGTHS
    ] and encoder.width == 16
    for caption, (states, pooled) in zip(CAPTIONS, together, strict=True):
        (alone, _), *_ = encoder.encode([caption])
        torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-6)
        assert pooled is None


def test_has_teeth_padding_that_is_attended_to_would_be_seen(family) -> None:
    name, folder = family
    encoder = load(folder)
    (alone, _), *_ = encoder.encode(CAPTIONS[:1])
    whole = encoder.tokenizer
    encoder.tokenizer = lambda *args, **kwargs: _attend_to_everything(whole(*args, **kwargs))
    difference = (encoder.encode(CAPTIONS)[0][0][:5] - alone).abs().max()
    assert (
        difference < 1e-5 if name == "clip" else difference > 1e-3
    )  # CLIP's attention is causal: nothing behind reaches it


def _attend_to_everything(tokens):
    tokens["attention_mask"] = torch.ones_like(tokens["attention_mask"])
    return tokens


def test_long_captions_are_cut(family) -> None:
    _, folder = family
    assert [len(states) for states, _ in load(folder, max_tokens=4).encode(CAPTIONS)] == [
        4,
        2,
        4,
        3,
    ]


def test_layers(family) -> None:
    _, folder = family
    last, before, embedding = (
        load(folder, layer=layer).encode(["a cat"])[0][0] for layer in (-1, -2, 0)
    )
    assert (
        last.shape == before.shape == embedding.shape
        and not torch.equal(last, before)
        and not torch.equal(before, embedding)
    )
    with pytest.raises(ConfigError, match="text.x.layer=-4: the encoder has 2 layers: use -3 to 2"):
        load(folder, layer=-4)


def test_pooled(family) -> None:
    name, folder = family
    if name == "t5":
        with pytest.raises(
            ConfigError, match="T5EncoderModel has no pooled output: set pooled=false"
        ):
            load(folder, pooled=True)
        return
    encoder = load(folder, pooled=True)
    assert encoder.pooled_width == {"clip": 12, "bert": 16}[name]
    assert all(
        pooled is not None and pooled.shape == (encoder.pooled_width,)
        for _, pooled in encoder.encode(CAPTIONS)
    )


def test_identity_is_of_weights_and_vocabulary(family, tmp_path) -> None:
    name, folder = family
    again = text_encoder_folder(tmp_path / "again", name)
    assert load(again).identity == load(folder).identity
    (tmp_path / "again" / "tokenizer.json").write_text(
        (tmp_path / "again" / "tokenizer.json").read_text().replace("cat", "cow")
    )
    assert load(text_encoder_folder(tmp_path / "third", name)).identity == load(folder).identity


def test_folders_that_are_no_text_encoder(tmp_path) -> None:
    with pytest.raises(ConfigError, match="text.x.folder=.*config.json not found"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="text.x.folder=.*transformers cannot load it"):
        load(str(tmp_path))


def test_a_real_one_offline() -> None:
    """all-MiniLM-L6-v2: captions that mean the same are nearer than those that do not."""
    encoder = load(str(minilm()))
    assert encoder.width == 384
    states = encoder.encode(
        ["a cat sits on a mat", "a kitten is lying on a rug", "the stock market fell sharply today"]
    )
    a, b, c = (torch.nn.functional.normalize(s.mean(dim=0), dim=0) for s, _ in states)
    assert a @ b > 0.4 > a @ c
