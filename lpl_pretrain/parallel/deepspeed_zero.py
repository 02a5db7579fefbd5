"""ZeRO stages 0 to 3 with DeepSpeed's engine.

The engine is configured for one micro-batch, one accumulation step and no clipping; accumulation,
clipping and learning rate are set here at each call.  Checkpoints do not go through the engine:
`local_params` returns views of its float32 partitions.  Where these are is not public, so untested
versions are refused, and `setup` compares every range with its parameter.

Stage 0 shards nothing.  There the engine only averages gradients: its own updates count one step
too many for Adam in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lpl_pretrain.config.schema import ParallelConfig, StrategyKind
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.parallel.ddp import ReplicatedStrategy
from lpl_pretrain.parallel.deepspeed_engine import (
    ENGINE_SETTINGS,
    VERSION,
    ScopedLinearPatch,
    make_engine,
    settings_source,
    zero_stage,
)
from lpl_pretrain.parallel.precision import AutocastWrapper, precision_policy
from lpl_pretrain.parallel.strategy import MakeOptimizer, ParamRange, Strategy, Update, UpdateCheck
from lpl_pretrain.parallel.torch_optimizer import STEP, materialize_state, set_steps
from lpl_pretrain.runtime.world import World


class ZeroStage0Strategy(ReplicatedStrategy):
    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        super().__init__(config, world, device)
        self.precision = precision_policy(StrategyKind.DDP, config.precision)

    def _wrap(
        self, autocast_model: AutocastWrapper, model: nn.Module, blocks: list[str]
    ) -> nn.Module:
        # An engine without an optimizer refuses to run backward; this one never steps.
        unused_optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self._engine = make_engine(
            self.config, autocast_model, unused_optimizer, self.world, ENGINE_SETTINGS
        )
        return self._engine

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_scale.factor, scale_wrt_gas=False)


@dataclass(frozen=True)
class _Verdict:
    norm: float
    """Norm of this rank, before clipping."""
    accepted: bool


class ZeroStrategy(Strategy):
    """ZeRO stages 1, 2 and 3."""

    def __init__(self, config: ParallelConfig, world: World, device: torch.device) -> None:
        super().__init__(config, world, device)
        self._stage = zero_stage(config)

    def _shard(
        self,
        autocast_model: AutocastWrapper,
        model: nn.Module,
        blocks: list[str],
        make_optimizer: MakeOptimizer,
    ) -> nn.Module:
        self._parameters = dict(model.named_parameters())
        initial = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._optimizer = make_optimizer(self._parameters)
        original_linear = nn.functional.linear
        settings = {**ENGINE_SETTINGS, **self._dtype_settings()}
        self._engine = make_engine(
            self.config, autocast_model, self._optimizer, self.world, settings
        )
        self._linear_patch = ScopedLinearPatch(original_linear, active=not self.config.compile)
        autocast_model.register_forward_pre_hook(lambda *_: self._linear_patch.__enter__())
        autocast_model.register_forward_hook(
            lambda *_: self._linear_patch.__exit__(), always_call=True
        )
        self._zero_optimizer = self._engine.optimizer
        self._call_with_partitions(materialize_state)
        self._restore_float32_weights(initial)
        return self._engine

    def _dtype_settings(self) -> dict[str, Any]:
        """Engine settings for bf16 or fp16.

        The engine's own fp16 scale is fixed at 1: `_backward` passes it `loss_scale`.
        """
        if self.precision.working is None:
            return {}
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
        if self.precision.working is torch.bfloat16:
            return {**accumulation, "bf16": {"enabled": True, "check_grad_overflow": True}}
        return {**accumulation, "fp16": {"enabled": True, "loss_scale": 1.0}}

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.loss_scale.dynamic:
            self._zero_optimizer.loss_scale = self.loss_scale.value
        self._engine.set_gradient_accumulation_boundary(last)
        with self._linear_patch:  # activation checkpointing runs forward again
            self._engine.backward(loss, scale_wrt_gas=False)

    def _update(
        self,
        lr: float,
        max_grad_norm: float,
        refuse: Tensor | None,
        check: UpdateCheck | None,
    ) -> Update:
        """Lets the engine update.  It computes the norm before its update, the same on all ranks,
        and skips the update when the norm is not finite.

        The host waits for the device: the engine reads the norm.
        """
        self._zero_optimizer.clip_grad = max_grad_norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        verdict = self._checked_step(refuse, check)
        applied = bool(self._engine.was_step_applied())
        norm: Tensor | float = math.nan
        if verdict is not None:
            norm = verdict.norm
        elif applied:
            norm = self._engine.get_global_grad_norm()
        if not applied and getattr(self._zero_optimizer, "cpu_offload", False):
            # Stages 1 and 2 would add the next gradient to the skipped one.
            self._zero_optimizer.averaged_gradients = dict.fromkeys(
                self._zero_optimizer.averaged_gradients
            )
        return Update(
            torch.as_tensor(norm, dtype=torch.float64, device=self.device),
            torch.tensor(applied, device=self.device),
            rejected=verdict is not None and not verdict.accepted,
        )

    def _checked_step(self, refuse: Tensor | None, check: UpdateCheck | None) -> _Verdict | None:
        """Runs the engine's step; returns what `check` said, if it was asked.

        A norm that `check` does not accept, or whose update is refused, is passed to the engine as
        infinite, so that it skips the update.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        method = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        if not hasattr(self._zero_optimizer, method):
            self._plain_step(check)
            return None
        compute: Callable[[], Any] = getattr(self._zero_optimizer, method)
        verdicts: list[_Verdict] = []

        def compute_and_check() -> Any:
            computed = compute()
            norm = combine_grad_norm_groups(computed) if self._stage == 3 else computed
            refused = torch.zeros((), dtype=torch.bool) if refuse is None else refuse
            if check is not None and (verdict := self._ask(norm, check)) is not None:
                verdicts.append(verdict)
                refused = refused | (not verdict.accepted)
            refused = refused.to(norm.device)
            if self._stage == 3:
                return [torch.where(refused, torch.inf, group) for group in computed]
            return torch.where(refused, torch.inf, norm)

        setattr(self._zero_optimizer, method, compute_and_check)
        try:
            self._engine.step()
        finally:
            delattr(self._zero_optimizer, method)  # uncovers the method of its class
        return verdicts[0] if verdicts else None

    def _plain_step(self, check: UpdateCheck | None) -> None:
        """Runs the engine's step where nothing can be put between its norm and its update: stage 1
        in bf16 (BF16_Optimizer).  `refuse` has no effect there: a run that must stop makes further
        updates until its next log step, and saves none of them.  Raises ConfigError.
        """
        if check is not None:
            raise ConfigError(
                "optimizer.on_spike: DeepSpeed's stage 1 in bf16 does not show the gradient norm "
                "before its update: use zero2, another precision, or on_spike=ignore"
            )
        self._engine.step()

    def _ask(self, norm: Tensor, check: UpdateCheck) -> _Verdict | None:
        """Collective.  What `check` says of a finite norm; None for one that is not."""
        own, mean, sums = self._reduce_norm(norm, check)
        agreed_norm = mean / self.loss_scale.value
        if not math.isfinite(agreed_norm):
            return None
        return _Verdict(own / self.loss_scale.value, check.accept(agreed_norm, sums))

    def local_params(self) -> Iterator[ParamRange]:
        for name, parameter in self._parameters.items():
            yield from self._owned_range(name, parameter, None)

    def local_optimizer_state(self) -> Iterator[tuple[str, ParamRange]]:
        for name, parameter in self._parameters.items():
            for key in self._state_names(parameter):
                for param_range in self._owned_range(name, parameter, key):
                    yield key, param_range

    @torch.no_grad()
    def sync_after_load(self, optimizer_steps: int) -> None:
        self._refresh_working_copies()
        self._call_with_partitions(set_steps, optimizer_steps)
        self._optimizer_steps.fill_(optimizer_steps)

    def _owned_range(
        self, name: str, parameter: nn.Parameter, key: str | None
    ) -> Iterator[ParamRange]:
        """Yields this rank's range of the float32 parameter, or of its moment `key`; nothing if the
        rank owns no element.
        """
        located = self._locate(parameter)
        if located is not None:
            partition, offset, start, numel = located
            source = partition.detach() if key is None else self._optimizer.state[partition][key]
            yield ParamRange(name, self.shapes[name], start, source.narrow(0, offset, numel))

    def _locate(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """(flat float32 partition, offset in it, start in the parameter, number of elements), or
        None if this rank owns nothing of the parameter.
        """
        if self._stage == 3:
            return self._locate_stage3(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        partition = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        offset = mapping.hp_fragment_address.start
        fragment = mapping.lp_fragment_address
        return partition, offset, fragment.start, fragment.numel

    def _locate_stage3(self, parameter: Any) -> tuple[Tensor, int, int, int] | None:
        """`_locate` for stage 3: every rank has an equal, padded part of each parameter."""
        zero = self._zero_optimizer
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = min(self.world.rank * padded, parameter.ds_numel)
        numel = min(padded, parameter.ds_numel - start)
        if not numel:
            return None
        return zero.fp32_partitioned_groups_flat[group], offset, start, numel

    def _state_names(self, parameter: nn.Parameter) -> list[str]:
        located = self._locate(parameter)
        if located is None:
            return []
        partition = located[0]
        return [key for key in self._optimizer.state[partition] if key != STEP]

    def _call_with_partitions(self, action: Callable[..., None], *args: Any) -> None:
        """Calls `action(torch optimizer, *args)` while the optimizer's groups hold the flat
        partitions; in stage 3 they do so only during a step.
        """
        if self._stage == 3:
            self._zero_optimizer._set_fp32_optimizer_param_groups()
        action(self._optimizer, *args)
        if self._stage == 3:
            self._zero_optimizer._clear_fp32_optimizer_param_groups()

    @torch.no_grad()
    def _restore_float32_weights(self, initial: dict[str, Tensor]) -> None:
        """Collective.  Sets the master weights to `initial`, which the engine has rounded to bf16.

        Raises ConfigError if a range does not hold the rounded values of its parameter, which means
        that DeepSpeed's memory layout is not the expected one.
        """
        for param_range in self.local_params():
            start, stop = param_range.start, param_range.stop
            wanted = initial[param_range.name].view(-1)[start:stop]
            wanted = wanted.to(param_range.tensor.device)  # the host, if offloaded
            rounded = wanted.to(self.precision.working or wanted.dtype).to(wanted.dtype)
            if not torch.equal(param_range.tensor, rounded):
                raise ConfigError(
                    f"{settings_source(self.config)}: elements {start}..{stop} of "
                    f"{param_range.name} are not where DeepSpeed {VERSION}x keeps them: remove "
                    "unusual keys from the JSON, or use another strategy"
                )
            param_range.tensor.copy_(wanted)
        self._refresh_working_copies()

    def _refresh_working_copies(self) -> None:
        """Collective.  Updates the weights that forward reads from the float32 partitions."""
        zero = self._zero_optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero._post_step(set())
