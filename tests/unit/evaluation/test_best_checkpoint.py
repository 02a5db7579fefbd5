"""The best checkpoint, for any order in which scores arrive, and the warning of worse scores."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.evaluation.best_checkpoint import update_best


def scored(folder, values, *, metric="fid", best="fid", patience=3):
    """Records of steps 1, 2, ... in that order; returns the warnings after the last one."""
    run_dir, said = RunDir(folder), []
    protocol = SimpleNamespace(name="p", best=best, patience=patience)
    for step, value in enumerate(values, start=1):
        path = run_dir.evaluation(step, "p")
        path.parent.mkdir(parents=True)
        shared = {"metric": metric, "guidance_scale": 1.5}
        entries = [
            {**shared, "value": value + 1, "weights": "raw"},
            {**shared, "value": value, "weights": "ema"},
        ]
        other = {**shared, "metric": "other", "value": -99.0, "weights": "ema"}
        record = {"format_version": 2, "step": step, "protocol": {"name": "p", "best": best}}
        path.write_text(json.dumps({**record, "results": [*entries, other]}))
        said = update_best(run_dir, protocol)
    return run_dir, said


@pytest.mark.parametrize(
    ("metric", "values", "step"),
    [
        ("fid", [9, 5, 7], 2),
        ("fid", [5, 5, 7], 1),
        ("recall_x", [0.1, 0.2, 0.3], 3),
        ("kid", [3.0], 1),
    ],
)
def test_the_best_step(tmp_path, metric, values, step):
    run_dir, said = scored(tmp_path, values, metric=metric, best=metric)
    best = json.loads(run_dir.best("p").read_text())
    weights = "raw" if metric.startswith("recall") else "ema"
    assert (best["step"], best["metric"], best["weights"], best["guidance_scale"]) == (
        step,
        metric,
        weights,
        1.5,
    ) and not said


def test_a_word_when_scores_worsen(tmp_path):
    assert scored(tmp_path / "a", [9, 5, 7, 6])[1] == []
    (warning,) = scored(tmp_path / "b", [9, 5, 7, 6, 8])[1]
    assert "fid has been worse than 5 of step 2 for 3 evaluations (now step 5)" in warning


def test_best_names_a_score_that_is_not_computed(tmp_path):
    run_dir, (warning,) = scored(tmp_path, [9], best="kid")
    assert (
        warning == "best=kid: no score has this name; the records have fid, other"
        and not run_dir.best("p").exists()
    )
