"""The MMDiT: zero at initialisation, every input matters, diffusers' SD3 gives the same outputs;
text that pads to one shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import SD3Transformer2DModel

from lpl_pretrain.config.dataset import LatentEntry, TextEntry
from lpl_pretrain.config.model import DiTConfig, MMDiTConfig, UNetConfig
from lpl_pretrain.config.text_layout import TextShape, text_problems, text_shape
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning, TextConditioner
from lpl_pretrain.models.convert_mmdit import from_diffusers, to_diffusers

LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)
TEXT = TextShape(tokens=7, width=20, pooled_width=12)
CONFIG = MMDiTConfig(width=48, depth=3, heads=3, qk_norm=True)
DIT, SD = DiTConfig(size="S"), UNetConfig(preset="sd")


def random_model(config=CONFIG, std=0.1):
    model = build_denoiser(config, LATENT, 0, text=TEXT)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def inputs(count=3):
    torch.manual_seed(1)
    labels = torch.zeros(count, dtype=torch.int64)
    cond = Conditioning(
        labels, torch.randn(count, TEXT.tokens, TEXT.width), torch.randn(count, TEXT.pooled_width)
    )
    return torch.randn(count, 4, 8, 8), torch.tensor([0.0, 0.3, 0.999])[:count], cond


def test_zero_at_initialisation_and_every_parameter_gets_a_gradient():
    assert not build_denoiser(CONFIG, LATENT, 0, text=TEXT)(*inputs()).output.any()
    model = random_model()
    model(*inputs()).output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_input_matters():
    model = random_model(std=0.2)
    z_t, t, cond = inputs(1)
    out = model(z_t, t, cond).output
    for other in (
        model(z_t + 1, t, cond),
        model(z_t, t + 0.1, cond),
        model(z_t, t, replace(cond, text=cond.text.flip(2))),
        model(z_t, t, replace(cond, pooled=cond.pooled + 1)),
    ):
        assert (out - other.output).abs().max() > 1e-3


def test_samples_do_not_see_each_other_and_shapes_may_differ():
    model = random_model()
    z_t, t, cond = inputs()
    rows = [
        Conditioning(*(x[i : i + 1] for x in (cond.labels, cond.text, cond.pooled)))
        for i in range(3)
    ]
    alone = [model(z_t[i : i + 1], t[i : i + 1], row).output for i, row in enumerate(rows)]
    together = model(z_t, t, cond).output
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert model(torch.randn(3, 4, 4, 16), t, cond).output.shape == (3, 4, 4, 16)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_diffusers_gives_the_same_output(qk_norm):
    config = CONFIG.model_copy(update={"qk_norm": qk_norm})
    model = random_model(config)
    settings, state = to_diffusers(model.state_dict(), config, channels=4, side=8, text=TEXT)
    theirs = SD3Transformer2DModel(**settings).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    z_t, t, cond = inputs()
    with torch.no_grad():
        got = theirs(
            z_t, encoder_hidden_states=cond.text, pooled_projections=cond.pooled, timestep=1000 * t
        ).sample
        torch.testing.assert_close(got, model(z_t, t, cond).output, rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError):
            other = model(z_t, t, replace(cond, text=cond.text.flip(2))).output
            torch.testing.assert_close(got, other, rtol=1e-3, atol=1e-3)


def test_the_round_trip_is_bit_equal():
    wanted = random_model().state_dict()
    config, ours = from_diffusers(*to_diffusers(wanted, CONFIG, channels=4, side=8, text=TEXT))
    assert config == CONFIG and ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def test_a_variant_that_ours_is_not():
    settings, state = to_diffusers(
        random_model().state_dict(), CONFIG, channels=4, side=8, text=TEXT
    )
    with pytest.raises(ConfigError, match="dual_attention_layers.*wanted no dual attention"):
        from_diffusers({**settings, "dual_attention_layers": (0, 1)}, state)


@pytest.mark.parametrize(("size", "billions"), [("2B", 2.03), ("8B", 7.9)])
def test_sizes(size, billions):
    """SD3's: 2 B at depth 24, 8 B at depth 38, with 16 channels and its three text encoders."""
    with torch.device("meta"):
        model = build_denoiser(
            MMDiTConfig(size=size),
            LATENT.model_copy(update={"channels": 16}),
            0,
            text=TextShape(154, 4096, 2048),
        )
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.03)


