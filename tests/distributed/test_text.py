"""Text-conditioned DiT, MMDiT and SDXL with LPL equal one process under every strategy."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from lpl_pretrain.config.check import check_run
from lpl_pretrain.config.data_mixture import read_data
from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.config.online_text import text_entry
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.evaluation.captions import Captions, Prompts
from lpl_pretrain.models.dit import DiT
from lpl_pretrain.models.mmdit import MMDiT
from lpl_pretrain.models.text import OnlineText, load_text_encoder
from lpl_pretrain.runtime.timer import Clock
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.metrics import Meter
from tests.support.configs import TINY_MMDIT, TINY_SDXL, train_config
from tests.support.latents import captioned_dataset
from tests.support.ranks import run_ranks
from tests.support.text_encoders import text_encoder_folder
from tests.support.training import ROOT, ZERO_CONFIGS, join_ranks
from tests.support.updates import batches_of

CPU = torch.device("cpu")
STEPS, LAYOUT = 2, ["clip", "t5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return captioned_dataset(tmp_path_factory.mktemp("captioned"))


MODELS = {
    "dit in context": {
        "kind": "dit",
        "width": 32,
        "depth": 2,
        "heads": 2,
        "rope": True,
        "text": "in_context",
    },
    "dit across": {"kind": "dit", "width": 32, "depth": 2, "heads": 2, "text": "cross_attention"},
    "mmdit": TINY_MMDIT,
    "sdxl": TINY_SDXL,
}


def config_of(
    data, strategy="local", precision="fp64", micro_batch_size=8, model="mmdit", **changes
):
    parallel = {"precision": precision, "strategy": strategy}
    if strategy in ZERO_CONFIGS:
        parallel |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    settings = {
        "data__folder": data[0],
        "autoencoder": data[1],
        "model": MODELS[model],
        "conditioning": {"text_encoders": LAYOUT, "text_dropout": 0.3},
        "optimizer": {"kind": "sgd", "lr": 0.05, "max_grad_norm": 1e9},
        "parallel": parallel,
        "batch": {"global_batch_size": 8, "micro_batch_size": micro_batch_size},
        "lpl": {
            "weight": 3.0,
            "gate": {"noise_level_below": 0.7},
            "decoder_precision": "fp64" if precision == "fp64" else "fp32",
        },
    }
    return train_config(**{**settings, **changes})


def random_parameters(model):
    """Initialise away from zero: zero-initialised gates hide the text in the first steps."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def train(world, device, data, model, strategy, precision, micro_batch_size, drops_captions=False):
    with pytest.MonkeyPatch.context() as patch:
        for kind in (DiT, MMDiT):
            patch.setattr(kind, "_initialise", random_parameters)
        run = assemble(
            config_of(data, strategy, precision, micro_batch_size, model),
            RunDir(Path("never")),
            world,
            device,
        )
    meter, norms = Meter(device), []
    for step in range(STEPS):
        batches = batches_of(run, step)
        if drops_captions:
            for batch in batches:
                batch.latents.text["clip"].states.zero_()
        result = run.updater.update(step, batches, meter, Clock(device))
        norms.append(result.grad_norm.item())
    pieces = {
        "param": [
            (p.name, list(p.shape), p.start, p.tensor.clone()) for p in run.strategy.local_params()
        ]
    }
    return {"pieces": pieces, "norms": norms, "loss": meter.flush()["loss/total"]}


@pytest.fixture(scope="module")
def reference(data):
    """Function that trains a model in one process, once for each precision."""

    @cache
    def train_once(model, precision="fp64"):
        return train(World(), CPU, data, model, "local", precision, 8)

    return train_once


