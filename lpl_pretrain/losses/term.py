"""Interface of a loss term.  Everything that adds to the training loss is one, the diffusion loss
included:

    total = sum over terms of  weight(step) * term(draws, out, meter).loss

The trainer sums the terms and knows none by name.  A new term is one file with a subclass of
`LossTerm` and a function that builds it, and one entry in losses/build.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lpl_pretrain.config.dataset import DatasetIndex
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.diffusion.objective import Denoising
from lpl_pretrain.diffusion.schedule import Schedule
from lpl_pretrain.losses.lpl.subset import LPLSubset
from lpl_pretrain.models.autoencoder import LatentScaling

if TYPE_CHECKING:
    from PIL.Image import Image


class Meter(Protocol):
    """Means that a term logs; values stay on the device until a log step."""

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Draws:
    """Random draws of one microbatch of B samples, each a function of (seed, purpose, sample
    index) alone.
    """

    sample_indices: list[int]
    """Global sample indices."""
    t: Tensor
    """(B,) float32 in [0, 1]; 0 is data, 1 is noise."""
    eps: Tensor
    """(B, C, H, W) float32 standard normal noise."""
    label_dropped: Tensor
    """(B,) bool: train on the null class."""
    posterior_noise: Tensor | None = None
    """(B, C, H, W) float32; None: z0 is the posterior's mean."""
    text_dropped: Tensor | None = None
    """(B,) bool: train on the null text; None: a model without text."""
    num_lpl: int = 0
    """The first `num_lpl` samples are those that LPL may count (losses/lpl/subset.py)."""
    crop_positions: Tensor | None = None
    """(K, 2) float64 in [0, 1) for the K samples that LPL decodes, where `lpl.crop` is set."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """A copy with `function` applied to every tensor."""
        return Draws(
            self.sample_indices,
            function(self.t),
            function(self.eps),
            function(self.label_dropped),
            None if self.posterior_noise is None else function(self.posterior_noise),
            None if self.text_dropped is None else function(self.text_dropped),
            self.num_lpl,
            None if self.crop_positions is None else function(self.crop_positions),
        )


@dataclass(frozen=True, slots=True)
class TermValue:
    """Value of a term on one microbatch."""

    loss: Tensor
    """() mean over the microbatch, unweighted, with its graph."""
    per_sample: Tensor
    """(B,) detached: names the sample whose loss is not finite."""


class LossTerm(ABC):
    """One summand of the training loss.

    All ranks call every method in the same order with the same arguments but for their own samples.
    A term never branches on the value of a tensor: that would make the host wait for the device.
    """

    name: str
    """Prefix of the term's metrics: `loss/{name}`."""
    needs_hidden: tuple[int, ...] = ()
    """Indices of the denoiser's blocks whose outputs the term reads from `out.hidden`."""
    subset: LPLSubset | None = None
    """Samples that the term wants first in every microbatch; at most one term of a run has one."""

    @abstractmethod
    def __call__(self, draws: Draws, out: Denoising, meter: Meter) -> TermValue:
        """Loss of one microbatch."""

    def active(self, step: int) -> bool:
        """Whether the term is computed at all in update number `step` (from 0)."""
        return True

    def weight(self, step: int) -> float:
        """Factor of the term in the total loss."""
        return 1.0

    def calibrating(self, step: int) -> bool:
        """Whether `calibrate` is to be called after update number `step`."""
        return False

    def calibrate(self, step: int, own: Tensor, others: Tensor) -> float | None:
        """Collective.  Measure the weight; return it at the step that settles it.

        `own` and `others`: () means over this rank's samples of this term's loss and of the other
        terms' weighted sum; both 0 where the update was skipped.
        """
        return None

    def state(self) -> dict[str, Any]:
        """State for checkpoints: JSON, the same on every rank; empty: there is none."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        assert not state, f"{self.name} has no state"

    def flops_per_update(self) -> float:
        """FLOPs of one update on one device, without those of the denoiser."""
        return 0.0

    def panels(self) -> Image | None:
        """Image of what the term compared last, for people; None: nothing to show.  Not
        collective.
        """
        return None


@dataclass(frozen=True, slots=True)
class TermContext:
    """Parts of a run that a term may be built from."""

    config: TrainConfig
    schedule: Schedule
    index: DatasetIndex
    scaling: LatentScaling
    """Between raw and normalised latents, on `device`."""
    device: torch.device
    microbatches_per_rank: int
    """Microbatches of an update on one rank (gradient accumulation)."""
    num_microbatches: int
    """Microbatches of an update over all ranks."""
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
    """Collective."""
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
    """Collective."""
