"""A network's config.json, as diffusers and transformers write it: read strictly, values with their
types checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.config.strict_json import read_json
from lpl_pretrain.errors import ConfigError

MAX_BYTES = 4 << 20
MAX_COUNT = 2**20
"""More channels, tokens or layers than any network has; what is computed from them stays small."""
MAX_LAYERS = 32
NUMBER = (int, float)


def read_model_json(where: str, path: Path) -> ModelJSON:
    """The settings in a file; `where`: the key that names the network, and its value.  Raises
    ConfigError.
    """
    where = one_line(where, 200)
    try:
        values = read_json(path, limit_bytes=MAX_BYTES)
    except ValueError as error:
        raise ConfigError(f"{where}: {one_line(str(error))}") from None
    where = f"{where}: {one_line(str(path), 200)}"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: found {short(values)}, wanted a JSON object")
    return ModelJSON(where, values)


@dataclass(frozen=True)
class ModelJSON:
    """Settings by key.  Methods raise ConfigError that names the file and the key."""

    where: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def section(self, key: str) -> ModelJSON | None:
        """The settings of a part of the network; None where there are none."""
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self.wrong(key, "a JSON object")
        return ModelJSON(f"{self.where}: {key}", found)

    def text(self, key: str) -> str:
        found = self._required(key)
        if not isinstance(found, str):
            raise self.wrong(key, "a text")
        return found

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty when it is missing or null."""
        found = self.values.get(key)
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
            raise self.wrong(key, "a list of texts")
        return found

    def count(self, key: str, most: int = MAX_COUNT) -> int:
        found = self._required(key)
        if type(found) is not int or not 1 <= found <= most:
            raise self.wrong(key, f"an integer from 1 to {most}")
        return found

    def listed(self, key: str, of: type | tuple[type, ...]) -> list[Any]:
        """A list of 1 to MAX_LAYERS values."""
        found = self._required(key)
        if not isinstance(found, list | tuple) or not 1 <= len(found) <= MAX_LAYERS:
            raise self.wrong(key, f"a list of 1 to {MAX_LAYERS} values")
        if not all(isinstance(part, of) and not isinstance(part, bool) for part in found):
            raise self.wrong(key, "other values in that list")
        return list(found)

    def number(self, key: str) -> float | None:
        """None where it is missing or null."""
        found = self.values.get(key)
        if found is None:
            return None
        if not isinstance(found, NUMBER) or isinstance(found, bool):
            raise self.wrong(key, "a number, or null")
        return found

    def wrong(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: {key}={short(self.values.get(key))}: wanted {wanted}; save it again"
        )

    def one_of(self, key: str, known: Sequence[str]) -> bool:
        return isinstance(found := self.values.get(key), str) and found in known

    def _required(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ConfigError(f"{self.where}: has no {key!r}; save it again")
        return self.values[key]
