"""Several runs on one page: differences are named, a run keeps its line style, gaps stay empty."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lpl_pretrain.cli.main import commands
from lpl_pretrain.config.load import dump
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.report import score_tables
from lpl_pretrain.report.charts import COLOURS, DASHES, Chart, draw, swatch
from lpl_pretrain.report.compare import (
    Column,
    differing,
    find_runs,
    labels_of,
    newest_grids,
    summary,
    write_comparison,
)
from lpl_pretrain.report.record import Series, read_run
from tests.support.configs import train_config
from tests.unit.report.conftest import metrics
from tests.unit.report.test_report import Page, outside_references


def change(run: RunDir, path: Path, **changes) -> RunDir:
    """A copy with other settings."""
    other = RunDir(path)
    shutil.copytree(run.path, path)
    other.config.write_text(dump(train_config(name="tiny", steps=120, **changes)))
    return other


@pytest.fixture
def sweep(run, tmp_path):
    """Three runs; the last has no LPL and has just begun."""
    folder = tmp_path / "a sweep"
    change(run, folder / "share=0.1", lpl={"target_fraction": 0.1})
    change(run, folder / "share=0.2", lpl={"target_fraction": 0.2})
    begun = change(run, folder / "share=null", lpl=None)
    for gone in ("evaluations", "samples"):
        shutil.rmtree(begun.path / gone)
    begun.metrics.write_text(
        "".join(
            json.dumps({**metrics(step), "samples_per_s": 50.0}) + "\n" for step in range(1, 11)
        )
    )
    (folder / "launch").mkdir()
    return folder


def test_one_page_of_a_folder_of_runs(sweep):
    done = CliRunner().invoke(commands, ["report", str(sweep)])
    assert done.exit_code == 0 and "comparison.html" in done.output
    page = Page((sweep / "comparison.html").read_text())
    for words in (
        "comparison of 3 runs",
        "share=0.1 on 0.1 120",
        "share=null off – 10 of 120",
        "24 step 120, w = 2.5",
        "Kernel distance (x), w = 2.5",
        "Samples at step 120",
        "kid_x; lower is better; bars: 95 % interval or standard error",
        "Weighted LPL / total loss",
    ):
        assert words in page.text, words
    assert page.text.count("lpl.target_fraction") == 1, (
        "what is equal in all is no column" and "optimizer.lr" not in page.text
    )
    assert page.tags.count("img") == 2 and outside_references(page) == []
    assert not {"script", "link"} & set(page.tags) and not list(sweep.glob(".*"))


def test_of_several_runs_and_of_one(sweep, run):
    both = [str(sweep / "share=0.1"), str(run.path)]
    assert (
        str(sweep.parent / "comparison.html")
        in CliRunner().invoke(commands, ["report", *both]).output
    )
    page = Page((sweep.parent / "comparison.html").read_text())
    assert "a sweep/share=0.1" in page.text and "comparison of 2 runs" in page.text
    own = sweep.parent / "own.html"
    assert (
        CliRunner().invoke(commands, ["report", str(run.path), "--output", str(own)]).exit_code == 0
    )
    assert "run report" in Page(own.read_text()).text and not run.report.exists()


def test_which_folders_are_runs(sweep, run):
    assert [found.path.name for found in find_runs([sweep])] == [
        "share=0.1",
        "share=0.2",
        "share=null",
    ]
    assert len(find_runs([sweep, sweep / "share=0.1", run.path])) == 4, "each once"
    (sweep / "share=10").mkdir()
    shutil.copy(run.config, sweep / "share=10")
    assert [found.path.name for found in find_runs([sweep])] == [
        "share=0.1",
        "share=0.2",
        "share=10",
        "share=null",
    ]
    for nothing in (sweep / "launch", sweep / "gone"):
        with pytest.raises(ConfigError, match="no run and no folder of runs"):
            find_runs([nothing])


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ([{"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}], {"b.c": ["2", "3"]}),
        ([{"a": 1e-4}, {"a": 2e-4}, {"a": 1e-4}], {"a": ["0.0001", "0.0002", "0.0001"]}),
        ([{"name": "x", "run_dir": "x"}, {"name": "y", "run_dir": "y"}], {}),
        (
            [{"s": None}, {"s": {"w": 1}}, {"s": {"w": 2}}],
            {"s": ["off", "on", "on"], "s.w": [None, "1", "2"]},
        ),
        ([{"s": None}, {"s": {"w": 1, "v": 3}}], {"s": ["off", "on"]}),
        ([{"a": 1}, {"a": 2}, {}], {"a": ["1", "2", None]}),
        ([{"a": 1}, {"a": 1, "new": True}], {}),
        ([{"a": [0.9, 0.99]}, {"a": [0.9, 0.95]}], {"a": ["[0.9, 0.99]", "[0.9, 0.95]"]}),
    ],
)
def test_what_differs(settings, columns):
    assert differing(settings) == [Column(key, values) for key, values in columns.items()]


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        (
            {"lpl": ["off", "on", "on"], "lpl.share": [None, "1", "2"]},
            ["lpl off", "share 1", "share 2"],
        ),
        (
            {"a.lr": ["1", "1", "2"], "b.lr": ["1", "2", "2"]},
            ["a.lr 1, b.lr 1", "a.lr 1, b.lr 2", "a.lr 2, b.lr 2"],
        ),
        ({"a": ["1", "2", None]}, ["x", "y", "z"]),
        ({"a": ["1", "1", "2"]}, ["x", "y", "z"]),
        ({"a": ["1", "2", "3" * 99]}, ["x", "y", "z"]),
        ({}, ["x", "y", "z"]),
    ],
)
def test_labels_tell_runs_apart(columns, labels):
    assert (
        labels_of([Column(key, values) for key, values in columns.items()], ["x", "y", "z"])
        == labels
    )


def test_every_line_has_its_own_style():
    count = len(COLOURS) * len(DASHES)
    assert len({swatch(number) for number in range(count)}) == count
    series = {str(number): Series([1, 2, 3], [1.0, 2.0, 3.0 + number]) for number in range(count)}
    looks = re.findall(
        r'style="fill: none(; stroke-dasharray[^;]*)?[^"]*stroke: (var\(--series-\d\))',
        draw(Chart("x", series), [], 3),
    )
    assert len(set(looks)) == count


def test_a_run_without_a_line_does_not_move_the_others(sweep):
    """Each run keeps its colour."""
    full, hole = Series([1, 2], [1.0, 2.0]), Series([], [])
    chart = draw(Chart("x", {"a": hole, "b": full}, legend=False, raw=False), [], 2)
    assert "var(--series-2)" in chart and chart.count("var(--series-1)") == draw(
        Chart("x", {"a": hole}, legend=False), [], 2
    ).count("var(--series-1)")


def records(*runs):
    """Evaluation records of each run, from its (step, value) pairs."""
    entry = {"metric": "fd_x", "weights": "ema", "guidance_scale": 1.0}
    return [
        [
            {"step": step, "protocol": {"name": "p"}, "results": [{**entry, "value": value}]}
            for step, value in run
        ]
        for run in runs
    ]


def test_newest_and_best_scores():
    found = summary("p", records([(1, 30.0), (2, 20.0), (3, 25.0)], [], [(1, 21.0)]))
    values = [[cell and (cell["step"], cell["value"]) for cell in row] for row in found["cells"]]
    assert values == [[(3, 25.0), (2, 20.0)], [None, None], [(1, 21.0), (1, 21.0)]]
    assert found["is_best"] == [True, False, False], "the lowest distance"


def test_where_higher_is_better(monkeypatch):
    monkeypatch.setattr(score_tables, "higher_is_better", lambda metric: True)
    assert summary("p", records([(1, 30.0)], [(1, 40.0)]))["is_best"] == [False, True]


def test_grids_are_of_the_newest_step_that_all_have(sweep):
    runs = [read_run(run) for run in find_runs([sweep])]

    def shown():
        grids, step = newest_grids(runs, [run.protocols().get("quick", []) for run in runs])
        return [grid and grid["step"] for grid in grids], step

    assert shown() == ([120, 120, None], 120)
    runs[0].run_dir.samples(120, "quick").unlink()
    assert shown() == ([60, 60, None], 60)
    runs[1].run_dir.samples(60, "quick").unlink()
    assert shown() == ([60, 120, None], None), "each its own where no step is common"


def test_differing_protocols_of_one_name_are_reported(sweep):
    path = RunDir(sweep / "share=0.2").evaluation(120, "quick")
    path.write_text(path.read_text().replace('"steps": 5', '"steps": 6'))
    (RunDir(sweep / "share=0.1").path / "provenance.json").write_text("{ not")
    page = Page(write_comparison(find_runs([sweep])).read_text())
    assert (
        "their scores are not comparable" in page.text
        and "share=0.1: provenance.json: not valid JSON" in page.text
    )


def test_nothing_but_a_configuration(run, tmp_path):
    for name in ("x", "y"):
        (tmp_path / "bare" / name).mkdir(parents=True)
        shutil.copy(run.config, tmp_path / "bare" / name)
    page = Page(write_comparison(find_runs([tmp_path / "bare"])).read_text())
    for words in (
        "All configurations are equal",
        "No checkpoint of these runs has a score",
        "Nothing logged yet",
    ):
        assert words in page.text
