"""DeepSpeed JSONs at random: refused in our words, or accepted by us, and then by DeepSpeed's own
configuration too.
"""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lpl_pretrain.config.zero import read_zero_config
from lpl_pretrain.config.zero.check import find_problems
from lpl_pretrain.config.zero.foreign import adapt_file
from lpl_pretrain.config.zero.keys import OWNED, TUNING, ZERO, Key
from lpl_pretrain.errors import ConfigError
from tests.support.fuzz import cases

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "zero").glob("*.json"))
SPECIAL = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    5e8,
    1.5,
    10**30,
    1e300,
    float("nan"),
    float("inf"),
    "auto",
    "5e8",
    "",
    "cpu",
    [],
    {},
]
ANYTHING = st.recursive(
    st.sampled_from(SPECIAL) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=5,
)


def keys_of(table) -> st.SearchStrategy[str]:
    """Known keys, and known keys with one character taken out."""
    known = st.sampled_from(sorted(table))
    return (
        known
        | known
        | st.builds(
            lambda key, at: key[: at % len(key)] + key[at % len(key) + 1 :],
            known,
            st.integers(0, 40),
        )
    )


def values_of(key: str, table) -> st.SearchStrategy:
    """Often one that the key takes."""
    rule = table.get(key)
    if isinstance(rule, dict):
        return objects(rule) | ANYTHING
    if isinstance(rule, Key):
        return st.just(rule.default) | st.sampled_from(SPECIAL).filter(rule.accepts) | ANYTHING
    return ANYTHING


def objects(table, most: int = 4) -> st.SearchStrategy[dict]:
    pair = keys_of(table).flatmap(lambda key: st.tuples(st.just(key), values_of(key, table)))
    return st.lists(pair, max_size=most).map(dict)


def zero(most: int = 4) -> st.SearchStrategy[dict]:
    stages = st.sampled_from([0, 1, 2, 3, 3, 2, 2.0, 4, True, "2", None])
    return st.builds(lambda stage, rest: {"stage": stage, **rest}, stages, objects(ZERO, most))


FILES = st.builds(
    lambda inner, rest: {**rest, "zero_optimization": inner},
    zero(),
    objects({**TUNING, **dict.fromkeys(OWNED)}, most=3),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("zero") / "zero.json"


@pytest.fixture(scope="module")
def deepspeed():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig


def accepted(file):
    """Content of a file, or None after a message that is short and names the file."""
    try:
        return read_zero_config(file)
    except ConfigError as error:
        assert str(file) in str(error) and len(str(error)) < 8_000, (
            "20 lines at most, values shortened"
        )
        return None


def accepted_by_deepspeed(settings, model) -> None:
    found = model(**settings["zero_optimization"])
    assert int(found.stage) == settings["zero_optimization"]["stage"]
    for name in type(found).model_fields:
        if name in settings["zero_optimization"] and isinstance(
            settings["zero_optimization"][name], (bool, int)
        ):
            assert getattr(found, name) == settings["zero_optimization"][name], name


@cases(150)
@example({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 5}})
@example({"zero_optimization": {"stage": 2, "mics_shard_size": -1, "cpu_offload": False}})
@example({"zero_optimization": {"stage": True}})
@example({"zero_optimization": {"stage": 3, "zenflow": {}}})
@given(FILES)
def test_random_files(file, deepspeed, content):
    file.write_text(json.dumps(content))
    settings = accepted(file)
    if settings is not None:
        accepted_by_deepspeed(settings, deepspeed)
        file.write_text(json.dumps(settings))
        assert read_zero_config(file) == settings


@cases(100)
@example(0, b"\xef\xbb\xbf", 0, 0)
@example(0, b"\0", 5, 1)
@given(
    st.integers(0, len(SHIPPED) - 1), st.binary(max_size=4), st.integers(0, 300), st.integers(0, 4)
)
def test_damaged_bytes_of_shipped_files(file, deepspeed, number, inserted, at, cut):
    raw = SHIPPED[number].read_bytes()
    file.write_bytes(raw[: at % len(raw)] + inserted + raw[at % len(raw) + cut :])
    settings = accepted(file)
    if settings is not None:
        accepted_by_deepspeed(settings, deepspeed)


@cases(100)
@example(
    {"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
)
@example({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": True})
@example({"scheduler": {"type": ["x"], "params": 3}, "train_batch_size": -1})
@given(FILES | st.dictionaries(st.sampled_from(sorted({*OWNED, *TUNING})), ANYTHING, max_size=4))
def test_what_is_adapted_is_accepted(file, deepspeed, content):
    """A second adaptation changes nothing; every key is kept, or named as removed or changed."""
    file.write_text(json.dumps(content))
    try:
        adapted = adapt_file(file)
    except ConfigError as error:
        assert "stage" in str(error) or "nested" in str(error)
        return
    assert not find_problems(adapted.settings)
    changed = {change.path[0] for change in adapted.changes}
    assert content.keys() - adapted.settings.keys() <= changed
    assert all(len(str(change)) < 1_000 for change in adapted.changes)
    file.write_text(adapted.dump())
    assert read_zero_config(file) == adapted.settings
    again = adapt_file(file)
    assert again.settings == adapted.settings and again.changes == []
    accepted_by_deepspeed(adapted.settings, deepspeed)
