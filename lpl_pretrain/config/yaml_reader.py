"""The one reader of YAML: plain data, or a ConfigError with file and line, whatever the bytes are.

A file holds one mapping with text as keys.  Not accepted: repeated keys, tags, several documents,
deep nesting, more than MAX_NODES values after aliases are expanded.  Scalars are read as PyYAML's
safe loader reads them, with three exceptions, each of which would be something else than what was
written: 12:30 is text and not 750, 010 is text and not 8, a date is text.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lpl_pretrain.config.message import one_line, short
from lpl_pretrain.errors import ConfigError

MAX_BYTES = 256 << 10
MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_DIGITS = 20

NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"(yes|Yes|YES|true|True|TRUE|on|On|ON)|(no|No|NO|false|False|FALSE|off|Off|OFF)")
INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)")
FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that YAML does not allow."""
TAGS = {
    yaml.ScalarEvent: ("!", "tag:yaml.org,2002:str"),
    yaml.SequenceStartEvent: ("!", "tag:yaml.org,2002:seq"),
    yaml.MappingStartEvent: ("!", "tag:yaml.org,2002:map"),
}
"""Tags that say what is there anyway."""
MERGE = "<<"


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; an empty file holds an empty one.  Raises ConfigError."""
    content = parse(read_text(path), one_line(str(path)))
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError(
            f"{one_line(str(path))}: holds a {kind}, wanted a mapping of keys to values"
        )
    return content


def read_value(text: str) -> Any:
    """The value of an override: a flow collection, a quoted text, a number, true, false or null;
    else the text as it is typed.

    Raises ConfigError for a bracket or quote that does not close.
    """
    stripped = text.strip()
    if stripped[:1] in ("[", "{", '"', "'"):
        return parse(stripped, "value")
    value = plain_scalar(stripped, "value")
    return text if isinstance(value, str) else value


def read_text(path: Path) -> str:
    """UTF-8 text of a regular file of at most MAX_BYTES.  Raises ConfigError."""
    where = one_line(str(path))
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{where}: is a pipe or a device, wanted a YAML file")
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{where}: is a directory, wanted a YAML file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{where}: no such configuration file") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError(f"{where}: cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where}: has more than {MAX_BYTES} bytes, wanted a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{where}, line {line}: is not UTF-8; save it as UTF-8") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse(text: str, where: str) -> Any:
    """Plain data of the one document in `text`; None when it is empty.  Raises ConfigError that
    begins with `where`.
    """
    if found := UNPRINTABLE.search(text):
        line = text[: found.start()].count("\n") + 1
        raise ConfigError(
            f"{where}, line {line}: has the character {found[0]!r}, which YAML does not allow; "
            "remove it"
        )
    try:
        return _Document(text, where).read()
    except yaml.MarkedYAMLError as error:
        at = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(
            f"{where}{at}: not valid YAML: {one_line(error.problem or str(error))}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(str(error))}") from None


def plain_scalar(text: str, where: str) -> Any:
    """Value of an unquoted scalar.  Raises ConfigError for an integer that is too long."""
    if NULL.fullmatch(text):
        return None
    if found := BOOL.fullmatch(text):
        return found[1] is not None
    if INT.fullmatch(text):
        digits = text.replace("_", "")
        if len(digits) > MAX_DIGITS:
            raise ConfigError(
                f"{where}: {short(text)}: an integer of {len(digits)} digits, wanted at most "
                f"{MAX_DIGITS}"
            )
        return int(digits, 0)
    if FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower().replace("_", "")))
    return text


class _Document:
    """Builds plain data from PyYAML's events, counting values as it goes."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.nodes = 0
        self.anchors: dict[str, tuple[Any, int]] = {}
        """Name -> value, how many values it holds."""

    def read(self) -> Any:
        next(self.events)  # start of the stream
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        content = self.value(next(self.events), 0)
        next(self.events)  # end of the document
        if not isinstance(after := next(self.events), yaml.StreamEndEvent):
            self.refuse(after, "a second document begins; wanted one")
        return content

    def value(self, event: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        self.count(event, 1)
        before = self.nodes
        if event.tag is not None and event.tag not in TAGS[type(event)]:
            self.refuse(
                event, f"has the tag {short(event.tag)}; tags are not read: write the value alone"
            )
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(inner := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(inner, depth + 1))
        else:
            value = self.mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.nodes - before + 1
        return value

    def scalar(self, event: Any) -> Any:
        if event.implicit[0] and event.tag is None:
            return plain_scalar(event.value, f"{self.where}, line {event.start_mark.line + 1}")
        try:  # escapes may spell one character as two halves, as JSON does
            return event.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.refuse(event, f"{short(event.value)}: has half a character")

    def mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
            key = self.value(event, depth + 1)
            if not isinstance(key, str):
                self.refuse(event, f"the key {short(key)} is not text; put it in quotes")
            if key in own or (key == MERGE and plain and merged):
                self.refuse(event, f"the key {short(key)} is there twice; remove one")
            value = self.value(next(self.events), depth + 1)
            if key == MERGE and plain:
                merged = value if isinstance(value, list) else [value]
                if not merged or not all(isinstance(part, dict) for part in merged):
                    self.refuse(event, "<< wants a mapping, or a list of mappings")
            else:
                own[key] = value
        inherited: dict[str, Any] = {}
        for part in reversed(merged):  # the first one wins
            inherited |= part
        return {**inherited, **own}

    def alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            self.refuse(
                event, f"*{short(event.anchor)[1:-1]} stands for nothing that is complete before it"
            )
        value, nodes = self.anchors[event.anchor]
        self.count(event, nodes)
        return copy.deepcopy(value)

    def count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.refuse(
                event, f"more than {MAX_NODES} values (aliases count as what they stand for)"
            )

    def refuse(self, event: Any, problem: str) -> NoReturn:
        raise ConfigError(f"{self.where}, line {event.start_mark.line + 1}: {problem}")
