"""Reads a DeepSpeed JSON and lists everything in it that cannot be used, without DeepSpeed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpl_pretrain.config.schema import ParallelConfig
from lpl_pretrain.config.zero.json_file import Problem, read_json, refuse, show
from lpl_pretrain.config.zero.keys import (
    NULLABLE,
    OWNED,
    STAGE_3,
    TABLE_STAGES,
    TUNING,
    ZERO,
    Key,
    Keys,
    same,
)
from lpl_pretrain.errors import ConfigError

BUILTIN = Path(__file__).parent / "builtin"
AUTO = "auto"
OFF: tuple[Any, ...] = (None, False, {}, {"device": "none"})
OFFLOAD_EXAMPLE = '{"device": "cpu", "pin_memory": true}'


def zero_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """DeepSpeed's settings under a `zero` strategy: `zero_config`, or the stage's built-in file.

    Raises ConfigError, also when the file asks for another stage than the strategy.
    """
    strategy = parallel.strategy
    path = parallel.zero_config or BUILTIN / f"{strategy.value}.json"
    settings = read_zero_config(path)
    wanted, found = strategy.zero_stage, settings["zero_optimization"]["stage"]
    if wanted is not None and found != wanted:
        remedy = f"parallel.strategy=zero{found}" if found else "parallel.strategy=zero"
        raise ConfigError(
            f"parallel.strategy={strategy.value} with parallel.zero_config={str(path)!r}: the file "
            f"has zero_optimization.stage={found}, wanted {wanted}: set {remedy}, or name a file "
            f"of stage {wanted}"
        )
    return settings


def read_zero_config(path: str | Path) -> dict[str, Any]:
    """The engine's tuning as a dict: whole numbers as int, without refused keys at their default.

    Raises ConfigError that lists everything in the file that cannot stay.
    """
    try:
        content, problems = read_json(path, show_path(path))
    except ConfigError as error:
        raise ConfigError(f"parallel.zero_config={error}") from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ConfigError(
            f"{path}: found a JSON {found}, wanted an object like configs/zero/zero2.json"
        )
    refuse(
        str(path),
        [*problems, *find_problems(content, {problem.path for problem in problems})],
        "cannot be used",
    )
    return normalised(content, TUNING)


def show_path(path: str | Path) -> str:
    return repr(str(path))


def find_problems(
    content: dict[str, Any], known: set[tuple[str, ...]] | None = None
) -> list[Problem]:
    """Keys of a JSON object that cannot be used; `known`: paths that have a problem already."""
    problems = list(_table_problems(content, TUNING, (), None))
    if "zero_optimization" not in content:
        problems.append(_stage_problem(None))
    elif isinstance(zero := content["zero_optimization"], dict):
        if "stage" not in zero:
            problems.append(_stage_problem(None))
        problems += _contradictions(content, zero)
    return [problem for problem in problems if not known or problem.path not in known]


def _stage_problem(found: Any) -> Problem:
    return Problem(
        ("zero_optimization", "stage"), f"found {show(found)}, wanted {_key(ZERO, 'stage').wanted}"
    )


def _table_problems(
    content: dict[str, Any], table: Keys, path: tuple[str, ...], stage: int | None
) -> Iterator[Problem]:
    """`stage`: of ZeRO, where it is known."""
    for name, value in content.items():
        here, rule = (*path, name), table.get(name)
        if rule is None:
            yield Problem(here, _unknown(name, table, top_level=not path))
        elif isinstance(rule, Key):
            problem = value_problem(value, rule, stage)
            if problem is not None:
                yield Problem(here, problem)
        elif not isinstance(value, dict):
            if here == ("zero_optimization",):
                yield _stage_problem(value)
            elif value is not None or name not in NULLABLE:
                example = (
                    f"such as {OFFLOAD_EXAMPLE}"
                    if name.startswith("offload_")
                    else f"with {', '.join(rule)}"
                )
                yield Problem(here, f"found {show(value)}, wanted an object {example}")
        else:
            stages = TABLE_STAGES.get(name)
            if (
                stages is not None
                and stage is not None
                and stage not in stages
                and value not in OFF
            ):
                yield Problem(here, _other_stage(stage, stages))
            inner = stage_of(value) if here == ("zero_optimization",) else stage
            yield from _table_problems(value, rule, here, inner)


def value_problem(value: Any, rule: Key, stage: int | None = None) -> str | None:
    """Reason why a key cannot have this value; None: it can."""
    if rule.refused:
        off = same(value, rule.default) or value is None or (value is False and not rule.default)
        return None if off else f"{rule.refused}; remove it"
    if value == AUTO:
        return (
            "found 'auto', which only Hugging Face fills in (DeepSpeed's default is "
            f"{show(rule.default)}); remove it"
        )
    if not rule.accepts(value):
        return f"found {show(value)}, wanted {rule.wanted}"
    if stage is not None and stage not in rule.stages and not same(value, rule.default):
        return _other_stage(stage, rule.stages)
    return None


def _contradictions(content: dict[str, Any], zero: dict[str, Any]) -> Iterator[Problem]:
    """Combinations that only DeepSpeed would refuse, or silently ignore, later."""
    path = ("zero_optimization",)
    for name in STAGE_3:
        if name in zero and f"stage3_{name}" in zero:
            yield Problem(
                (*path, name),
                f"is the same as stage3_{name}, which is there too; keep one of the two",
            )
    if _is_odd(zero.get("allgather_bucket_size")):
        yield Problem(
            (*path, "allgather_bucket_size"),
            f"found {show(zero['allgather_bucket_size'])}, wanted an even number (DeepSpeed aligns "
            "its halves)",
        )
    prefetch = next(
        (name for name in ("stage3_prefetch_bucket_size", "prefetch_bucket_size") if name in zero),
        None,
    )
    if prefetch and True in (
        zero.get("stage3_allgather_sequential"),
        zero.get("allgather_sequential"),
    ):
        yield Problem((*path, prefetch), "allgather_sequential switches prefetching off; remove it")
    profiler = content.get("flops_profiler")
    if stage_of(zero) == 3 and isinstance(profiler, dict) and profiler.get("enabled") is True:
        yield Problem(
            ("flops_profiler", "enabled"),
            "DeepSpeed's profiler fails under stage 3 (metrics.jsonl has tflops_per_s); remove it",
        )


def _is_odd(value: Any) -> bool:
    return _key(ZERO, "allgather_bucket_size").accepts(value) and value % 2 == 1


def _unknown(name: str, table: Keys, *, top_level: bool) -> str:
    if top_level and name in OWNED:
        return f"set by {OWNED[name]} in the run's configuration; remove it here"
    close = suggestion(name, table)
    return "unknown key" + (f"; did you mean {close!r}?" if close else "; remove it")


def suggestion(name: str, table: Keys) -> str | None:
    """The known key that a misspelt one is closest to."""
    if len(name) > 100:
        return None
    known = [key for key, rule in table.items() if not isinstance(rule, Key) or not rule.refused]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _other_stage(stage: int, stages: tuple[int, ...]) -> str:
    return f"stage {stage} has none, it is for stages {', '.join(map(str, stages))}; remove it"


def stage_of(zero: dict[str, Any]) -> int | None:
    stage = zero.get("stage")
    return int(stage) if _key(ZERO, "stage").accepts(stage) else None  # type: ignore[arg-type]


def _key(table: Keys, name: str) -> Key:
    rule = table[name]
    assert isinstance(rule, Key)
    return rule


def normalised(content: dict[str, Any], table: Keys) -> dict[str, Any]:
    """5e8 as 500000000, and without refused keys: they are at their default here, and DeepSpeed
    no longer takes some of them.
    """
    kept: dict[str, Any] = {}
    for name, value in content.items():
        rule = table[name]
        if not isinstance(rule, Key):
            kept[name] = normalised(value, rule) if isinstance(value, dict) else value
        elif not rule.refused:
            kept[name] = int(value) if rule.integer and value is not None else value
    return kept
