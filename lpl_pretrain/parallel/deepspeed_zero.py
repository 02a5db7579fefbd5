"""ZeRO stages 1, 2 and 3: DeepSpeed's engine behind the strategy door, and the only file that
imports deepspeed.

The engine is told one micro-batch, one accumulation step and no clipping; accumulation, clipping
and learning rate are set here at each call.  Checkpoints do not go through the engine: pieces are
views of its float32 partitions.  Where those lie is not public, so versions that were not read are
refused, and `setup` checks every piece against its parameter.

Stage 0 shards nothing.  There the engine averages gradients and no more: its own updates count
Adam's steps one too high in bf16.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.schema import ParallelConfig, StrategyKind
from lpl_pretrain.config.zero import zero_settings
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.ddp import ReplicatedStrategy
from lpl_pretrain.parallel.precision import AutocastWrapper, recipe
from lpl_pretrain.parallel.strategy import MakeOptimizer, Piece, Strategy, UpdateCheck
from lpl_pretrain.parallel.torch_optimizer import STEP, materialize_state, set_steps
from lpl_pretrain.runtime.world import World

VERSION, REMEDY = "0.19.", "pip install 'deepspeed>=0.19.8,<0.20'"
ENGINE = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    # DeepSpeed's own CPU Adam is compiled on the spot, for minutes
    "zero_force_ds_cpu_optimizer": False,
}


class ZeroStage0Strategy(ReplicatedStrategy):
    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        super().__init__(config, world, device)
        self.recipe = recipe(StrategyKind.DDP, config.precision)

    def _wrap(self, door: AutocastWrapper, model: nn.Module, blocks: list[str]) -> nn.Module:
        never_steps = torch.optim.SGD(
            model.parameters(), lr=0.0
        )  # an engine without an optimizer refuses to run backward
        self._engine = _make_engine(self.config, door, never_steps, self.world, ENGINE)
        return self._engine

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_scale.value, scale_wrt_gas=False)


class ZeroStrategy(Strategy):
    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        super().__init__(config, world, device)
        self._stage = zero_stage(config)

    def _shard(
        self,
        door: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        self._parameters = dict(model.named_parameters())
        initial = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._optimizer = make_optimizer(self._parameters)
        plain = nn.functional.linear
        engine = _make_engine(
            self.config, door, self._optimizer, self.world, {**ENGINE, **self._narrow()}
        )
        self._linear = ScopedLinearPatch(plain, to_model=not self.config.compile)
        door.register_forward_pre_hook(lambda *_: self._linear.__enter__())
        door.register_forward_hook(lambda *_: self._linear.__exit__(), always_call=True)
        self._engine, self._zero = engine, engine.optimizer
        self._with_partitions(materialize_state)
        self._start_from(initial)
        return engine

    def _narrow(self) -> dict[str, Any]:
        """What tells the engine of bf16 or fp16; the scale of fp16 is ours, handed over before
        every backward.
        """
        if self.recipe.working is None:
            return {}
        sums = {"data_types": {"grad_accum_dtype": "fp32"}}
        if self.recipe.working is torch.bfloat16:
            return {**sums, "bf16": {"enabled": True, "check_grad_overflow": True}}
        return {**sums, "fp16": {"enabled": True, "loss_scale": 1.0}}

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.loss_scale.dynamic:
            self._zero.loss_scale = self.loss_scale.value
        self._engine.set_gradient_accumulation_boundary(last)
        with self._linear:  # what activation checkpointing runs again
            self._engine.backward(loss, scale_wrt_gas=False)

    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        check: UpdateCheck | None,
    ) -> tuple[float, bool]:
        """The engine computes the norm before its update, on all ranks alike, and skips the update
        when it is not finite.
        """
        self._zero.clip_grad = max_grad_norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = self._checked_step(check)
        if self._engine.was_step_applied():
            return float(self._engine.get_global_grad_norm()) if norm is None else norm, True
        if getattr(
            self._zero, "cpu_offload", False
        ):  # stages 1 and 2 would add the next gradient to the refused one
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        return math.nan if norm is None else norm, False

    def _checked_step(self, check: UpdateCheck | None) -> float | None:
        """The engine's step; the norm before clipping, if `check` was asked.

        A norm that `check` does not accept is given to the engine as infinite: it skips the update.
        """
        if check is None:
            self._engine.step()
            return None
        from deepspeed.runtime.utils import combine_grad_norm_groups

        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        compute, asked = getattr(self._zero, name), []

        def checked() -> Any:
            found = compute()
            norm = combine_grad_norm_groups(found) if self._stage == 3 else found
            own, mean, sums = self._read(norm, check)
            agreed = mean / self.loss_scale.value
            if math.isfinite(agreed):
                asked.append(own / self.loss_scale.value)
                if check.accept(agreed, sums):
                    return found
            infinite = torch.full_like(norm, torch.inf)
            return [infinite] if self._stage == 3 else infinite

        setattr(self._zero, name, checked)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)  # the method of its class is there again
        return asked[0] if asked else None

    def local_params(self) -> Iterator[Piece]:
        for name, parameter in self._parameters.items():
            yield from self._piece(name, parameter, None)

    def local_optimizer_state(self) -> Iterator[tuple[str, Piece]]:
        for name, parameter in self._parameters.items():
            for key in self._state_names(parameter):
                for piece in self._piece(name, parameter, key):
                    yield key, piece

    @torch.no_grad()
    def accept_loaded(self, optimizer_steps: int) -> None:
        self._refresh_working_copies()
        self._with_partitions(set_steps, optimizer_steps)
        self.optimizer_steps = optimizer_steps

    def _piece(self, name: str, parameter: nn.Parameter, key: str | None) -> Iterator[Piece]:
        """The range that this rank owns, of the float32 partition or of a moment beside it."""
        located = self._locate(parameter)
        if located is not None:
            flat, offset, start, numel = located
            source = flat.detach() if key is None else self._optimizer.state[flat][key]
            yield Piece(name, self.shapes[name], start, source.narrow(0, offset, numel))

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat float32 partition, offset in it, start in the parameter, elements), or None if this
        rank owns nothing of it.
        """
        if self._stage == 3:
            group, offset, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(self.world.rank * padded, parameter.ds_numel)
            numel = min(padded, parameter.ds_numel - start)
            return (
                (self._zero.fp32_partitioned_groups_flat[group], offset, start, numel)
                if numel
                else None
            )
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        return (
            flat,
            mapping.hp_fragment_address.start,
            mapping.lp_fragment_address.start,
            mapping.lp_fragment_address.numel,
        )

    def _state_names(self, parameter: nn.Parameter) -> list[str]:
        located = self._locate(parameter)
        return (
            []
            if located is None
            else [key for key in self._optimizer.state[located[0]] if key != STEP]
        )

    def _with_partitions(self, action: Any, *args: Any) -> None:
        """`action(torch optimizer, *args)` while its groups hold the flat partitions; stage 3 lends
        them only during a step.
        """
        if self._stage == 3:
            self._zero._set_fp32_optimizer_param_groups()
        action(self._optimizer, *args)
        if self._stage == 3:
            self._zero._clear_fp32_optimizer_param_groups()

    @torch.no_grad()
    def _start_from(self, initial: dict[str, Tensor]) -> None:
        """Give the masters their float32 start, which the engine has rounded to bf16; and prove
        that pieces lie where we think.
        """
        for piece in self.local_params():
            wanted = (
                initial[piece.name].view(-1)[piece.start : piece.stop].to(piece.tensor.device)
            )  # the host's, if offloaded
            rounded = wanted.to(self.recipe.working or wanted.dtype).to(wanted.dtype)
            if not torch.equal(piece.tensor, rounded):
                raise ConfigError(
                    f"{_source(self.config)}: elements {piece.start}..{piece.stop} of {piece.name} "
                    "are not where "
                    f"DeepSpeed {VERSION}x keeps them: remove unusual keys from the JSON, or use "
                    "another strategy"
                )
            piece.tensor.copy_(wanted)
        self._refresh_working_copies()

    def _refresh_working_copies(self) -> None:
        """Communicates: the weights that forward reads follow the float32 partitions."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for sub_group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero._post_step(set())


class ScopedLinearPatch:
    """Stage 3 replaces `torch.nn.functional.linear` in the whole process, by one that does not hold
    on to gathered weights.

    Here that lasts while the model runs: other networks, such as LPL's decoder, keep torch's, and
    so do compiled blocks.  Compiled for a GPU by torch 2.11, DeepSpeed's gave input gradients that
    were a third off (docs/log.md).
    """

    def __init__(self, plain: Callable[..., Tensor], *, to_model: bool) -> None:
        """Takes what the engine has put in the place of `plain`, and puts `plain` back."""
        self._plain, self._theirs = plain, nn.functional.linear if to_model else plain
        nn.functional.linear = plain

    def __enter__(self) -> None:
        nn.functional.linear = self._theirs

    def __exit__(self, *error: object) -> None:
        nn.functional.linear = self._plain


def zero_stage(config: ParallelConfig) -> int:
    """ZeRO stage of a `zero` strategy.  Raises ConfigError."""
    return zero_settings(config)["zero_optimization"]["stage"]


def _source(config: ParallelConfig) -> str:
    """Where the engine's tuning comes from, for error messages."""
    return config.zero_config or f"parallel.strategy={config.strategy.value}"


