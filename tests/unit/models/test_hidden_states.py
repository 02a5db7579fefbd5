"""Hidden states of every denoiser are its blocks' outputs, under checkpointing, compilation and
each strategy; the prediction stays the same to the bit.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig, MMDiTConfig, UNetConfig
from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel.activation_checkpointing import prepare_blocks
from lpl_pretrain.parallel.build import make_strategy
from tests.support.ranks import run_ranks
from tests.support.training import ROOT, ZERO_CONFIGS

LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)
TEXT = TextShape(tokens=7, width=16, pooled_width=12)
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 16,
}
CONFIGS = {
    "dit": DiTConfig(width=32, depth=3, heads=2),
    "dit with text tokens": DiTConfig(width=32, depth=3, heads=2, text="in_context"),
    "mmdit": MMDiTConfig(width=32, depth=3, heads=2),
    "unet": UNetConfig(preset="ldm", settings=UNET),
}
LAST = {"dit": 2, "dit with text tokens": 2, "mmdit": 2, "unet": 4}
SHAPES = {
    "dit": [(2, 16, 32)] * 3,
    "dit with text tokens": [(2, 16, 32)] * 3,
    "mmdit": [(2, 16, 32)] * 3,
    "unet": [(2, 32, 4, 4), (2, 64, 4, 4), (2, 64, 4, 4), (2, 64, 8, 8), (2, 32, 8, 8)],
}
"""Outputs of all blocks for latents of 8x8; the image's 16 tokens alone of a transformer."""
PREPARED = {
    "plain": {},
    "checkpointed": {"activation_checkpointing": "blocks"},
    "selectively checkpointed": {"activation_checkpointing": "selective"},
    "compiled": {"compile": True, "activation_checkpointing": "blocks"},
}


def model_of(name, seed=1):
    config = CONFIGS[name]
    model = build_denoiser(config, LATENT, 3, text=TEXT if config.reads_text else None)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs():
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, TEXT.tokens, TEXT.width, generator=generator)
    pooled = torch.randn(2, TEXT.pooled_width, generator=generator)
    z_t = torch.randn(2, 4, 8, 8, generator=generator)
    return z_t, torch.tensor([0.2, 0.7]), Conditioning(torch.tensor([0, 3]), text, pooled)


def image_part(output, name):
    """Outputs that a forward hook on a block gets, without skip connections and text tokens."""
    tensor = output[0] if isinstance(output, tuple) else output
    return tensor[:, TEXT.tokens :] if name == "dit with text tokens" else tensor


def hooked_outputs(model, name):
    """Outputs of all blocks in one forward, as forward hooks see them."""
    outputs = {}
    handles = [
        model.get_submodule(block).register_forward_hook(
            lambda module, args, output, index=index: outputs.update({index: output})
        )
        for index, block in enumerate(model.sharded_blocks())
    ]
    model(*inputs())
    for handle in handles:
        handle.remove()
    return {index: image_part(output, name) for index, output in outputs.items()}


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_the_outputs_of_the_blocks(name, prepared, monkeypatch):
    torch._dynamo.reset()
    # traced by dynamo but not lowered: the U-Net takes minutes in inductor
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = model_of(name)
    parallel = ParallelConfig.model_validate(PREPARED[prepared])
    prepare_blocks(model, model.sharded_blocks(), parallel)
    without = model(*inputs())
    assert without.hidden == {}
    every_block = tuple(range(len(model.sharded_blocks())))
    output, hidden = model(*inputs(), every_block)
    assert torch.equal(output, without.output)
    wanted = hooked_outputs(model, name)
    assert list(hidden) == list(every_block) == list(wanted)
    assert [tuple(tensor.shape) for tensor in hidden.values()] == SHAPES[name]
    for index, tensor in hidden.items():
        assert torch.equal(tensor, wanted[index])
    (chosen,) = model(*inputs(), (1,)).hidden.items()
    assert chosen[0] == 1 and torch.equal(chosen[1], hidden[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_on_a_hidden_state_trains_the_blocks_before_it(name):
    """Gradients with checkpointing equal those without, and later blocks get none."""
    gradients = {}
    for prepared in ("plain", "checkpointed"):
        model = model_of(name)
        parallel = ParallelConfig.model_validate(PREPARED[prepared])
        prepare_blocks(model, model.sharded_blocks(), parallel)
        model(*inputs(), (1,)).hidden[1].square().mean().backward()
        gradients[prepared] = {
            key: parameter.grad
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    assert gradients["plain"].keys() == gradients["checkpointed"].keys()
    for key, gradient in gradients["plain"].items():
        torch.testing.assert_close(gradients["checkpointed"][key], gradient)
    blocks = model.sharded_blocks()
    assert any(key.startswith(blocks[1]) for key in gradients["plain"])
    assert not any(key.startswith(blocks[2]) for key in gradients["plain"])


@pytest.mark.parametrize("index", [-1, 5, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_index_out_of_range_is_an_error(name, index):
    count = LAST[name] + 1
    with pytest.raises(ValueError, match=f"the model has {count} blocks: use indices from 0 to"):
        model_of(name)(*inputs(), (0, index))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero0", "zero2", "zero3"])
def test_hidden_states_pass_through_every_strategy(strategy):
    """The values are those of the bare model, and a loss on them alone makes an update."""
    for rank in run_ranks(2, one_update, strategy):
        assert rank


def one_update(world, device, strategy):
    parallel = {"strategy": strategy, "precision": "fp32", "activation_checkpointing": "blocks"}
    if strategy in ZERO_CONFIGS:
        parallel |= {"strategy": "zero", "zero_config": str(ROOT / ZERO_CONFIGS[strategy])}
    for name in CONFIGS:
        wanted = model_of(name)(*inputs(), (0, 2))
        engine = make_strategy(ParallelConfig.model_validate(parallel), world, device)
        model = model_of(name)
        denoiser = engine.setup(
            model, model.sharded_blocks(), lambda p: torch.optim.AdamW(p.values(), fused=True)
        )
        got = denoiser(*inputs(), hidden_blocks=(0, 2))
        torch.testing.assert_close(got.output, wanted.output)
        assert list(got.hidden) == [0, 2]
        for index in (0, 2):
            torch.testing.assert_close(got.hidden[index], wanted.hidden[index])
        # the prediction's own loss keeps every parameter in the graph
        loss = got.hidden[0].square().mean() + got.output.square().mean()
        engine.backward(loss, microbatch=0, of=1)
        assert engine.step(lr=1e-2, max_grad_norm=1.0).applied
    return True
