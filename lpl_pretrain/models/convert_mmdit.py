"""Convert MMDiT weights to and from diffusers' `SD3Transformer2DModel`.

diffusers splits queries, keys and values, and has scale before shift where a modulation has two
parts only (the last text stream and the output).  Its position embedding is fixed; ours is that of
a grid no larger than the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.model import MMDiTConfig
from lpl_pretrain.config.text_layout import TextShape
from lpl_pretrain.errors import ConfigError

State = dict[str, Tensor]
SUFFIXES = ("weight", "bias")
OUTER_KEYS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embedder.0": "time_text_embed.text_embedder.linear_1",
    "pooled_embedder.2": "time_text_embed.text_embedder.linear_2",
    "text_embedder": "context_embedder",
    "final_linear": "proj_out",
}
QKV = {"image": ("to_q", "to_k", "to_v"), "text": ("add_q_proj", "add_k_proj", "add_v_proj")}
NORMS = {"image": ("norm_q", "norm_k"), "text": ("norm_added_q", "norm_added_k")}
STREAM = {
    "image": {"proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
    "text": {
        "proj": "attn.to_add_out",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
MODULATION = {"image": "norm1.linear", "text": "norm1_context.linear"}


def to_diffusers(
    state: State, config: MMDiTConfig, *, channels: int, side: int, text: TextShape
) -> tuple[dict[str, Any], State]:
    """(config, state) of an SD3Transformer2DModel with the same outputs for square latents."""
    settings = {
        "sample_size": side,
        "patch_size": config.patch_size,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": text.width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": text.pooled_width,
        "pos_embed_max_size": side // config.patch_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
    theirs = {
        f"{OUTER_KEYS[name]}.{suffix}": state[f"{name}.{suffix}"]
        for name in OUTER_KEYS
        for suffix in SUFFIXES
    }
    for suffix in SUFFIXES:
        theirs[f"norm_out.linear.{suffix}"] = _swapped(state[f"final_modulation.1.{suffix}"])
    for i in range(config.depth):
        for stream in QKV:
            mine, block, last = (
                f"blocks.{i}.{stream}",
                f"transformer_blocks.{i}",
                _is_context_pre_only(i, config.depth, stream),
            )
            for suffix in SUFFIXES:
                modulation = state[f"{mine}.adaLN_modulation.1.{suffix}"]
                theirs[f"{block}.{MODULATION[stream]}.{suffix}"] = (
                    _swapped(modulation) if last else modulation
                )
                parts = state[f"{mine}.qkv.{suffix}"].chunk(3)
                theirs |= {
                    f"{block}.attn.{name}.{suffix}": part.contiguous()
                    for name, part in zip(QKV[stream], parts, strict=True)
                }
                if not last:
                    theirs |= {
                        f"{block}.{other}.{suffix}": state[f"{mine}.{name}.{suffix}"]
                        for name, other in STREAM[stream].items()
                    }
            if config.qk_norm:
                pairs = zip(("q_norm", "k_norm"), NORMS[stream], strict=True)
                theirs |= {
                    f"{block}.attn.{other}.weight": state[f"{mine}.{name}.weight"]
                    for name, other in pairs
                }
    return settings, theirs


def from_diffusers(settings: dict[str, Any], state: State) -> tuple[MMDiTConfig, State]:
    """(model section, state) of ours.  Raises ConfigError for a variant that ours is not."""
    if settings.get("dual_attention_layers") or settings.get("qk_norm") not in (None, "rms_norm"):
        found = {key: settings.get(key) for key in ("dual_attention_layers", "qk_norm")}
        raise ConfigError(
            f"SD3Transformer2DModel with {found}: wanted no dual attention (as in SD3.5 medium), "
            "qk_norm rms_norm or null"
        )
    heads = settings["num_attention_heads"]
    config = MMDiTConfig(
        width=heads * settings["attention_head_dim"],
        depth=settings["num_layers"],
        heads=heads,
        patch_size=settings["patch_size"],
        qk_norm=settings.get("qk_norm") is not None,
    )
    ours = {
        f"{name}.{suffix}": state[f"{OUTER_KEYS[name]}.{suffix}"]
        for name in OUTER_KEYS
        for suffix in SUFFIXES
    }
    for suffix in SUFFIXES:
        ours[f"final_modulation.1.{suffix}"] = _swapped(state[f"norm_out.linear.{suffix}"])
    for i in range(config.depth):
        for stream in QKV:
            mine, block, last = (
                f"blocks.{i}.{stream}",
                f"transformer_blocks.{i}",
                _is_context_pre_only(i, config.depth, stream),
            )
            for suffix in SUFFIXES:
                modulation = state[f"{block}.{MODULATION[stream]}.{suffix}"]
                ours[f"{mine}.adaLN_modulation.1.{suffix}"] = (
                    _swapped(modulation) if last else modulation
                )
                ours[f"{mine}.qkv.{suffix}"] = torch.cat(
                    [state[f"{block}.attn.{name}.{suffix}"] for name in QKV[stream]]
                )
                if not last:
                    ours |= {
                        f"{mine}.{name}.{suffix}": state[f"{block}.{other}.{suffix}"]
                        for name, other in STREAM[stream].items()
                    }
            if config.qk_norm:
                pairs = zip(("q_norm", "k_norm"), NORMS[stream], strict=True)
                ours |= {
                    f"{mine}.{name}.weight": state[f"{block}.attn.{other}.weight"]
                    for name, other in pairs
                }
    return config, ours


def _is_context_pre_only(i: int, depth: int, stream: str) -> bool:
    return stream == "text" and i == depth - 1


def _swapped(modulation: Tensor) -> Tensor:
    """Exchange shift and scale."""
    first, second = modulation.chunk(2)
    return torch.cat([second, first])
