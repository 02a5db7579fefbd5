"""Records that describe one kind of denoiser or one family of autoencoders to the rest of the code.

A spec stands in a file beside the code that it describes and models/registry.py lists it; whatever
depends on the kind of a model is read from its spec.  Specs import heavy modules inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lpl_pretrain.config.autoencoder import AutoencoderInfo
from lpl_pretrain.config.base import Section
from lpl_pretrain.config.dataset import DatasetIndex, LatentEntry
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.diffusion.denoiser import Denoiser

if TYPE_CHECKING:
    from lpl_pretrain.models.decoder import DecoderStages

State = dict[str, Tensor]


@dataclass(frozen=True)
class DiffusersNetwork:
    """Network of a diffusers pipeline, ready to be written."""

    folder: str
    """Name of the network's part of the pipeline: `transformer` or `unet`."""
    settings: dict[str, Any]
    """Content of its config.json, without the class."""
    state: State
    pipeline: str
    """Class of the pipeline."""
    missing: tuple[str, ...] = ()
    """Parts of the pipeline that the folder does not hold; model_index.json has to name them."""
    index_entries: dict[str, Any] = field(default_factory=dict)
    """Further entries of model_index.json."""


@dataclass(frozen=True)
class DiffusersFormat:
    """Conversion of a denoiser from and to diffusers."""

    class_name: str
    """Class of the network in diffusers."""
    from_diffusers: Callable[[dict[str, Any], State], tuple[Any | None, State]]
    """config.json and weights -> (model section or None where it cannot be compared, our weights).
    Raises ConfigError or CheckpointError."""
    to_pipeline: Callable[[TrainConfig, DatasetIndex, State], DiffusersNetwork]
    """Raises ConfigError for options that diffusers does not have."""
    pipeline_problems: Callable[[TrainConfig, DatasetIndex], list[str]]
    """Messages for what the pipeline of this model cannot express."""
    shifts_latents: bool = False
    """Whether the pipeline applies the autoencoder's shift."""


@dataclass(frozen=True)
class ModelSpec:
    """One kind of denoiser."""

    config: type[Section]
    """Model section; its field `kind` names the kind."""
    build: Callable[[Any, LatentEntry, int, TextShape | None], Denoiser]
    """(section, latents, number of classes, text) -> network with fresh weights."""
    float8_skip: tuple[str, ...] = ()
    """Parts of the names of linear layers that fp8 leaves in bf16."""
    diffusers: DiffusersFormat | None = None

    @property
    def kind(self) -> str:
        return self.config.model_fields["kind"].default


def configured_scaling(network: Any, facts: AutoencoderInfo) -> tuple[float, float]:
    """(shift, scale) of config.json."""
    return facts.shift, 1.0 if facts.scale is None else float(facts.scale)


@dataclass(frozen=True)
class AutoencoderSpec:
    """One family of autoencoders, beside its entry in config/autoencoder.py's FAMILIES."""

    family: str
    """Class in diffusers."""
    decoder_stages: Callable[[Any], DecoderStages]
    """Cut the decoder of a network of this class into stages; the weights are shared."""
    shift_and_scale: Callable[[Any, AutoencoderInfo], tuple[float, float]] = configured_scaling
    """z0 = (raw - shift) * scale, from the network and its config.json."""
