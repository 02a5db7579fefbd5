"""`materialize_state` creates moments before the first update and changes nothing else."""

import pytest
import torch

from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.build import make_strategy
from lpl_pretrain.parallel.torch_optimizer import materialize_state, set_steps
from lpl_pretrain.runtime.world import World
from tests.support.tiny_denoiser import tiny_denoiser

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "make, moments",
    [
        (
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
            {"step", "exp_avg", "exp_avg_sq"},
        ),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5), {"momentum_buffer"}),
    ],
)
def test_updates_after_materialize_state_are_the_same(make, moments):
    def trained(materialize: bool) -> list[torch.Tensor]:
        model = tiny_denoiser().double()
        optimizer = make(list(model.parameters()))
        if materialize:
            before = [p.detach().clone() for p in model.parameters()]
            materialize_state(optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert all(
                state.keys() - {"momentum_buffer"} | moments == moments
                for state in optimizer.state.values()
            )
            assert all(
                not value.any()
                for state in optimizer.state.values()
                for value in state.values()
                if value is not None
            )
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.sin(
                    torch.arange(parameter.numel(), dtype=torch.float64)
                ).view_as(parameter)
            optimizer.step()
        return list(model.parameters())

    assert all(
        torch.equal(got, wanted) for got, wanted in zip(trained(True), trained(False), strict=True)
    )


def test_step_counts_are_set():
    model = tiny_denoiser()
    optimizer = torch.optim.AdamW(model.parameters())
    materialize_state(optimizer)
    set_steps(optimizer, 7)
    assert {state["step"].item() for state in optimizer.state.values()} == {7}


def test_frozen_parameters_are_refused_by_name():
    model = tiny_denoiser()
    model.embed.weight.requires_grad_(False)
    strategy = make_strategy(ParallelConfig(), World(), CPU)
    with pytest.raises(
        ConfigError,
        match="1 parameters do not require gradients.*embed.weight.*register fixed tensors "
        "as buffers",
    ):
        strategy.setup(model, [], lambda p: torch.optim.SGD(p.values(), lr=1.0))
