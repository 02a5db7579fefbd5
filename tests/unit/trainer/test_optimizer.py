"""Muon: the parameters it takes, its update of a matrix, and the cases in which it is refused."""

from __future__ import annotations

import pytest
import torch

from lpl_pretrain.config.check import optimizer_problems
from lpl_pretrain.config.schema import OptimizerConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.parallel.torch_optimizer import materialize_state
from lpl_pretrain.trainer.optimizer import make_optimizer
from tests.support.configs import TINY_MMDIT, dataset_index, train_config

MUON = OptimizerConfig(kind="muon", lr=0.01, weight_decay=0.1)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = build_denoiser(train_config().model, dataset_index().latent, 3)
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(MUON, parameters, model.sharded_blocks())
    materialize_state(optimizer)
    states = {name: set(optimizer.state[tensor]) for name, tensor in parameters.items()}
    muon = {name for name, state in states.items() if state == {"momentum_buffer"}}
    assert muon == {
        name for name in parameters if name.startswith("blocks.") and name.endswith(".weight")
    }
    assert all(
        states[name] == {"step", "exp_avg", "exp_avg_sq"} for name in parameters if name not in muon
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)


def test_an_update_is_nearly_orthogonal_and_of_adamws_size():
    """Singular values of Newton-Schulz's result lie around 1; its root mean square is 0.2 (arXiv
    2502.16982, equation 4).
    """
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(32, 64, dtype=torch.float64))
    before, optimizer = (
        matrix.detach().clone(),
        make_optimizer(
            MUON, {"block.weight": matrix, "bias": torch.nn.Parameter(torch.zeros(1))}, ["block"]
        ),
    )
    matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    update = (before * (1 - MUON.lr * MUON.weight_decay) - matrix.detach()) / MUON.lr
    assert 0.15 < update.square().mean().sqrt() < 0.25
    singular = torch.linalg.svdvals(update) / (0.2 * 64**0.5)
    assert singular.min() > 0.5 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(matrix.grad, full_matrices=False)
    assert (
        torch.nn.functional.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0)
        > 0.95
    )


def test_where_muon_cannot_work():
    zero = train_config(
        optimizer__kind="muon",
        parallel__strategy="zero",
        parallel__zero_config="x.json",
        parallel__precision="bf16",
    )
    assert "DeepSpeed hands an optimizer flat partitions" in optimizer_problems(zero)[0]
    offload = train_config(
        optimizer__kind="muon", parallel__strategy="fsdp2", parallel__cpu_offload=True
    )
    assert "parallel.cpu_offload=true" in optimizer_problems(offload)[0]
    assert not optimizer_problems(train_config(optimizer__kind="muon", model=TINY_MMDIT))
    with pytest.raises(ConfigError, match="the blocks of this model hold no matrices: use adamw"):
        make_optimizer(MUON, {"bias": torch.nn.Parameter(torch.zeros(3))}, ["blocks.0"])
