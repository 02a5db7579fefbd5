"""Files of a run that are damaged or come from elsewhere: a page names them, shows nothing from
outside, and runs nothing.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.errors import ConfigError
from lpl_pretrain.report import embed
from lpl_pretrain.report.compare import find_runs, write_comparison
from lpl_pretrain.report.page import write_report
from lpl_pretrain.report.record import read_run
from tests.unit.report.test_report import Page, outside_references

SECRET = b"root:x:0:0:a line of a file outside of the run"
SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
RECORD = "evaluations/step_00000060/quick.json"


def edit(run: RunDir, name: str = RECORD, **changes) -> None:
    """Dotted keys of a JSON file, with `__` for the dot."""
    path = run.path / name
    raw = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = raw
        for parent in parents:
            section = section[int(parent)] if isinstance(section, list) else section[parent]
        section[last] = value
    path.write_text(json.dumps(raw))


def pages(run: RunDir) -> list[str]:
    """Report of the run, and its comparison with a sound run."""
    sound = run.path.parent / "runs" / "sound"
    if not sound.exists():
        shutil.copytree(run.path, sound, symlinks=True)
    report, comparison = write_report(run), write_comparison(find_runs([run.path, sound]))
    return [path.read_text() for path in (report, comparison)]


@pytest.fixture
def bare(run) -> RunDir:
    """Without what its training logged, whose charts take most of the time."""
    run.metrics.unlink()
    shutil.rmtree(run.path / "lpl")
    shutil.copytree(run.path, run.path.parent / "runs" / "sound")
    return run


@pytest.fixture
def outside(tmp_path) -> Path:
    """A file that no page may show, and an image outside of the run."""
    (tmp_path / "passwd").write_bytes(SECRET)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "elsewhere.png")
    return tmp_path


FOREIGN = {
    "../passwd": "is outside of the run's samples/",
    "samples/../../passwd": "is outside of the run's samples/",
    "config.yaml": "is outside of the run's samples/",
    "samples/link.png": "is outside of the run's samples/",
    "samples/text.png": "neither a PNG nor a JPEG",
    "samples/a\0b": "cannot be read",
    "samples/" + "x" * 5_000: "cannot be read",
    7: "wanted the name of a file",
    ("samples/text.png",): "wanted the name of a file",
}


@pytest.mark.parametrize(("name", "words"), FOREIGN.items(), ids=lambda value: str(value)[:20])
def test_only_images_of_the_run_are_embedded(bare, outside, name, words):
    (bare.path / "samples" / "link.png").symlink_to(outside / "passwd")
    (bare.path / "samples" / "text.png").write_bytes(SECRET)
    problems: list[str] = []
    assert embed.embed_image(bare.path, "samples", name, RECORD, problems) is None
    assert (
        len(problems) == 1 and problems[0].startswith(f"{RECORD}: image ") and words in problems[0]
    )


@pytest.mark.parametrize(
    "name", ["../passwd", "{outside}/passwd", "{outside}/elsewhere.png", ["x"]], ids=str
)
def test_pages_say_what_they_do_not_embed(bare, outside, name):
    edit(bare, samples=name.format(outside=outside) if isinstance(name, str) else name)
    shown, stolen = [Page(text) for text in pages(bare)], base64.b64encode(SECRET).decode()[:-4]
    assert f"{RECORD}: image " in shown[0].text and "not shown" in shown[0].text
    assert shown[0].tags.count("img") == 2, "the other pictures are there"
    for page in shown:
        assert (
            not [value for _, value in page.attributes if value and stolen in value]
            and page.tags.count("img") >= 2
        )


def test_only_real_images_of_the_run_are_embedded(bare, outside):
    edit(bare, "evaluations/step_00000120/quick.json", reference__grid="../../passwd")
    assert "is outside of the run's evaluations/" in Page(pages(bare)[0]).text


def test_a_comparison_names_what_it_does_not_show(bare, outside):
    for step in (60, 120):
        edit(bare, f"evaluations/step_{step:08d}/quick.json", samples="../passwd")
    assert "samples/; not shown" in Page(pages(bare)[1]).text


def test_a_image_is_of_bounded_size_and_may_be_a_jpeg(bare, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(bare.path / "samples" / "big.jpg")
    edit(bare, samples="samples/big.jpg")
    assert "data:image/jpeg;base64," in pages(bare)[0]
    monkeypatch.setattr(embed, "MAX_IMAGE_BYTES", 300)
    assert "larger than 0 MiB" in Page(pages(bare)[0]).text


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json"])
def test_a_link_to_a_file_outside_is_not_shown(bare, outside, name):
    (bare.path / name).unlink()
    (bare.path / name).symlink_to(outside / "passwd")
    text = pages(bare)[0]
    assert (
        SECRET.decode() not in text
        and f"{name}: is a link to a file outside of the run; not shown" in Page(text).text
    )


def test_a_run_behind_a_link_is_a_run(bare, tmp_path):
    (tmp_path / "link").symlink_to(bare.path)
    page = Page(write_report(RunDir(tmp_path / "link")).read_text())
    assert page.tags.count("img") == 3 and "not shown" not in page.text


def test_text_of_every_file_is_escaped(run):
    for step in (60, 120):
        name = f"evaluations/step_{step:08d}/quick.json"
        edit(
            run,
            name,
            protocol__name=SCRIPT,
            results__0__metric=SCRIPT,
            results__1__weights=SCRIPT,
            protocol__best=SCRIPT,
        )
        edit(run, name, protocol__sampler={"kind": SCRIPT, "steps": 5}, samples=SCRIPT)
    edit(
        run,
        "provenance.json",
        argv=[SCRIPT],
        git_diff=SCRIPT,
        versions={SCRIPT: SCRIPT},
        host=SCRIPT,
    )
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines += [
        {"step": 121, f"lpl/stage/{SCRIPT}/contribution": 1.0},
        {"step": 121, "event": SCRIPT, SCRIPT: SCRIPT},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.config.write_text(
        f"name: {json.dumps(SCRIPT)}\nsteps: 120\n{json.dumps(SCRIPT)}: {json.dumps(SCRIPT)}\n"
    )
    for text in pages(run):
        page = Page(text)  # its tags close in order
        assert "<script" not in text and not outside_references(page)
        assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_text_of_charts_is_neither_formula_nor_markup(bare):
    """matplotlib reads dollars as mathematics, and raises for what is none."""
    for step in (60, 120):
        for number, weights in enumerate(["$\\bad{$", 'a version="1"', "font: 8px x", "#0a0001"]):
            edit(
                bare,
                f"evaluations/step_{step:08d}/quick.json",
                **{f"results__{number}__weights": weights},
            )
    folder = bare.path.parent / "of $1 and $\\bad"
    shutil.copytree(bare.path, folder / "x $^$")
    shutil.copytree(bare.path, folder / "y $_$")
    text = write_comparison(find_runs([folder])).read_text()
    assert "$_$" in Page(text).text
    report = Page(write_report(bare).read_text()).text
    for words in (
        "$\\bad{$, w = 1",
        'a version="1", w = 1',
        "font: 8px x, w = 2.5",
        "#0a0001, w = 2.5",
    ):
        assert words in report, words


DAMAGED = [
    {"step": "60"},
    {"step": -1},
    {"step": 10**30},
    {"step": True},
    {"results__0__value": "24"},
    {"results__0__value": 10**400},
    {"results__0__value": 1e300},
    {"results__0__value": None},
    {"results__0__guidance_scale": float("nan")},
    {"results__0__guidance_scale": []},
    {"results__0__images": -1},
    {"results__0__metric": "x" * 10_000},
    {"results__0__metric": 5},
    {"results__1__std": "much"},
    {"protocol__name": None},
    {"protocol__sampler": {"kind": "euler"}},
    {"protocol__sampler": "euler"},
    {"protocol": "x"},
    {"extractors": {"x": {"dimension": "many"}}},
    {"extractors": []},
    {"reference": "x"},
    {"results": [1]},
    {"results": [{}] * 3_000},
]
ODD = [
    {"results__0__value": float("nan")},
    {"results__0__value": float("inf")},
    {"results__1__std": -1.0},
    {"results__1__low": 9.0},
    {"results__1__high": None},
    {"results__0__at_half": None},
    {"samples": None},
    {"reference": {}},
    {"protocol__sampler": None},
    {"extractors": {}},
]
OTHER_SHAPES = [
    "[]",
    "null",
    "7",
    '{"step": 1, "protocol": {"name": "x"}}',
    '{"step": 1, "results": [], "protocol": {}}',
]


def spread(bare: RunDir, changes: list) -> list[str]:
    """A record for each change, at a step of its own; their names."""
    names = []
    for number, change in enumerate(changes):
        path = bare.evaluation(1_000 + number, "quick")
        path.parent.mkdir()
        shutil.copy(bare.path / RECORD, path)
        names.append(str(path.relative_to(bare.path)))
        if isinstance(change, str):
            path.write_text(change)
        else:
            edit(bare, names[-1], **{"step": 1_000 + number, **change})
    return names


def test_damaged_records_are_named_and_the_others_are_shown(bare):
    damaged, other = spread(bare, [*DAMAGED, *OTHER_SHAPES])[: len(DAMAGED)], len(OTHER_SHAPES)
    for text in pages(bare):
        page = Page(text)
        assert [name for name in damaged if f"{name}: damaged: " not in page.text] == []
        assert page.text.count("has no score") + page.text.count("not valid") == other
        assert len(page.text) < 60_000 and page.tags.count("img") >= 2


def test_odd_records_are_shown(bare):
    spread(bare, ODD)
    for text in pages(bare):
        assert "damaged" not in Page(text).text


DEEP = "[" * 5_000 + "]" * 5_000


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
WRONG_TEXT = [
    *(
        (name, text)
        for name in (RECORD, "provenance.json")
        for text in (DEEP, "9" * 10_000, '"\\ud800"', "{ not", "[1]")
    ),
    *(
        ("config.yaml", text)
        for text in (
            "a: " + "[" * 400 + "]" * 400,
            "a: &a [*a]",
            BOMB,
            "a: 2001-99-99",
            "? [a]\n: b",
            "a: !!python/object/apply:os.system [x]",
            'a: "\\ud800"',
        )
    ),
]


@pytest.mark.parametrize(("name", "text"), WRONG_TEXT, ids=lambda value: str(value)[:20])
def test_a_damaged_file_is_named(bare, name, text):
    (bare.path / name).write_text(text)
    problems = read_run(bare).problems
    assert (
        len(problems) == 1
        and problems[0].startswith(f"{name}: not valid")
        and len(problems[0]) < 500
    )


def test_damaged_files_leave_a_page(bare):
    for name in (RECORD, "provenance.json", "config.yaml"):
        (bare.path / name).write_text("{ not")
    for text in pages(bare):
        assert Page(text).text.count("not valid") == 3


def test_settings_and_provenance_of_other_types(bare):
    bare.config.write_text(
        "name: [1]\nsteps: many\nlpl: 3\n1: 2\n2001-01-01: {true: null}\nx: !!binary aGk=\n"
    )
    provenance = {
        "versions": [1],
        "data_samples": "many",
        "argv": {"a": 1},
        "git_diff": 5,
        "x": "y" * 100_000,
    }
    bare.provenance.write_text(json.dumps(provenance))
    for text in pages(bare):
        assert len(text) < 1_500_000 and "y" * 2_000 not in text


def test_lines_of_other_types(run):
    """Each of them is skipped and counted, or left out of the charts."""
    odd = [
        [],
        {"step": "1"},
        {
            "step": 130,
            "loss/diffusion": "low",
            "samples_seen": "all",
            "samples_per_s": [1],
            "lr": 10**400,
        },
        {"step": 131, "event": ["stopped"], "time_s": "now"},
        {"step": 132, "event": "stopped", "time_s": 1e300, "x": {"y": "z" * 100_000}},
        {"step": True},
        {"step": -5},
        {"step": 10**20},
    ]
    run.metrics.write_text(
        "".join(json.dumps(line) + "\n" for line in odd) + DEEP + "\n" + run.metrics.read_text()
    )
    report = Page(pages(run)[0])
    assert "6 unreadable lines skipped" in report.text and "z" * 2_000 not in report.text


def test_very_many_stages_and_events_take_a_bounded_page(run):
    lines = [{"step": 1, **{f"lpl/stage/{n}/contribution": 1.0 for n in range(500)}}]
    lines += [{"step": n, "event": "resumed"} for n in range(2, 3_000)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run).read_text())
    assert "The last 200 of 2998" in page.text and len(page.text) < 60_000


def test_a_page_that_cannot_be_written_is_an_error(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, tmp_path / "file" / "report.html")


def test_a_very_large_file_is_not_read(bare):
    bare.config.write_text("x" * (embed.MAX_CONFIG_BYTES + 1))
    assert read_run(bare).problems == ["config.yaml: larger than 1 MiB; not shown"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(bare):
    bare.provenance.chmod(0)
    assert "provenance.json: cannot be read" in Page(pages(bare)[0]).text
