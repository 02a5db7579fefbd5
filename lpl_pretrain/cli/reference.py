"""`lpl-pretrain reference PROTOCOL OUTPUT`: statistics of real pictures as one file, for many runs
to be compared with.
"""

from __future__ import annotations

import os

from lpl_pretrain.cli.evaluate import PATIENCE
from lpl_pretrain.config.evaluation import check_protocol
from lpl_pretrain.config.load import load_config
from lpl_pretrain.config.paths import expand
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.runtime.world import World


def run(protocol: str, output: str, overrides: list[str], resolution_px: int) -> None:
    settings, path, world = (
        load_config(EvaluateConfig, protocol, overrides),
        expand(output),
        World.from_environment(),
    )
    check_protocol(settings)
    if path.suffix != ".safetensors" or path.exists():
        raise ConfigError(f"{output}: wanted a new file whose name ends in .safetensors")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(
            f"{output}: cannot be written: {there} is no folder that this user may write to"
        )
    if isinstance(settings.reference, str) and settings.reference.endswith(
        (".npz", ".safetensors")
    ):
        raise ConfigError(
            f"reference={settings.reference}: holds statistics already; name pictures"
        )
    from lpl_pretrain.encoding.sources import list_images  # torch: not for --help
    from lpl_pretrain.evaluation.build_reference import build_reference
    from lpl_pretrain.evaluation.reference import read_reference
    from lpl_pretrain.evaluation.registry import load_extractor
    from lpl_pretrain.runtime import dist
    from lpl_pretrain.runtime.log import set_up_logging

    device = dist.init(world, timeout=PATIENCE)
    set_up_logging(world.rank)
    extractors = [load_extractor(entry, device) for entry in settings.extractors]
    build_reference(
        path, list(list_images(settings.reference)), settings, resolution_px, extractors, world
    )
    if world.rank == 0:
        facts = read_reference(path).provenance
        print(
            f"{output}: {facts['pictures']} pictures at {resolution_px} px, by "
            f"{', '.join(facts['extractors'])}"
        )
    if world.world_size > 1:
        dist.exit()
