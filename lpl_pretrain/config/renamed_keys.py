"""Keys of configurations that were renamed: what an old key is called now, and how files that an
older version wrote are read.

A YAML file or an override of the user that has an old key is refused with the new one.  What this
package stored itself (a run's config.yaml, a job's config.yaml, the protocol in an evaluation
record) is translated while it is read, and hashes over keys use the first name of each key, so that
old runs go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "TrainConfig": {
        "conditioning.encoders": "conditioning.online_encoders",
        "conditioning.text": "conditioning.text_encoders",
        "data.block_samples": "data.shuffle_block_samples",
        "ema.power": "ema.sigma_rel",
        "hang": "watchdog",
        "init_from.may_differ": "init_from.allow_mismatch",
        "log.samples": "log.sample_indices",
        "lpl.gate.max_noise_level": "lpl.gate.noise_level_below",
        "lpl.gate.max_timestep": "lpl.gate.timestep_below",
        "lpl.gate.min_snr": "lpl.gate.snr_above",
        "lpl.sample_share": "lpl.sample_fraction",
        "lpl.target_share": "lpl.target_fraction",
        "model.timestep_rates": "model.timestep_frequencies",
        "optimizer.decay": "optimizer.lr_schedule",
    },
    "EvaluateConfig": {
        "few_images": "on_too_few_images",
    },
}
"""Class of the configuration -> old dotted key -> new dotted key, in the same section.  The values
mean what they meant.  Entries are never removed: runs of any age are read.
"""
STORED_NAME = "config.yaml"
STORED_BESIDE = ("provenance.json", "metrics.jsonl", "job.json")
"""A run's folder, or a job's, holds one of these beside the configuration that was stored in it."""


def new_key(config_class: str, key: str) -> str | None:
    """Present name of a dotted key; None for a key that was never renamed."""
    return RENAMED.get(config_class, {}).get(key)


def first_key(config_class: str, key: str) -> str:
    """First name of a dotted key, for hashes that must not change with a rename."""
    for old, new in RENAMED.get(config_class, {}).items():
        if key == new or key.startswith(f"{new}."):
            return old + key.removeprefix(new)
    return key


def with_new_keys(config_class: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Stored settings under the present names of their keys."""
    return _renamed(raw, RENAMED.get(config_class, {}))


def with_first_keys(config_class: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Settings under the first names of their keys, in the same order."""
    names = {new: old for old, new in RENAMED.get(config_class, {}).items()}
    return _renamed(raw, names)


def is_stored_copy(path: Path) -> bool:
    """Whether this package wrote the configuration file, into the folder of a run or of a job."""
    return path.name == STORED_NAME and any(
        (path.parent / name).is_file() for name in STORED_BESIDE
    )


def _renamed(section: dict[str, Any], names: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """`names`: dotted key -> dotted key.  A key whose new name is taken stays as it is."""
    renamed: dict[str, Any] = {}
    for key, value in section.items():
        dotted = f"{prefix}{key}"
        name = names[dotted].rpartition(".")[2] if dotted in names else key
        if name in section:
            name = key
        inner = f"{dotted}."
        renamed[name] = _renamed(value, names, inner) if isinstance(value, dict) else value
    return renamed
