"""Encodes images to a data folder of latents.

An encode that is killed and started again keeps the parts that have a record and encodes the others
again; the folder ends up the same byte for byte.  Any number of processes may share the work.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lpl_pretrain.config.dataset import FORMAT_VERSION, INDEX_NAME, DatasetIndex, read_index
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.encoding.encoders import Autoencoder, Encoders, TextEncoder
from lpl_pretrain.encoding.index import check_captions, publish_index, remove_records
from lpl_pretrain.encoding.part_encoder import PartEncoder
from lpl_pretrain.encoding.plan import Plan, content_settings, make_plan
from lpl_pretrain.encoding.plan_file import create_plan_file
from lpl_pretrain.encoding.writer import record_path
from lpl_pretrain.errors import ConfigError, DataError
from lpl_pretrain.runtime.log import log
from lpl_pretrain.runtime.world import World

SEAL = "`lpl-pretrain data seal FOLDER` checks the folder and adds them"


def encode(
    config: EncodeConfig,
    autoencoder: Autoencoder | None = None,
    text_encoders: dict[str, TextEncoder] | None = None,
    world: World | None = None,
) -> DatasetIndex | None:
    """Encodes this process's parts to config.output, and publishes the index if no part is missing.

    Returns None while other processes have parts left.  Leaves a folder that was finished from the
    same inputs as it is.  Raises ConfigError, DataError.
    """
    world = world or World()
    encoders = Encoders.load(config, autoencoder, text_encoders)
    check_shapes(config, encoders.autoencoder.downscale)
    plan = make_plan(config, encoders.identities())
    folder = Path(config.output)
    if (folder / INDEX_NAME).exists():
        return _accept_finished(config, plan)
    if plan.samples is not None:
        check_captions(config, plan.readable, plan.captioned, warn=True)
    create_plan_file(folder, plan)
    if (folder / INDEX_NAME).exists():
        # another process finished the folder meanwhile and removed its records
        return _accept_finished(config, plan)
    own_parts = [
        part
        for part in plan.parts[world.rank :: world.world_size]
        if not record_path(folder, part.name).exists()
    ]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
    PartEncoder(config, encoders.to(device), plan, device).run(own_parts)
    missing = [part for part in plan.parts if not record_path(folder, part.name).exists()]
    if missing and not (folder / INDEX_NAME).exists():
        log.info(
            "%s: %d of %d parts are left to other processes", folder, len(missing), len(plan.parts)
        )
        return None
    index = None if missing else publish_index(config, plan, encoders)
    return index or _accept_finished(config, plan)


def check_shapes(config: EncodeConfig, downscale: int) -> None:
    """Raises ConfigError for image sides that are not a multiple of the autoencoder's downscale."""
    sides = {"resolution_px": config.resolution_px}
    if config.buckets is not None:
        sides = {"buckets.step_px": config.buckets.step_px}
        if config.buckets.step_px > config.resolution_px:
            raise ConfigError(
                f"buckets.step_px={config.buckets.step_px} with "
                f"resolution_px={config.resolution_px}: no bucket; use a smaller step"
            )
    for name, side in sides.items():
        if side % downscale:
            next_multiple = -(-side // downscale) * downscale
            raise ConfigError(
                f"{name}={side} is not a multiple of {downscale}, the pixels per "
                f"latent position of autoencoder={config.autoencoder}: choose one that is, such "
                f"as {next_multiple}"
            )


def _accept_finished(config: EncodeConfig, plan: Plan) -> DatasetIndex:
    """Index of a finished folder.  Raises DataError if it was encoded from other inputs."""
    index = read_index(config.output)
    remove_records(Path(config.output))
    if index.plan not in (plan.identity, plan.earlier_identity):
        raise DataError(
            f"output={config.output}: holds a data set made from other inputs "
            f"({_difference(config, index)}): name another output, or remove that folder"
        )
    if index.format_version < FORMAT_VERSION:
        log.warning(
            "%s: format %d, without checksums of its index: %s",
            config.output,
            index.format_version,
            SEAL,
        )
    if index.plan == plan.earlier_identity:
        log.warning(
            "%s: was encoded by an earlier version, which ignored colour profiles", config.output
        )
    log.info("%s: encoded already from this source; left alone", config.output)
    return index


def _difference(config: EncodeConfig, index: DatasetIndex) -> str:
    """Settings that differ between the folder and the configuration."""
    stored = json.loads(index.config)
    changed = [
        f"{key} {stored.get(key)!r} there, {value!r} now"
        for key, value in content_settings(config).items()
        if stored.get(key) != value
    ]
    return "; ".join(changed) or "source or encoders have changed"