def entry(width, max_tokens, pooled=None):
    return TextEntry(
        identity="0" * 64, width=width, max_tokens=max_tokens, pooled_width=pooled, storage="fp16"
    )


ENTRIES = {"l": entry(3, 5, 2), "g": entry(4, 4, 3), "t5": entry(9, 6)}


@dataclass
class Stored:
    states: torch.Tensor
    pooled: torch.Tensor | None = None


def stored(lengths, name):
    """States of `lengths` tokens, each filled with its caption's number."""
    width, pooled = ENTRIES[name].width, ENTRIES[name].pooled_width
    states = torch.zeros(len(lengths), max(lengths), width, dtype=torch.float16)
    for i, length in enumerate(lengths):
        states[i, :length] = 1 + i
    return Stored(
        states,
        None if pooled is None else torch.full((len(lengths), pooled), 10.0 + len(name)).half(),
    )


def conditioner():
    empty = {name: {"tokens": torch.full((2, e.width), -1.0)} for name, e in ENTRIES.items()}
    for name in ("l", "g"):
        empty[name]["pooled"] = torch.full((ENTRIES[name].pooled_width,), -2.0)
    return TextConditioner((("l", "g"), "t5"), ENTRIES, empty)


def test_encoders_are_joined_along_channels_and_tokens():
    """Layout of SD3: CLIPs along the channels, padded to T5's width, T5 after them; pooled vectors
    concatenated.
    """
    shape = text_shape((("l", "g"), "t5"), ENTRIES)
    assert shape == TextShape(tokens=5 + 6, width=9, pooled_width=5)
    batch = {name: stored([3, 2], name) for name in ENTRIES}
    text, pooled = conditioner()(batch, torch.tensor([False, True]))
    assert (
        text.shape == (2, 11, 9)
        and pooled.tolist() == [[11, 11, 11, 11, 11], [-2] * 5]
        and text.dtype == torch.float32
    )
    first, second = text
    assert (
        first[:3, :7].eq(1).all()
        and not first[3:5].any()
        and not first[:5, 7:].any()
        and first[5:8].eq(1).all()
    )
    assert (
        second[:2, :7].eq(-1).all()
        and not second[2:5].any()
        and second[5:7].eq(-1).all()
        and not second[7:].any()
    )
    null_text, vector = conditioner().null(1, torch.device("cpu"))
    assert torch.equal(null_text[0], second) and torch.equal(vector[0], pooled[1])


def test_the_shape_does_not_depend_on_the_batch():
    """Longer captions elsewhere in the batch change nothing: ranks would differ otherwise."""
    short, long = ({name: stored(lengths, name) for name in ENTRIES} for lengths in ([2], [2, 4]))
    a, _ = conditioner()(short, torch.tensor([False]))
    b, _ = conditioner()(long, torch.tensor([False, False]))
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize(
    "layout, model, words",
    [
        ((), CONFIG, "model.kind=mmdit reads text; name encoders of data: \\['g', 'l', 't5'\\]"),
        (("l",), DIT, "this model reads no text"),
        (("l", ("g", "l")), CONFIG, "an encoder is named twice"),
        (("t5",), CONFIG, "none of them has a pooled vector"),
        (("l",), CONFIG, None),
        ((), DIT, None),
        (("t5",), SD, None),
    ],
)
def test_what_does_not_fit(layout, model, words):
    problems = text_problems(layout, ENTRIES, "data", model=model)
    assert not problems if words is None else len(problems) == 1
    if words is not None:
        with pytest.raises(ConfigError, match=words):
            raise ConfigError(problems[0])
