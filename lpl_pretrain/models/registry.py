"""The models and autoencoder families that exist; their specs stand beside their code."""

from __future__ import annotations

from lpl_pretrain.models.autoencoder_specs import DC, KL, KL_FLUX2, TINY
from lpl_pretrain.models.dit_spec import DIT
from lpl_pretrain.models.mmdit_spec import MMDIT
from lpl_pretrain.models.spec import AutoencoderSpec, ModelSpec
from lpl_pretrain.models.unet_spec import UNET

MODELS: dict[str, ModelSpec] = {spec.kind: spec for spec in (DIT, MMDIT, UNET)}
"""Specs by `model.kind`."""

AUTOENCODERS: dict[str, AutoencoderSpec] = {spec.family: spec for spec in (KL, KL_FLUX2, TINY, DC)}
"""Specs by class in diffusers."""
