"""The errors a user can act on: each message names the key or path, the value found, the value wanted, and the remedy.

They live at the root of the package because `config`, the lowest room, raises them too.  `assert` is for our own bugs.
"""


class LPLError(Exception):
    """Base of every error that is the input's fault; the command line prints it without a traceback."""


class ConfigError(LPLError):
    """A configuration that cannot run."""


class DataError(LPLError):
    """A picture, shard or data folder that cannot be used."""


class CheckpointError(LPLError):
    """A checkpoint that is incomplete, damaged, or belongs to another run."""


class NonFiniteError(LPLError):
    """A loss or gradient that is NaN or infinite, found before it reached a parameter."""
