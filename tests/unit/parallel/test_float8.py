"""Float8 linear layers: parameter names stay the same, gradients are close to bf16's, and
unsupported devices and sizes are refused.
"""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel import strategy as strategy_module
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.float8 import convert_linear_layers
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.optimizer import SGD
from tests.support.ranks import run_ranks
from tests.support.tiny_denoiser import BLOCKS, tiny_denoiser

CPU = torch.device("cpu")
LATENT = LatentEntry(channels=4, height=8, width=8, mean=[0.0] * 4, std=[1.0] * 4)


def model_of() -> torch.nn.Module:
    model = build_denoiser(
        DiTConfig(width=64, depth=2, heads=4, patch_size=2), LATENT, num_classes=3
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(
    world: World, device: torch.device, strategy: str, precision: str
) -> dict[str, torch.Tensor]:
    """Gradients on this rank's ranges after one backward; float8 products are emulated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            strategy_module,
            "use_float8",
            lambda model, blocks, device: (
                convert_linear_layers(model, blocks, emulate=True) or None
            ),
        )
        config = ParallelConfig(strategy=strategy, precision=precision)
        engine = make_strategy(config, world, device)
        model = model_of()
        denoiser = engine.setup(model, model.sharded_blocks(), lambda p: SGD(p.values(), 1.0, 0.0))
        before = {owned.name: owned.tensor.clone() for owned in engine.local_params()}
        generator = torch.Generator().manual_seed(0)
        z_t, t = torch.randn(8, 4, 8, 8, generator=generator), torch.rand(8, generator=generator)
        output = denoiser(z_t, t, Conditioning(torch.arange(8) % 3)).output
        engine.backward(output.float().square().mean(), microbatch=0, of=1)
        assert engine.step(lr=1.0, max_grad_norm=1e9).applied
        return {owned.name: before[owned.name] - owned.tensor for owned in engine.local_params()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_gradients_are_close_and_master_weights_are_float32(strategy: str) -> None:
    wanted = run_ranks(2, gradients, strategy, "fp32")[0]
    bf16 = run_ranks(2, gradients, strategy, "bf16")[0]
    float8 = run_ranks(2, gradients, strategy, "fp8")[0]
    assert float8.keys() == wanted.keys() and all(
        tensor.dtype is torch.float32 for tensor in float8.values()
    )
    error = {
        name: (float8[name] - wanted[name]).norm() / wanted[name].norm()
        for name in wanted
        if "blocks" in name
    }
    error_bf16 = {name: (bf16[name] - wanted[name]).norm() / wanted[name].norm() for name in error}
    assert max(error.values()) < 0.3
    assert sum(error.values()) > 2 * sum(error_bf16.values()), "nothing was rounded to 8 bits"


def test_only_layers_of_the_blocks_are_converted() -> None:
    model = model_of()
    names = [name for name, _ in model.named_parameters()]
    assert convert_linear_layers(model, model.sharded_blocks(), emulate=True) == sum(
        isinstance(layer, torch.nn.Linear) and "modulation" not in name
        for block in model.sharded_blocks()
        for name, layer in model.get_submodule(block).named_modules()
    )
    assert [name for name, _ in model.named_parameters()] == names
    outside = [
        name
        for name, layer in model.named_modules()
        if "Float8" in type(layer).__name__ and "blocks" not in name
    ]
    assert not outside


def test_sizes_that_16_does_not_divide_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="no linear layer of the blocks has both sides a multiple of 16: choose such a "
        "model.width",
    ):
        convert_linear_layers(tiny_denoiser(), BLOCKS, emulate=True)


def test_a_device_without_float8_is_refused() -> None:
    strategy = make_strategy(ParallelConfig(precision="fp8"), World(), CPU)
    with pytest.raises(ConfigError, match="fp8.*compute capability 8.9.*this is cpu: use bf16"):
        strategy.setup(model_of(), ["blocks.0"], lambda p: torch.optim.SGD(p.values(), lr=1.0))