def _make_engine(
    config: ParallelConfig,
    door: AutocastWrapper,
    optimizer: torch.optim.Optimizer,
    world: World,
    ours: dict[str, Any],
) -> Any:
    settings = {**zero_settings(config), **ours}
    deepspeed = _import_deepspeed(config)
    world.to_environment()
    try:
        return deepspeed.initialize(model=door, optimizer=optimizer, config=settings)[0]
    except (
        ValueError,
        AssertionError,
        deepspeed.DeepSpeedConfigError,
    ) as error:  # such as fp16 on a device without
        raise ConfigError(f"{_source(config)}: DeepSpeed refuses it: {error}") from error


def _import_deepspeed(config: ParallelConfig) -> Any:
    """Quietly, and without the shared-memory collective that it would compile for a minute on CPU,
    or die without a compiler.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel.strategy={config.strategy.value}: deepspeed is not installed: {REMEDY}"
        ) from error
    if not deepspeed.__version__.startswith(VERSION):
        raise ConfigError(
            f"parallel.strategy={config.strategy.value}: deepspeed {deepspeed.__version__} is "
            f"installed, wanted {VERSION}x, "
            f"whose memory layout is known: {REMEDY}"
        )
    # left alone, its first reader asks a compiler about every operator
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\..* is deprecated", FutureWarning
    )  # what deepspeed calls, every step
    return deepspeed
