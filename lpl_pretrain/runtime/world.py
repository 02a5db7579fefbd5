"""Which process this is among all: the only place in the package that reads ranks from the
environment.
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
        """As torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; one process when none of them is set."""
        found = {name: os.environ[name] for name in NAMES if name in os.environ}
        if not found:
            return cls()
        missing = [name for name in NAMES if name not in found]
        bad = [f"{name}={value!r}" for name, value in found.items() if not value.isdigit()]
        if missing or bad:
            raise ConfigError(
                f"environment: {', '.join(bad + [f'{name} is not set' for name in missing])}; "
                "wanted three integers: "
                "start with torchrun, or unset all three for one process"
            )
        rank, local_rank, world_size = (int(found[name]) for name in NAMES)
        if not rank < world_size:
            raise ConfigError(
                f"environment: RANK={rank} is not below WORLD_SIZE={world_size}: start "
                "with torchrun"
            )
        return cls(rank, local_rank, world_size)

    @staticmethod
    def scheduler_job() -> str:
        """Of SLURM; "" outside of it."""
        return os.environ.get("SLURM_JOB_ID", "")

    @staticmethod
    def stacks_file() -> Path | None:
        """Where whoever started this process looks for its stacks (see launch/worker.py)."""
        return Path(os.environ["LPL_STACKS_FILE"]) if "LPL_STACKS_FILE" in os.environ else None

    @staticmethod
    def error_file() -> Path | None:
        """Where torchrun reads why this process failed; None where another program started it."""
        return Path(found) if (found := os.environ.get("TORCHELASTIC_ERROR_FILE")) else None

    @staticmethod
    def by_torchrun() -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ

    def to_environment(self) -> None:
        """For engines that look there themselves (DeepSpeed wants LOCAL_RANK even on one process)."""
        os.environ.update(
            RANK=str(self.rank), LOCAL_RANK=str(self.local_rank), WORLD_SIZE=str(self.world_size)
        )
