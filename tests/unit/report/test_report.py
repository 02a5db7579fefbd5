"""The report is built from what a run has, needs no other file, and names missing parts."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest

from lpl_pretrain.cli import report as command
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.report.charts import Chart, draw, smoothed
from lpl_pretrain.report.formatting import duration, evenly_spaced, number
from lpl_pretrain.report.page import interruptions, last_step, render, write_report
from lpl_pretrain.report.provenance import provenance, start_row
from lpl_pretrain.report.record import Series, read_run
from tests.unit.report.conftest import metrics


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that do not close in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run: RunDir) -> Page:
    return Page(write_report(run).read_text())


def outside_references(page: Page) -> list[str]:
    """Values of attributes that would make a browser fetch something."""
    fetched = ("src", "href", "xlink:href")
    return [
        value
        for name, value in page.attributes
        if value
        and name != "alt"
        and (
            "http:" in value
            or "https:" in value
            or (name in fetched and not value.startswith(("data:", "#")))
        )
    ]


def test_a_whole_run(run):
    page = page_of(run)
    for words in (
        "complete",
        "120",
        "960",
        "100",
        "15.0 epochs",
        "resumed once",
        "quick, guidance 2.5",
        "20.0%",
        "30 → 24",
        "fd_x",
        "biased upwards",
        "kid_x by guidance scale w; lower is better; bars: 95 % interval or standard error",
        "0.38 ± 0.03",
        "From 5 images instead of 10, the newest score is 95",
        "step 120, guidance 2.5, ema weights",
        "some of the 5 images of the reference",
        "SIGTERM",
        "something new",
        "x.yaml",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 13 and page.tags.count("img") == 5
    assert not list(run.path.glob("*.tmp"))


def test_needs_nothing_else(run):
    page, text = page_of(run), run.report.read_text()
    assert outside_references(page) == []
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in text and "url(" not in text.replace("url(#", "")


def test_outside_references_are_noticed():
    for tag in (
        '<img src="https://x/y.png">',
        '<img src="y.png">',
        '<a href="http://x"></a>',
        '<svg xmlns="http://w3.org"></svg>',
    ):
        assert outside_references(Page(tag))


def test_text_is_escaped(run):
    text = write_report(run).read_text()
    assert "<b>tiny" not in text and "&lt;b&gt;tiny&lt;i&gt; &amp; co" in text
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_steps_trained_again_count_once_and_the_last_counts(run):
    record = read_run(run)
    series = record.series("loss/total")
    assert series.steps == list(range(1, 121))
    assert max(series.values[75:]) < 1  # what was logged beyond the resume, before it, is gone
    with run.metrics.open("a") as file:
        file.write(json.dumps(metrics(120, mark=3.0)) + "\n")
    assert read_run(run).series("loss/total").values[-1] > 3


def test_steps_beyond_a_resume_that_are_not_reached_again_are_dropped(run):
    lines = [metrics(10), metrics(20), {"event": "resumed", "step": 15}, metrics(18)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).series("loss/total").steps == [10, 18]


def test_a_torn_line_is_skipped_and_reported(run):
    run.metrics.write_text(run.metrics.read_text() + '{"step": 121, "loss/to')
    page = page_of(run)
    assert "1 unreadable line skipped" in page.text and read_run(run).lines[-1]["step"] == 120


@pytest.mark.parametrize(
    "gone, said",
    [
        ("config.yaml", "config.yaml is missing"),
        ("provenance.json", "provenance.json is missing"),
        ("evaluations", "No checkpoint has a score yet"),
        ("samples", "No sample grids"),
        ("metrics.jsonl", "Nothing logged yet"),
    ],
)
def test_missing_parts_are_named(run, gone, said):
    path = run.path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in page_of(run).text


@pytest.mark.parametrize(
    "name", ["config.yaml", "provenance.json", "evaluations/step_00000060/quick.json"]
)
def test_damaged_parts_are_named(run, name):
    (run.path / name).write_text("{ not: [valid")
    assert f"{name.split('/')[-1]}: not valid" in page_of(run).text


def test_a_run_without_lpl_says_so(run):
    run.config.write_text(run.config.read_text().split("lpl:")[0] + "lpl: null\n")
    run.metrics.write_text(json.dumps(metrics(1)) + "\n")
    assert "without the Latent Perceptual Loss" in page_of(run).text


def test_an_evaluation_without_scores_is_named(run):
    path = run.evaluation(60, "quick")
    path.write_text(json.dumps({"step": 60, "results": [], "protocol": {"name": "quick"}}))
    assert "quick.json: has no score" in page_of(run).text


def test_not_finite_numbers_are_drawn_around(run):
    wrong = {"loss/diffusion": math.nan, "grad_norm": math.inf, "samples_per_s": math.nan}
    lines = [{**metrics(step), **wrong} for step in range(1, 30)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Gradient norm" in page_of(run).text


def test_status(run):
    kept = run.metrics.read_text().splitlines()[:81]  # up to the event `stopped`
    run.metrics.write_text("\n".join(kept) + "\n")
    assert "stopped at step 75; the same command resumes" in page_of(run).text
    run.metrics.write_text("\n".join(kept[:50]) + "\n")
    assert "at step 50, running or interrupted" in page_of(run).text


def log(run, *lines):
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_start_that_made_no_step_is_no_resume(run):
    """An older version began a finished run again, with fewer steps to make than it had."""
    resumed = [{"event": "resumed", "step": step, "time_s": 1.7e9} for step in (100, 150, 150)]
    log(run, *map(metrics, range(1, 101)), resumed[0], *map(metrics, range(101, 151)), *resumed[1:])
    record = read_run(run)
    assert record.resumes == 1 and last_step(record) == 150 and "resumed once" in page_of(run).text
    assert "of 120" not in page_of(run).text, "150 of 120"


def test_a_resume_is_counted_though_its_steps_were_not_logged(run):
    stopped = {"event": "stopped", "step": 8, "time_s": 1.7e9}
    log(run, metrics(5), {"event": "resumed", "step": 5, "time_s": 1.7e9}, stopped)
    assert read_run(run).resumes == 1


def test_a_run_that_began_anew_shows_the_new_steps_alone(run):
    log(
        run,
        *map(metrics, range(1, 31)),
        {"event": "restarted", "step": 0, "time_s": 1.7e9},
        *map(metrics, range(1, 11)),
    )
    record = read_run(run)
    assert record.series("loss/total").steps == list(range(1, 11)) and record.resumes == 1


def test_all_starts_are_listed(run):
    old = json.loads(run.provenance.read_text())
    new = {
        "step": 75,
        "time_s": 1.7e9,
        "strategy": "fsdp2",
        "world_size": 4,
        "hosts": ["n1", "n2"],
        "code": "c" * 64,
    }
    new |= {
        "config_changes": {"parallel.strategy": ["ddp", "fsdp2"], "log.every_steps": [1, None]},
        "data_samples": 64,
    }
    run.provenance.write_text(json.dumps([old, new, "damaged"]))
    page = page_of(run)
    assert "– – – 2" in page.text, "of the older version's"
    assert (
        '75 2023-11-14 22:13:20 UTC fsdp2 4 n1, n2 cccccccccccc parallel.strategy: "ddp" → "fsdp2"'
        in page.text
    )
    assert (
        read_run(run).provenance["world_size"] == 4
        and "<script>alert" not in run.report.read_text()
    ), "the diff of the first"
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in run.report.read_text()


@pytest.mark.parametrize(
    "content",
    [
        "3",
        "[3]",
        '[{"hosts": 3, "config_changes": [1], "time_s": "x", "code": null}]',
        "[]",
        "null",
    ],
)
def test_odd_provenance_is_shown_as_far_as_it_goes(run, content):
    run.provenance.write_text(content)
    record = read_run(run)
    assert provenance(record)["starts"] == [start_row(start) for start in record.starts]
    odd = content in ("3", "[3]", "null")
    assert [problem.partition(":")[0] for problem in record.problems] == ["provenance.json"] * odd
    assert len(record.starts) == content.count("hosts")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(RunDir(tmp_path))


def test_command(run, capsys):
    command.run([str(run.path)])
    assert "report.html" in capsys.readouterr().out and run.report.is_file()


def test_the_same_files_make_the_same_charts(run):
    first, second = (render(read_run(run)).split("<footer>")[0] for _ in range(2))
    assert first == second


def test_charts_stay_small_and_mark_interruptions():
    long = Series(list(range(1, 50_001)), [1 + math.sin(i / 3) / 2 for i in range(50_000)])
    plain, marked = (
        draw(Chart("x", {"a": long}), [], 50_000),
        draw(Chart("x", {"a": long}), [25_000], 50_000),
    )
    assert len(plain) < 60_000 and marked.count("var(--event)") > plain.count("var(--event)")
    assert "#0a0001" not in plain and "var(--series-1)" in plain


def test_labels_of_small_values_keep_their_digits():
    markup = draw(
        Chart("x", {"line": Series([1, 2, 3], [0.0151, 0.0162, 0.0173])}, log=True),
        events=[],
        last_step=3,
    )
    labels = re.findall(r">(0\.[0-9]+)</text>", markup)
    assert len(labels) >= 2 and len(set(labels)) == len(labels)


def test_smoothing_keeps_constants_and_does_not_spread_nan():
    assert smoothed([2.0] * 100) == [2.0] * 100
    noisy = [1.0, -1.0] * 100
    assert max(map(abs, smoothed(noisy))) < 0.5
    assert all(map(math.isfinite, smoothed([1.0, math.nan, 1.0])))


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "–"),
        (math.nan, "–"),
        (96_000, "96,000"),
        (1_730_000, "1.73M"),
        (211.4, "211"),
        (0.0412, "0.0412"),
    ],
)
def test_number(value, words):
    assert number(value) == words


@pytest.mark.parametrize("seconds, words", [(12, "12 s"), (480, "8 min"), (7_500, "2 h 05 min")])
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_evenly_spaced_items_keep_the_ends():
    assert evenly_spaced(list(range(100)), 6) == [0, 20, 40, 59, 79, 99]
    assert evenly_spaced([1, 2], 6) == [1, 2]


def test_lpl_panels_are_shown(run):
    page = page_of(run)
    assert "a heatmap of the difference of their features" in page.text
    assert [
        value for name, value in page.attributes if name == "alt" and "LPL panels" in value
    ] == [f"LPL panels at step {step}" for step in (60, 120)]
    shutil.rmtree(run.path / "lpl")
    assert "a heatmap of the difference" not in page_of(run).text


def test_four_lpl_panels_are_spread_over_the_run(run):
    for step in range(20, 120, 20):
        shutil.copy(run.panels("lpl", 120), run.panels("lpl", step))
    shown = [
        value for name, value in page_of(run).attributes if name == "alt" and "LPL panels" in value
    ]
    assert [int(words.split()[-1]) for words in shown] == [20, 60, 80, 120]


def test_phases_and_arithmetic_are_drawn_as_far_as_they_were_logged(run):
    text = page_of(run).text
    assert (
        "Time of a step by phase" in text
        and "Arithmetic throughput" in text
        and "Model FLOPs utilisation" not in text
    )
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]
    run.metrics.write_text("".join(json.dumps({**line, "mfu": 0.4}) + "\n" for line in kept))
    text = page_of(run).text
    assert "Time of a step by phase" not in text and "Model FLOPs utilisation" in text


def test_spikes_are_shown(run):
    """Each in the table and on the curves; what a rollback has undone is no longer on them."""
    about = {
        "quantity": "the gradient norm",
        "value": 9.0,
        "bound": 2.0,
        "median": 1.0,
        "samples": ["sample 7 (a.tar row 3)"],
    }
    more = [
        {"event": "spike", "step": 100, "time_s": 1.7e9, "action": "skip", **about},
        {
            "event": "spike",
            "step": 119,
            "time_s": 1.7e9,
            "action": "rollback",
            "to_step": 110,
            "jump_updates": 9,
            **about,
        },
        metrics(111, mark=5.0),
    ]
    more.insert(1, more[0])  # met again by a resumed run
    before = draw(Chart("x", {"y": Series([1, 2], [1.0, 2.0])}), interruptions(read_run(run)), 120)
    with run.metrics.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in more))
    record = read_run(run)
    assert [line["step"] for line in record.lines] == list(range(1, 112))
    assert record.lines[-1]["loss/total"] == pytest.approx(1 / 111 + 5.0)
    assert interruptions(record) == [75, 100, 119]
    assert len(
        draw(Chart("x", {"y": Series([1, 2], [1.0, 2.0])}), interruptions(record), 120)
    ) > len(before)
    text = page_of(run).text
    for wanted in (
        "spikes 2 1 rolled back",
        "action = rollback",
        "to_step = 110",
        "jump_updates = 9",
        "sample 7 (a.tar row 3)",
    ):
        assert wanted in text, wanted
