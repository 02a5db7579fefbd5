"""Rank and world size of this process, and other environment variables of torchrun and SLURM.

No other module of the package reads environment variables.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lpl_pretrain.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class World:
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Reads RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them; one process if none is set.

        Raises ConfigError.
        """
        values = {name: os.environ[name] for name in NAMES if name in os.environ}
        if not values:
            return cls()
        problems = [f"{name}={value!r}" for name, value in values.items() if not value.isdigit()]
        problems += [f"{name} is not set" for name in NAMES if name not in values]
        if problems:
            raise ConfigError(
                f"environment: {', '.join(problems)}; wanted three integers: start with torchrun, "
                "or unset all three for one process"
            )
        rank, local_rank, world_size = (int(values[name]) for name in NAMES)
        if not rank < world_size:
            raise ConfigError(
                f"environment: RANK={rank} is not below WORLD_SIZE={world_size}: start "
                "with torchrun"
            )
        return cls(rank, local_rank, world_size)

    @staticmethod
    def scheduler_job() -> str:
        """Job ID of SLURM; "" outside of SLURM."""
        return os.environ.get("SLURM_JOB_ID", "")

    @staticmethod
    def stacks_file() -> Path | None:
        """File in which the parent process expects a dump of stacks (launch/worker.py), if any."""
        path = os.environ.get("LPL_STACKS_FILE")
        return None if path is None else Path(path)

    @staticmethod
    def error_file() -> Path | None:
        """File in which torchrun expects the error of this process; None without torchrun."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        return Path(path) if path else None

    @staticmethod
    def under_torchrun() -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ

    def to_environment(self) -> None:
        """Sets the variables for engines that read them: DeepSpeed needs LOCAL_RANK even alone."""
        os.environ.update(
            RANK=str(self.rank), LOCAL_RANK=str(self.local_rank), WORLD_SIZE=str(self.world_size)
        )
