"""Convert DiT weights from the published layout, and to and from diffusers'
`DiTTransformer2DModel`.

The published layout is ours with the fixed position embedding beside it.  diffusers splits queries,
keys and values, and keeps a copy of the time and class embedders in every block.  What diffusers'
model cannot express is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.errors import CheckpointError, ConfigError

EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OUTER_KEYS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
QKV = ("to_q", "to_k", "to_v")
SUFFIXES = ("weight", "bias")
State = dict[str, Tensor]


def from_published(state: State) -> State:
    """Our state from that of a file such as DiT-XL-2-256x256 (`model` or `ema` in it)."""
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


def to_diffusers(
    state: State, config: DiTConfig, *, channels: int, side: int, num_classes: int
) -> tuple[dict[str, Any], State]:
    """(config, state) of a DiTTransformer2DModel with the same outputs for square latents.

    Raises ConfigError for an option that diffusers' model does not have.
    """
    unsupported = [
        name
        for name in ("qk_norm", "rope", "swiglu", "rms_norm", "position_side", "text")
        if getattr(config, name)
    ]
    if unsupported:
        raise ConfigError(
            f"model.{unsupported[0]}: diffusers' DiT does not have it; export without --format "
            "diffusers"
        )
    if config.timestep_frequencies != "diffusers":
        raise ConfigError(
            "model.timestep_frequencies=dit: diffusers' DiT embeds time at other frequencies, so "
            "its images would differ; train with model.timestep_frequencies=diffusers to export "
            "there"
        )
    settings = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": channels,
        "out_channels": channels * (1 + config.learned_sigma),
        "num_layers": config.depth,
        "sample_size": side,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": num_classes,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
    }
    theirs = {
        f"{OUTER_KEYS[name]}.{suffix}": state[f"{name}.{suffix}"]
        for name in OUTER_KEYS
        for suffix in SUFFIXES
    }
    for i in range(config.depth):
        mine, block = f"blocks.{i}", f"transformer_blocks.{i}"
        for name, other in EMBEDDERS.items():
            theirs |= {
                f"{block}.norm1.emb.{other}.{suffix}": state[f"{name}.{suffix}"].clone()
                for suffix in _suffixes(state, name)
            }
        for name, other in BLOCK.items():
            theirs |= {
                f"{block}.{other}.{suffix}": state[f"{mine}.{name}.{suffix}"] for suffix in SUFFIXES
            }
        for suffix in SUFFIXES:
            parts = state[f"{mine}.attn.qkv.{suffix}"].chunk(3)
            theirs |= {
                f"{block}.attn1.{name}.{suffix}": part.contiguous()
                for name, part in zip(QKV, parts, strict=True)
            }
    return settings, theirs


def from_diffusers(settings: dict[str, Any], state: State) -> tuple[DiTConfig, State]:
    """(model section, state) of ours.

    Raises ConfigError for another variant, CheckpointError for copies that differ.
    """
    if (
        settings.get("activation_fn") != "gelu-approximate"
        or settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero"
    ):
        raise ConfigError(
            f"DiTTransformer2DModel with {settings}: wanted activation_fn gelu-approximate, "
            "norm_type ada_norm_zero"
        )
    heads = settings["num_attention_heads"]
    width = heads * settings["attention_head_dim"]
    config = DiTConfig(
        width=width,
        depth=settings["num_layers"],
        heads=heads,
        patch_size=settings["patch_size"],
        learned_sigma=(settings.get("out_channels") or settings["in_channels"])
        == 2 * settings["in_channels"],
        timestep_frequencies="diffusers",
    )
    ours = {
        f"{name}.{suffix}": state[f"{OUTER_KEYS[name]}.{suffix}"]
        for name in OUTER_KEYS
        for suffix in SUFFIXES
    }
    for name, other in EMBEDDERS.items():
        for suffix in _suffixes(state, f"transformer_blocks.0.norm1.emb.{other}"):
            copies = [
                state[f"transformer_blocks.{i}.norm1.emb.{other}.{suffix}"]
                for i in range(config.depth)
            ]
            if not all(torch.equal(copy, copies[0]) for copy in copies):
                raise CheckpointError(
                    f"transformer_blocks.*.norm1.emb.{other}.{suffix}: blocks hold different copies"
                )
            ours[f"{name}.{suffix}"] = copies[0]
    for i in range(config.depth):
        mine, block = f"blocks.{i}", f"transformer_blocks.{i}"
        for suffix in SUFFIXES:
            ours |= {
                f"{mine}.{name}.{suffix}": state[f"{block}.{other}.{suffix}"]
                for name, other in BLOCK.items()
            }
            ours[f"{mine}.attn.qkv.{suffix}"] = torch.cat(
                [state[f"{block}.attn1.{name}.{suffix}"] for name in QKV]
            )
    return config, ours


def _suffixes(state: State, name: str) -> list[str]:
    return [suffix for suffix in SUFFIXES if f"{name}.{suffix}" in state]