def assert_same(results, wanted, **tolerance):
    got, expected = join_ranks(results), join_ranks([wanted])
    for kind in ("param", "norms"):
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(got[kind][name].double(), tensor.double(), **tolerance)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_equals_one_process(data, reference, strategy, model):
    """Captions of different lengths on different ranks, some of them dropped."""
    precision = "fp32" if strategy.startswith("zero") else "fp64"
    tolerance = (
        {"rtol": 2e-5, "atol": 2e-6} if precision == "fp32" else {"rtol": 1e-11, "atol": 1e-13}
    )
    results = run_ranks(2, train, data, model, strategy, precision, 2)
    assert_same(results, reference(model, precision), **tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_has_teeth_captions_matter(data, reference, model):
    results = run_ranks(2, train, data, model, "ddp", "fp64", 2, True)
    with pytest.raises(AssertionError):
        assert_same(results, reference(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_bf16_is_near(data, reference, strategy, model):
    results = run_ranks(2, train, data, model, strategy, "bf16", 2)
    wanted = join_ranks([reference(model)])["norms"]["norms"]
    torch.testing.assert_close(join_ranks(results)["norms"]["norms"], wanted, rtol=5e-2, atol=0)


def test_captions_are_a_function_of_seed_and_sample_index(data):
    captions = Captions(config_of(data), CPU)
    texts, states, pooled = captions.draw(0, [3, 1, 2])
    again, single, vector = captions.draw(0, [1])
    assert (
        texts[1:2] == again
        and torch.equal(states[1:2], single)
        and torch.equal(pooled[1:2], vector)
    )
    assert (
        len(set(captions.draw(0, range(30))[0])) > 3
        and captions.draw(1, range(30))[0] != captions.draw(0, range(30))[0]
    )
    assert states.shape == (3, 9 + 8, 16) and pooled.shape == (3, 12)


def online_config(data, names=("t5",), **changes):
    """Configuration that computes the embeddings of `names` during training.

    The encoders lie beside the autoencoder of `data` (tests/support/latents.py).
    """
    folder = Path(data[1]).parent
    known = {
        "clip": {"folder": str(folder / "clip"), "pooled": True, "max_tokens": 9},
        "t5": {"folder": str(folder / "t5"), "max_tokens": 8},
    }
    conditioning = {
        "text_encoders": LAYOUT,
        "text_dropout": 0.3,
        "online_encoders": {name: known[name] for name in names},
    }
    return config_of(data, conditioning=conditioning, **changes)


def train_online(world, device, data, names, change_text=None):
    """Train with online text encoders; `change_text` may replace their output."""
    config = online_config(data, names, strategy="ddp", micro_batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMDiT, "_initialise", random_parameters)
        if change_text:
            patch.setattr(
                OnlineText, "__call__", lambda self, captions: change_text(self, captions)
            )
        run = assemble(config, RunDir(Path("never")), world, device)
        meter, norms = Meter(device), []
        for step in range(STEPS):
            result = run.updater.update(step, batches_of(run, step), meter, Clock(device))
            norms.append(result.grad_norm.item())
    return {"norms": norms, "loss": meter.flush()["loss/total"]}


@pytest.mark.parametrize("names", [("t5",), ("clip", "t5")])
def test_online_encoders_equal_stored_embeddings(data, reference, names):
    """Tolerances: t5 is stored in fp16, clip in int8; padding to a batch changes the last bits."""
    got, wanted = run_ranks(2, train_online, data, names)[0], reference("mmdit")
    tolerance = 1e-4 if names == ("t5",) else 1e-2
    assert got["norms"] == pytest.approx(wanted["norms"], rel=tolerance) and got[
        "loss"
    ] == pytest.approx(wanted["loss"], rel=tolerance)


def test_has_teeth_captions_in_another_order(data, reference):
    real = OnlineText.__call__
    (got,) = run_ranks(
        1, train_online, data, ("t5",), lambda self, captions: real(self, captions[::-1])
    )
    assert got["norms"] != pytest.approx(reference("mmdit")["norms"], rel=1e-4)


def test_user_prompts(data):
    """Prompts are encoded by the online encoders, or by those given for stored embeddings."""
    texts = ("a cat", "a red dog and a cat")
    folder = Path(data[1]).parent
    _, states, pooled = Captions(online_config(data, ("clip", "t5")), CPU, Prompts(texts, {})).draw(
        0, [0, 1, 2]
    )
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    folders = {name: str(folder / name) for name in LAYOUT}
    captions, same, vectors = Captions(config_of(data), CPU, Prompts(texts, folders)).draw(
        1, [0, 1, 2]
    )
    assert (
        captions == [*texts, texts[0]]
        and torch.equal(same, states)
        and torch.equal(vectors, pooled)
    )
    with pytest.raises(
        ConfigError,
        match="reads embeddings by 't5': name the encoder's folder, --text-encoder t5=FOLDER",
    ):
        Captions(config_of(data), CPU, Prompts(texts, {"clip": folders["clip"]}))
    with pytest.raises(
        ConfigError,
        match=r"--text-encoder t5=.*clip: is .*, the data's embeddings are by .*: "
        "name the folder of that encoder",
    ):
        Captions(config_of(data), CPU, Prompts(texts, {**folders, "t5": folders["clip"]}))


@pytest.mark.parametrize(
    ("family", "pooled"),
    [("clip", False), ("clip", True), ("t5", False), ("bert", False), ("bert", True)],
)
def test_shapes_and_identity_of_an_encoder_are_read_without_loading_it(tmp_path, family, pooled):
    config = TextEncoderConfig(folder=text_encoder_folder(tmp_path, family), pooled=pooled)
    entry, encoder = text_entry(config, "x"), load_text_encoder(config, "x")
    assert (entry.width, entry.pooled_width, entry.identity) == (
        encoder.width,
        encoder.pooled_width,
        encoder.identity,
    )


def test_unused_online_encoders_are_refused(data):
    index = read_data(data[0]).merged
    config = online_config(data, ("clip", "t5"))
    check_run(config, index, 1)
    silent = index.model_copy(update={"captions": 0, "text": {}})
    with pytest.raises(
        ConfigError, match="conditioning.online_encoders: .* holds no captions to encode"
    ):
        check_run(config, silent, 1)
    idle = config.model_copy(
        update={"conditioning": config.conditioning.model_copy(update={"text_encoders": ("clip",)})}
    )
    with pytest.raises(
        ConfigError,
        match="conditioning.online_encoders.t5: not named in "
        r"conditioning.text_encoders=\['clip'\]",
    ):
        check_run(idle, index, 1)


def test_missing_text_is_refused(data):
    index = read_data(data[0]).merged
    for conditioning, message in (
        ({}, "model.kind=mmdit reads text; name encoders of .*\\['clip', 't5'\\]"),
        ({"text_encoders": ["bert"]}, "has no embeddings by 'bert', it has \\['clip', 't5'\\]"),
        ({"text_encoders": ["t5"]}, "none of them has a pooled vector"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_run(config_of(data, conditioning=conditioning), index, 1)


def test_the_index_lists_stored_encoders(data):
    stored = json.loads((Path(data[0]) / "index.json").read_text())["text"]
    assert {name: entry["max_tokens"] for name, entry in stored.items()} == {"clip": 9, "t5": 8}
