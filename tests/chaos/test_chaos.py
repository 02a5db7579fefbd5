"""The campaign of tools/chaos.py in a few minutes: a fixed seed, every series that needs no scheduler, and what it must find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.faults.campaign import Campaign
from tools.faults.plan import FileFault

FAULTS = {"encode": 24, "train_local": 20, "train_fsdp2": 5, "train_zero2": 4, "train_zero3": 4, "evaluate": 6}
FULL = FileFault("disk full", 0, "write", "full", 2, "latents-")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("chaos"), seed=0)


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_happens_a_job_ends_like_one_left_alone(campaign: Campaign, name: str) -> None:
    tally = campaign.run(name, lambda tally: tally.faults.total() >= FAULTS[name])
    assert not tally.violations, "\n".join(map(str, tally.violations))
    assert tally.faults.total() >= FAULTS[name] and tally.recovered == tally.iterations > 0


def test_has_teeth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are written in place: a kill between two writes, or a full disk, leaves half of one, which is believed."""
    broken = Campaign(tmp_path, seed=0, module="tests.chaos.broken")
    half = FileFault("SIGKILL", 0, "close", "kill", 1, "index.json")
    monkeypatch.setattr("tools.faults.campaign.draw", lambda *args, **kwargs: [half])
    tally = broken.run("encode", lambda tally: tally.iterations >= 1, only=0)
    assert tally.faults["SIGKILL"] and tally.violations
