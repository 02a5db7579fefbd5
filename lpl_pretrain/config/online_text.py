"""Text encoders that run beside the model, known from their folders alone: what a run with them
looks like before one is loaded.
"""

from __future__ import annotations

from lpl_pretrain.config.dataset import DatasetIndex, TextEntry
from lpl_pretrain.config.encode import TextEncoderConfig
from lpl_pretrain.config.hashing import text_encoder_identity
from lpl_pretrain.config.load import resolve_path
from lpl_pretrain.config.model_json import read_model_json
from lpl_pretrain.config.schema import ConditioningConfig, TrainConfig
from lpl_pretrain.config.text_layout import TextShape, encoders, text_shape


def stored_encoders(conditioning: ConditioningConfig) -> tuple[str, ...]:
    """Names of those whose embeddings are read from the data folder."""
    return tuple(
        name
        for name in encoders(conditioning.text_encoders)
        if name not in conditioning.online_encoders
    )


def text_entries(
    conditioning: ConditioningConfig, stored: dict[str, TextEntry]
) -> dict[str, TextEntry]:
    """`stored`, of the data folder, and those that run beside the model.  Raises ConfigError."""
    online = {
        name: text_entry(settings, f"conditioning.online_encoders.{name}")
        for name, settings in conditioning.online_encoders.items()
    }
    return {**stored, **online}


def run_text_shape(config: TrainConfig, index: DatasetIndex) -> TextShape | None:
    """Shape of the text that a run's model reads; None if it reads none.  Raises ConfigError."""
    layout = config.conditioning.text_encoders
    return text_shape(layout, text_entries(config.conditioning, index.text)) if layout else None


def text_entry(config: TextEncoderConfig, where: str) -> TextEntry:
    """`where` is the section's path, for errors.  Raises ConfigError."""
    folder = resolve_path(config.folder)
    identity = text_encoder_identity(folder, where)
    settings = read_model_json(f"{where}.folder={config.folder}", folder / "config.json")
    projected = any("WithProjection" in name for name in settings.texts("architectures"))
    projected = settings.text("model_type") == "clip" or projected
    inner = settings.section("text_config") or settings
    width = inner.count("d_model" if inner.get("d_model") is not None else "hidden_size")
    pooled = None
    if config.pooled:
        projection = next(
            (part for part in (settings, inner) if part.get("projection_dim") is not None), None
        )
        pooled = (
            projection.count("projection_dim") if projected and projection is not None else width
        )
    return TextEntry(
        identity=identity,
        width=width,
        max_tokens=config.max_tokens,
        pooled_width=pooled,
        storage="fp16",
    )


def online_problems(conditioning: ConditioningConfig, folder: object, captions: int) -> list[str]:
    """`captions`: how many samples of the data folder have one."""
    unused = sorted(set(conditioning.online_encoders) - set(encoders(conditioning.text_encoders)))
    problems = [
        f"conditioning.online_encoders.{name}: not named in "
        f"conditioning.text_encoders={list(conditioning.text_encoders)}"
        for name in unused
    ]
    if conditioning.online_encoders and not captions:
        problems.append(
            f"conditioning.online_encoders: {folder} holds no captions to encode; encode a source "
            "that has some"
        )
    return problems
