"""The errors a user can act on: each message names the key or path, the value found, the value wanted, and the remedy.

They live at the root of the package because `config`, the lowest room, raises them too.  `assert` is for our own bugs.
"""

BAD_INPUT = 2
"""Exit status for what is the input's fault: trying again would not help."""
UNFIT = 75
"""Exit status of a process whose node cannot train: trying again would help on another one."""


class LPLError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback."""

    status = BAD_INPUT


class ConfigError(LPLError):
    """A configuration that cannot run."""


class DataError(LPLError):
    """A picture, shard or data folder that cannot be used."""


class CheckpointError(LPLError):
    """A checkpoint that is incomplete, damaged, or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files contradict each other; an older one may be sound."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written: the disk's fault, which may be gone when the run is begun again."""

    status = 1


class NonFiniteError(LPLError):
    """A loss or gradient that is NaN or infinite, found before it reached a parameter."""


class SpikeError(LPLError):
    """A gradient norm or loss far above those of the last updates, found before the update."""


class PreflightError(LPLError):
    """What no node has that training needs, found before it begins."""

    def __init__(self, message: str, status: int = BAD_INPUT) -> None:
        """`status` 1: it may be there when the job is tried again."""
        super().__init__(message)
        self.status = status
