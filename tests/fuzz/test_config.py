"""Any bytes, structure, override or value for a configuration: a short ConfigError in our words, or
exactly what was written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lpl_pretrain.config.autoencoder import read_autoencoder
from lpl_pretrain.config.base import Section
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.encode import EncodeConfig, TextEncoderConfig
from lpl_pretrain.config.load import load_config, validate
from lpl_pretrain.config.online_text import text_entry
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.errors import LPLError
from lpl_pretrain.models.build import build_denoiser, check_denoiser_runs
from lpl_pretrain.models.conditioning import Conditioning
from tests.support.config_errors import check_error_message, leaves, load_or_check_error
from tests.support.configs import TINY_MMDIT, TINY_SDXL, dataset_index, train_config
from tests.support.fuzz import cases

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CLASSES: dict[str, type[Section]] = {
    "train": TrainConfig,
    "encode": EncodeConfig,
    "evaluate": EvaluateConfig,
    "cluster": ClusterProfile,
}
SHIPPED = [path for kind in CLASSES for path in sorted((CONFIGS / kind).glob("*.yaml"))]
FIELDS = [
    (kind, path)
    for kind, cls in CLASSES.items()
    for path in dict.fromkeys(path for path, _, _ in leaves(cls))
]
TINY = """
name: tiny
steps: 10
autoencoder: asset:autoencoder_emoji
data: {folder: data/x}
model: {width: 32, depth: 2, heads: 2}
diffusion: {prediction: flow, schedule: rectified_flow}
batch: {global_batch_size: 8}
"""
BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "",
            "~",
            "1e-4",
            "2024-13-45",
            "1:30",
            "010",
            "yes",
            "a\nb",
            "../x",
            "x" * 300,
            "\x85",
            "ä",
            "😀",
            "=",
        ]
    )
    | st.sampled_from([10**30, 2**63, -(2**63), 1e300, float("inf"), float("nan"), 0.5, 1.0])
)
keys = st.text(max_size=8) | st.sampled_from(["kind", "size"])
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["kind", "size"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder():
    path = Path(tempfile.mkdtemp())
    (path / "tiny.yaml").write_text(TINY)
    yield path
    shutil.rmtree(path)


@cases(100)
@given(
    shipped=st.sampled_from(SHIPPED),
    cut=st.floats(0, 1),
    inserted=st.binary(max_size=12),
    skipped=st.integers(0, 30),
)
def test_a_damaged_file(folder, shipped, cut, inserted, skipped):
    content = shipped.read_bytes()
    at = int(cut * len(content))
    path = folder / "damaged.yaml"
    path.write_bytes(content[:at] + inserted + content[at + skipped :])
    load_or_check_error(CLASSES[shipped.parent.name], path)


SYNTAX = [
    "a",
    "b",
    "name",
    "steps",
    "base",
    ":",
    ": ",
    "- ",
    "? ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "\n  ",
    "\t",
    "&x ",
    "*x",
]
SYNTAX += [
    "<<",
    "<<: *x",
    "'",
    '"',
    "|",
    ">-",
    "#",
    " #",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "=",
    "\x00",
    "\x85",
    "\ufeff",
    "é",
]
SYNTAX += ["!!int ", "!!python/name:os.system ", "!!set ", "!!binary ", "! ", "\\ud83d", '"\\0"']
SYNTAX += ["1", "1e5", ".inf", "010", "0x", "0b_", "1_", "null", "2024-01-01", "12:30"]
tokens = st.sampled_from(SYNTAX)


@cases(100)
@given(
    text=st.lists(tokens, max_size=25)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "surrogatepass"))
)
@example(text=b"\xff\xfen\x00")
@example(text=b"name: \xe9")
@example(text=b"steps: !!int foo")
@example(text=b"[" * 20_000)
@example(text=b"name: " + b"9" * 5000)
@example(text=b"a: 1\na: 2")
@example(text=BOMB.encode())
@example(text=b"a: &a [*a]")
@example(text=b"x: &x {<<: *x}")
@example(text=b"base: 3")
@example(text=b"base: [x]")
@example(text=b"base: ''")
@example(text=b"base: '~nobody-of-this-name/x'")
@example(text=b"base: ./././file.yaml")
@example(text=b"\n".join(b"k%d: 1" % i for i in range(1000)))
@example(text=b"'" + b"k" * 100_000 + b"': 1")
@example(text=b'"a\\nb\\u2028": 1')
@example(text=b"# " + b"c" * 300_000)
def test_any_text(folder, text):
    path = folder / "file.yaml"
    path.write_bytes(text)
    load_or_check_error(ClusterProfile, path)


@cases(180)
@given(field=st.sampled_from(FIELDS), value=values)
@example(field=("train", "steps"), value=True)
@example(field=("train", "optimizer.lr"), value=float("inf"))
@example(field=("train", "name"), value="2024-13-45")
@example(field=("train", "model.size"), value=[1])
@example(field=("train", "model.settings"), value={"block_out_channels": 3})
@example(field=("train", "data.folder"), value={f"f{i}": "x" for i in range(100)})
@example(field=("train", "lpl.depth_weights"), value=["x"] * 1000)
@example(field=("train", "conditioning.text_encoders"), value=[[["x"]]])
@example(field=("train", "lpl.outliers.kernels"), value=[[2, 2]] * 500)
def test_any_value_of_any_field(folder, field, value):
    """Beside a complete configuration, so that most problems are those of the value."""
    kind, key = field
    raw: Any = (
        {}
        if kind == "cluster"
        else yaml.safe_load(sorted((CONFIGS / kind).glob("emoji*.yaml"))[0].read_text())
    )
    section, parts = raw, key.split(".")
    for part in parts[:-1]:
        section[part] = section[part] if isinstance(section.get(part), dict) else {}
        section = section[part]
    section[parts[-1]] = value
    path = folder / "field.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = load_or_check_error(CLASSES[kind], path)
    if config is not None and isinstance(value, bool | str) and key != "lpl.preset":
        found: Any = config.model_dump(mode="json")
        for part in parts:
            found = found.get(part) if isinstance(found, dict) else None
        assert found == (
            float(value)
            if isinstance(found, int | float) and not isinstance(found, bool)
            else value
        )


override_keys = st.lists(
    st.sampled_from(
        [
            "a",
            "",
            "lpl",
            "gate",
            "data",
            "folder",
            "model",
            "kind",
            "steps",
            "name",
            "x\ny",
            "\udcff",
            "é",
            "base",
        ]
    ),
    min_size=1,
    max_size=5,
).map(".".join)


@cases(120)
@given(key=override_keys, text=st.text(max_size=20) | st.lists(tokens, max_size=8).map("".join))
@example(key="a..b", text="1")
@example(key=".", text="1")
@example(key="", text="1")
@example(key=".".join("a" * 2000), text="1")
@example(key="name.x", text="1")
@example(key="data.folder.y", text="1")
@example(key="steps", text="9" * 5000)
@example(key="steps", text="[" * 5000)
@example(key="name", text="'")
@example(key="name", text='"a\\ud800"')
def test_any_override(folder, key, text):
    load_or_check_error(TrainConfig, folder / "tiny.yaml", [f"{key}={text}"])


@cases(80)
@given(text=st.text(max_size=30))
@example(text="run #2")
@example(text="a: b")
@example(text="1e-4")
@example(text="2024-01-01")
@example(text="*a")
@example(text="!!int 5")
@example(text="a\x85b\u2028\n")
@example(text="😀")
def test_an_override_is_the_text_that_was_typed(folder, text):
    """Text that looks like no other value is read unchanged, and always as a JSON string."""
    for spelt in (text, json.dumps(text)):
        config = load_or_check_error(TrainConfig, folder / "tiny.yaml", [f"name={spelt}"])
        assert config is None or config.name == (
            json.loads(spelt) if spelt[:1] == '"' else text.strip("'") if text[:1] == "'" else text
        )


SETTINGS = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 16],
    "upsampling_scaling_factor": 2,
    "num_decoder_blocks": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_block_out_channels": [1, 1],
    "scaling_factor": 0.18,
    "model_type": "clip",
    "architectures": ["CLIPTextModel"],
    "text_config": {"hidden_size": 8, "projection_dim": 4},
    "hidden_size": 8,
}
FAMILIES = ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2"]


@cases(100)
@given(
    family=st.sampled_from(FAMILIES),
    key=st.sampled_from(sorted(SETTINGS)),
    value=values,
    cut=st.integers(0, 400),
)
@example(family="AutoencoderKL", key="latent_channels", value="4", cut=400)
@example(family="AutoencoderTiny", key="upsampling_scaling_factor", value=10**19, cut=400)
@example(family="AutoencoderKL", key="up_block_types", value=["UpDecoderBlock2D"] * 10_000, cut=400)
@example(family="AutoencoderKL", key="_class_name", value=["x"], cut=400)
@example(family="AutoencoderKL", key="scaling_factor", value=float("nan"), cut=400)
@example(family="AutoencoderKL", key="text_config", value=3, cut=400)
def test_any_config_json_of_a_network(folder, family, key, value, cut):
    content = json.dumps({**SETTINGS, "_class_name": family, key: value})
    (folder / "config.json").write_text(content[: cut if cut < 100 else None])
    for read in (
        lambda: read_autoencoder("x", folder),
        lambda: text_entry(TextEncoderConfig(folder=str(folder), pooled=True), "text.x"),
    ):
        try:
            read()
        except LPLError as error:
            check_error_message(error)


sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 30, 32, 36, 48])
transformers = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["dit", "mmdit"]),
        "width": sizes,
        "depth": st.integers(0, 3),
        "heads": st.sampled_from([1, 2, 3, 4, 8]),
    },
    optional={
        "patch_size": st.sampled_from([1, 2, 4]),
        "mlp_ratio": st.sampled_from([1e-6, 0.03, 0.1, 1.0, 2.7, 4.0]),
        "qk_norm": st.booleans(),
        "position_side": st.integers(1, 20),
    },
)
dit_options = st.fixed_dictionaries(
    {},
    optional={
        "rope": st.booleans(),
        "swiglu": st.booleans(),
        "rms_norm": st.booleans(),
        "text": st.sampled_from([None, "in_context", "cross_attention"]),
        "learned_sigma": st.booleans(),
        "timestep_frequencies": st.sampled_from(["dit", "diffusers"]),
    },
)
MIDDLE = [None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "x"]
DOWN = [
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "AttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "nonsense",
]
UP = ["UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "KUpBlock2D"]
of_levels = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3) | st.sampled_from([1, 2])
heads_of_levels = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=2) | st.sampled_from(
    [1, 2, 3, 8]
)
unet_settings = st.fixed_dictionaries(
    {},
    optional={
        "block_out_channels": st.sampled_from([[16, 32], [16, 24], [32, 20], [8], "x"]),
        "down_block_types": st.lists(st.sampled_from(DOWN), min_size=2, max_size=2),
        "up_block_types": st.lists(st.sampled_from(UP), min_size=2, max_size=2),
        "mid_block_type": st.sampled_from(
            [
                None,
                "UNetMidBlock2D",
                "UNetMidBlock2DCrossAttn",
                "UNetMidBlock2DSimpleCrossAttn",
                "x",
            ]
        ),
        "layers_per_block": of_levels,
        "transformer_layers_per_block": of_levels,
        "attention_head_dim": heads_of_levels,
        "num_attention_heads": heads_of_levels,
        "norm_num_groups": st.sampled_from([1, 4, 8, 5]),
        "cross_attention_dim": st.sampled_from([8, [8, 8]]),
        "act_fn": st.sampled_from(["silu", "nonsense"]),
        "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift", "ada_group"]),
        "conv_in_kernel": st.sampled_from([1, 2, 3, 5]),
        "addition_embed_type": st.sampled_from(["text", "text_time", None]),
        "time_embedding_type": st.sampled_from(["positional", "fourier"]),
        "time_embedding_dim": st.sampled_from([7, 16]),
        "class_embed_type": st.just("timestep"),
        "freq_shift": st.sampled_from([0, 1, 5]),
        "only_cross_attention": st.booleans(),
    },
)
unets = st.builds(
    lambda preset, settings: {
        "kind": "unet",
        "preset": preset,
        "settings": {**TINY_SDXL["settings"], **settings},
    },
    st.sampled_from(["ldm", "sd", "sdxl"]),
    unet_settings,
)
dits = st.builds(
    lambda shape, options: {**shape, **options} if shape["kind"] == "dit" else shape,
    transformers,
    dit_options,
)
TEXT = TextShape(tokens=3, width=8, pooled_width=4)


@cases(50)
@given(
    model=st.sampled_from([dits, dits, dits, unets]).flatmap(lambda kind: kind),
    side=st.sampled_from([4, 8]),
)
@example(model={"kind": "dit", "width": 30, "depth": 1, "heads": 2}, side=8)
@example(
    model={"kind": "dit", "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 0.03, "swiglu": True},
    side=8,
)
@example(model=TINY_MMDIT, side=8)
@example(model=TINY_SDXL, side=8)
@example(
    model={"kind": "unet", "preset": "ldm", "settings": {"block_out_channels": [30, 32]}}, side=8
)
@example(model={"kind": "unet", "preset": "ldm", "settings": {"layers_per_block": "2"}}, side=8)
def test_every_accepted_model_runs(model, side):
    """A model that the rules and the run on meta tensors accept has a forward on a device, and a
    loss with gradients.
    """
    raw = {**train_config().model_dump(mode="json"), "model": model}
    index = dataset_index(side=side)
    try:
        section = validate(TrainConfig, raw, "x.yaml").model
        assume(side % section.latent_multiple == 0)  # config/check.py refuses it
        text = TEXT if section.reads_text else None
        check_denoiser_runs(section, index, text)
    except LPLError as error:
        check_error_message(error)
        return
    denoiser = build_denoiser(section, index.latent, len(index.classes), text=text)
    cond = Conditioning(torch.zeros(1, dtype=torch.int64))
    if text is not None:
        states, pooled = torch.zeros(1, text.tokens, text.width), torch.zeros(1, text.pooled_width)
        cond = Conditioning(cond.labels, states, pooled, torch.ones(1, 6, dtype=torch.int64))
    z_t = torch.zeros(1, index.latent.channels, side, side)
    loss = denoiser(z_t, torch.zeros(1), cond).output.square().mean()
    loss.backward()
    assert loss.isfinite()


def test_a_base_chain_ends(folder):
    """A cycle that is spelt differently at every turn, and a chain that is too long."""
    (folder / "one.yaml").write_text("base: ./two.yaml")
    (folder / "two.yaml").write_text(f"base: ../{folder.name}/one.yaml")
    assert load_or_check_error(TrainConfig, folder / "one.yaml") is None
    for i in range(40):
        (folder / f"chain{i}.yaml").write_text(f"base: chain{i + 1}.yaml")
    assert load_or_check_error(TrainConfig, folder / "chain0.yaml") is None
    with pytest.raises(LPLError, match="comes back to itself"):
        load_config(TrainConfig, folder / "one.yaml")
