"""Runs that begin with somebody's weights: another run's average, a published file, a diffusers
folder; and what does not fit.
"""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file

from lpl_pretrain.checkpoint.store import load_full
from lpl_pretrain.config.check import run_identity
from lpl_pretrain.config.init_from import InitConfig, initial_problems
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import CheckpointError, ConfigError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.convert_dit import to_diffusers
from lpl_pretrain.models.layers import sincos_position_embedding
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.assemble import assemble
from lpl_pretrain.trainer.init_from import load_init_from
from tests.support.checkpoints import edit
from tests.support.configs import dataset_index, train_config
from tests.support.latents import tiny_dataset
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
DIFFUSERS_MODEL = {"width": 32, "depth": 2, "heads": 2, "timestep_frequencies": "diffusers"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def config_of(data, **changes):
    return train_config(**{"data__folder": data[0], "autoencoder": data[1], **changes})


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run directory with one checkpoint, whose average is not its parameters."""
    folder = tmp_path_factory.mktemp("trained")
    run = assemble(config_of(data), RunDir(folder), World(), CPU)
    with torch.no_grad():
        for piece in run.strategy.local_params():
            piece.tensor.normal_(std=0.1)
        for _, piece in run.ema.local_averages():
            piece.tensor.normal_(std=0.1)
    run.checkpoints.save(6, run.strategy, run.ema, run.state(6), samples_seen=48)
    run.checkpoints.finish()
    return folder


def begins(world, device, data, folder, init, strategy):
    """Whole parameters and averages before the first step."""
    config = config_of(
        data,
        init_from=init,
        parallel={"strategy": strategy},
        lpl={"weight": 1.0, "gate": {"noise_level_below": 0.7}},
    )
    run = assemble(config, RunDir(folder), world, device)
    run.checkpoints.save(0, run.strategy, run.ema, {}, samples_seen=0)
    run.checkpoints.finish()
    return [load_full(run.run_dir.checkpoint(0), kind) for kind in ("param", "ema")]


@pytest.mark.parametrize(
    ("strategy", "weights"), [("ddp", "ema"), ("fsdp2", "ema"), ("fsdp2", "raw")]
)
def test_post_training_starts_from_the_weights_of_a_run(data, trained, tmp_path, strategy, weights):
    """Parameters and the new average; the old moments and steps are left behind."""
    found = run_ranks(
        2, begins, data, tmp_path, {"run": str(trained), "weights": weights}, strategy
    )[0]
    wanted = load_full(RunDir(trained).checkpoint(6), "param" if weights == "raw" else "ema")
    for state in found:
        assert state.keys() == wanted.keys() and all(
            torch.equal(state[name], tensor) for name, tensor in wanted.items()
        )


def test_a_resumed_run_does_not_load_init_from_again(data, trained, tmp_path):
    first = assemble(config_of(data), RunDir(tmp_path), World(), CPU)
    first.checkpoints.save(1, first.strategy, first.ema, first.state(1), samples_seen=8)
    first.checkpoints.finish()
    again = assemble(
        config_of(data, init_from={"run": str(trained)}), RunDir(tmp_path), World(), CPU
    )
    assert all(
        torch.equal(a.tensor, b.tensor)
        for a, b in zip(first.strategy.local_params(), again.strategy.local_params())
    )
    assert run_identity(config_of(data)) != run_identity(
        config_of(data, init_from={"run": str(trained)})
    )


def model_of(side=8, classes=2, **model):
    config = train_config(model={"width": 32, "depth": 2, "heads": 2, **model})
    index = dataset_index(side=side)
    return build_denoiser(config.model, index.latent, classes)


def random_state(model):
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def test_a_file_in_the_published_layout(tmp_path):
    model = model_of(learned_sigma=True)
    state = random_state(model)
    save_file(
        {"pos_embed": sincos_position_embedding(32, 4, 4), **state}, tmp_path / "dit.safetensors"
    )
    load_init_from(InitConfig(file=str(tmp_path / "dit.safetensors")), model)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_diffusers_folder(tmp_path):
    model = model_of(**DIFFUSERS_MODEL)
    state = random_state(model)
    settings, theirs = to_diffusers(state, model.config, channels=4, side=8, num_classes=2)
    network = DiTTransformer2DModel(**settings)
    network.load_state_dict(theirs, strict=False)
    for name, options in (("one", {}), ("several", {"max_shard_size": "20KB"})):
        network.save_pretrained(tmp_path / name, **options)
        fresh = model_of(**DIFFUSERS_MODEL)
        load_init_from(InitConfig(diffusers=str(tmp_path / name)), fresh)
        assert all(torch.equal(p, state[key]) for key, p in fresh.named_parameters())
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    with pytest.raises(
        ConfigError,
        match="has timestep_frequencies=diffusers, model.timestep_frequencies is dit: set it so",
    ):
        load_init_from(InitConfig(diffusers=str(tmp_path / "one")), model_of())
    SD3Transformer2DModel(num_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "sd3")
    with pytest.raises(ConfigError, match="model.kind is dit"):
        load_init_from(InitConfig(diffusers=str(tmp_path / "sd3")), model_of())


def test_other_classes_may_differ_by_name(tmp_path):
    """Everything but the class table comes along."""
    state = random_state(model_of(classes=5))
    save_file(state, tmp_path / "five.safetensors")
    init = InitConfig(file=str(tmp_path / "five.safetensors"))
    model = model_of(classes=2)
    words = (
        "1 parameters \\(likely another number of classes\\):\n  y_embedder.*\\(6, 32\\), "
        "wanted \\(3, 32\\)"
    )
    with pytest.raises(CheckpointError, match=words):
        load_init_from(init, model)
    before = model.y_embedder.embedding_table.weight.clone()
    load_init_from(init.model_copy(update={"allow_mismatch": ("y_embedder",)}), model)
    assert torch.equal(model.y_embedder.embedding_table.weight, before)
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "rename, words",
    [
        (lambda name: f"module.{name}", "all names begin with 'module'"),
        (
            lambda name: name.replace("blocks", "transformer_blocks"),
            "these are diffusers' names: use init_from.diffusers",
        ),
        (lambda name: name.replace("blocks", "layers"), "and 30 more.*"),
    ],
)
def test_the_likely_cause_of_strange_names(tmp_path, rename, words):
    save_file(
        {rename(name): tensor for name, tensor in random_state(model_of()).items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(CheckpointError, match="(?s)does not fit this model.*" + words) as caught:
        load_init_from(InitConfig(file=str(tmp_path / "x.safetensors")), model_of())
    assert str(caught.value).count("missing") + str(caught.value).count("not in this model") <= 10


def test_what_can_be_refused_without_torch(tmp_path, trained):
    (tmp_path / "DiT.pt").touch()
    folder = tmp_path / "transformer"
    folder.mkdir()
    cases = [
        ({"file": str(tmp_path / "DiT.pt")}, "pickles are never read here; convert it"),
        ({"file": str(tmp_path / "x.safetensors")}, "no such file"),
        ({"diffusers": str(folder)}, "has no config.json"),
        ({"run": str(tmp_path)}, "no complete checkpoint"),
        ({"run": str(trained), "step": 5}, "complete steps: 6"),
    ]
    for init, words in cases:
        (problem,) = initial_problems(InitConfig.model_validate(init))
        assert words in problem
    (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    (folder / "diffusion_pytorch_model.bin").touch()
    (problem,) = initial_problems(InitConfig(diffusers=str(folder)))
    assert (
        "has no diffusion_pytorch_model.safetensors, only diffusion_pytorch_model.bin: pickles are "
        "never read" in problem
    )
    assert initial_problems(None) == initial_problems(InitConfig(run=str(trained))) == []
    with pytest.raises(ValueError, match="set exactly one of run, file, diffusers"):
        InitConfig(run="x", file="y")
    with pytest.raises(ValueError, match="they say which of a run's weights"):
        InitConfig(file="y", weights="raw")


def begins_badly(world, device, data, folder, file):
    config = config_of(data, init_from={"file": file}, parallel={"strategy": "ddp"})
    with pytest.raises(CheckpointError) as caught:
        assemble(config, RunDir(folder), world, device)
    return str(caught.value)


def test_all_ranks_report_a_file_that_is_not_safetensors(data, tmp_path):
    """Rank 0 reads the file; the other ranks raise its error."""
    (tmp_path / "x.safetensors").write_bytes(b"PK not at all")
    messages = run_ranks(2, begins_badly, data, tmp_path, str(tmp_path / "x.safetensors"))
    assert (
        messages[0] == messages[1] and "x.safetensors: cannot be read as safetensors" in messages[0]
    )


def test_position_side_scales_positions_into_the_trained_range():
    """Every second position of an image of twice the side has the small image's embedding."""
    small, large = model_of(side=8), model_of(side=16, position_side=4)
    assert torch.equal(large.pos_embed.view(8, 8, 32)[::2, ::2], small.pos_embed.view(4, 4, 32))
    assert not torch.equal(
        model_of(side=16).pos_embed.view(8, 8, 32)[::2, ::2], small.pos_embed.view(4, 4, 32)
    )


def test_a_run_whose_newest_checkpoint_is_damaged(data, tmp_path, caplog, monkeypatch):
    """A damaged checkpoint is passed over with a warning when the newest one is wanted, and refused
    when its step is named.
    """
    monkeypatch.setattr(log, "propagate", True)
    run = assemble(config_of(data), RunDir(tmp_path), World(), CPU)
    for step in (6, 7):
        run.checkpoints.save(step, run.strategy, run.ema, run.state(step), samples_seen=8 * step)
    run.checkpoints.finish()
    edit(run.run_dir.checkpoint(7), "index.json", lambda index: index.pop("param") and None)
    model = build_denoiser(
        config_of(data).model, run.stream.index.latent, len(run.stream.index.classes), seed=99
    )
    load_init_from(InitConfig(run=str(tmp_path)), model)
    wanted = load_full(run.run_dir.checkpoint(6), "ema")
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())
    assert "DAMAGED CHECKPOINT step_00000007: passed over" in caplog.text
    with pytest.raises(
        CheckpointError, match="which index.json does not expect there: bring it back"
    ):
        load_init_from(InitConfig(run=str(tmp_path), step=7), model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = model_of()
    state = random_state(model)
    name = next(iter(state))
    state[name].view(-1)[0] = value
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError,
        match=f"init_from.file=.*x.safetensors: {name} is torch.float32, or holds NaN",
    ):
        load_init_from(InitConfig(file=str(tmp_path / "x.safetensors")), model)
    save_file({**state, name: state[name].nan_to_num().int()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is torch.int32"):
        load_init_from(InitConfig(file=str(tmp_path / "x.safetensors")), model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", "config.json: is empty"),
        ("[]", "is a None, wanted one of DiTTransformer2DModel"),
        ('{"_class_name": ["x"]}', "wanted one of DiTTransformer2DModel"),
        (
            '{"_class_name": "DiTTransformer2DModel"}',
            "init_from.diffusers=.*: wanted activation_fn",
        ),
        (
            '{"_class_name": "SD3Transformer2DModel", "num_layers": "x"}',
            "cannot be converted as a SD3Transformer2DModel",
        ),
    ],
)
def test_diffusers_settings_that_are_none(tmp_path, settings, words):
    (tmp_path / "config.json").write_text(settings)
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load_init_from(InitConfig(diffusers=str(tmp_path)), model_of())
