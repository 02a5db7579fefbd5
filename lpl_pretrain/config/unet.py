"""Arguments of diffusers' UNet2DConditionModel that `model.settings` may set: their types, and the
relations between them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from lpl_pretrain.config.base import Name, Section
from lpl_pretrain.config.message import short
from lpl_pretrain.config.problems import problems_of

Channels = Annotated[int, Field(ge=1, le=65_536)]
Layers = Annotated[int, Field(ge=1, le=64)]
LEVELS = {"min_length": 1, "max_length": 12}
"""Length of a list with a value for each resolution level."""
Heads = Union[Channels, Annotated[tuple[Channels, ...], Field(**LEVELS)]]
ACTIVATIONS = Literal["swish", "silu", "mish", "gelu", "relu"]
FROM_DATA = ("in_channels", "out_channels", "sample_size", "projection_class_embeddings_input_dim")
"""Arguments that follow from the data."""


class UNetArguments(Section):
    """Types of the arguments; null or absent: the preset's value, or diffusers' default."""

    block_out_channels: Optional[Annotated[tuple[Channels, ...], Field(**LEVELS)]] = None
    down_block_types: Optional[Annotated[tuple[Name, ...], Field(**LEVELS)]] = None
    mid_block_type: Optional[Name] = None
    up_block_types: Optional[Annotated[tuple[Name, ...], Field(**LEVELS)]] = None
    layers_per_block: Optional[Union[Layers, Annotated[tuple[Layers, ...], Field(**LEVELS)]]] = None
    transformer_layers_per_block: Optional[
        Union[Layers, Annotated[tuple[Union[Layers, tuple[Layers, ...]], ...], Field(**LEVELS)]]
    ] = None
    reverse_transformer_layers_per_block: Optional[
        tuple[Union[Layers, tuple[Layers, ...]], ...]
    ] = None
    attention_head_dim: Optional[Heads] = None
    num_attention_heads: Optional[Heads] = None
    cross_attention_dim: Optional[Channels] = None
    only_cross_attention: Optional[Union[bool, Annotated[tuple[bool, ...], Field(**LEVELS)]]] = None
    mid_block_only_cross_attention: Optional[bool] = None
    dual_cross_attention: Optional[bool] = None
    use_linear_projection: Optional[bool] = None
    upcast_attention: Optional[bool] = None
    cross_attention_norm: Optional[Literal["layer_norm", "group_norm"]] = None
    norm_num_groups: Optional[PositiveInt] = None
    norm_eps: Optional[PositiveFloat] = None
    act_fn: Optional[ACTIVATIONS] = None
    dropout: Optional[Annotated[float, Field(ge=0.0, lt=1.0)]] = None
    downsample_padding: Optional[Annotated[int, Field(ge=0, le=1)]] = None
    mid_block_scale_factor: Optional[PositiveFloat] = None
    center_input_sample: Optional[bool] = None
    flip_sin_to_cos: Optional[bool] = None
    freq_shift: Optional[Annotated[int, Field(ge=0, le=1)]] = None
    resnet_time_scale_shift: Optional[Literal["default", "scale_shift"]] = None
    resnet_skip_time_act: Optional[bool] = None
    resnet_out_scale_factor: Optional[PositiveFloat] = None
    time_embedding_type: Optional[Literal["positional", "fourier"]] = None
    time_embedding_dim: Optional[Channels] = None
    time_embedding_act_fn: Optional[ACTIVATIONS] = None
    timestep_post_act: Optional[ACTIVATIONS] = None
    conv_in_kernel: Optional[Literal[1, 3, 5, 7]] = None
    conv_out_kernel: Optional[Literal[1, 3, 5, 7]] = None
    addition_embed_type: Optional[Literal["text_time"]] = None
    addition_time_embed_dim: Optional[Channels] = None


def settings_problems(settings: dict[str, Any]) -> list[str]:
    """Problems of single settings: unknown keys and values of a wrong type."""
    try:
        UNetArguments.model_validate(settings)
    except ValidationError as error:
        return problems_of(UNetArguments, error)
    return []


def argument_problems(arguments: dict[str, Any]) -> list[str]:
    """Relations that are violated between `arguments`, the preset's replaced by the settings."""
    channels = list(arguments["block_out_channels"])
    groups = arguments.get("norm_num_groups") or 32
    problems = [
        f"{key}={short(list(arguments[key]))}: wanted {len(channels)} values, one for each of "
        "block_out_channels"
        for key, value in arguments.items()
        if isinstance(value, list | tuple)
        and len(value) != len(channels)
        and not key.startswith("reverse")
    ]
    if uneven := [count for count in channels if count % groups]:
        problems.append(
            f"block_out_channels={short(channels)}: {uneven[0]} channels are not a multiple of "
            f"norm_num_groups={groups}"
        )
    return problems
