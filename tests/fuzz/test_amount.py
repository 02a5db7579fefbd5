"""The number of fuzz cases in CI."""

import importlib
from pathlib import Path

from tests.support import fuzz


def test_at_least_2000_cases_run_in_ci():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    assert sum(fuzz.registered.values()) >= 2_000, fuzz.registered
