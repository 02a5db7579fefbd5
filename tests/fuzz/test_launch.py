"""Fuzz names, folders and values: batch scripts hold no foreign line, and jobs have the submitted
configuration.
"""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from submitit.core.utils import DelayedSubmission

from launch import evaluation_jobs, sweep
from launch.batch_script import array_batch_script, batch_script, make_worker
from launch.cli import commands
from launch.evaluation_jobs import EvaluationWatcher
from launch.job import JobSpec, read_spec
from launch.job_folder import JobFolder
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.encode import EncodeConfig
from lpl_pretrain.config.load import dump, load_config, validate
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.protocol import EvaluateConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import LPLError
from tests.support.configs import train_config
from tests.support.fuzz import cases

PIECES = [
    *(
        "$(touch canary)",
        "`touch canary`",
        "; touch canary;",
        "\ntouch canary #\n",
        "\rtouch canary\r",
        "' touch canary '",
    ),
    *(
        "\n#SBATCH --uid=0\n",
        "#SBATCH --nodes=9",
        "${IFS}",
        "$HOME",
        "'",
        '"',
        "\\",
        " ",
        "#",
        " #2",
        ": ",
        "a: b",
        ",",
        "[",
        "]",
    ),
    *(
        "{",
        "}",
        "*",
        "?",
        "%j",
        "%u",
        "%%",
        "%",
        "&",
        "|",
        ">",
        "<",
        "!",
        "~",
        "=",
        "- ",
        "@",
        "null",
        "true",
        "1e3",
        "0x1",
        "~",
    ),
    *(
        "\t",
        "\x1b",
        "\x85",
        "\u2028",
        "\ufeff",
        "\u202e",
        "\U0001f600",
        "\udcff",
        "é",
        "name",
        "run",
        "..",
        "/",
        "a/b",
    ),
]
HOSTILE = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=20),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.lists(st.sampled_from([*PIECES[:6], *string.ascii_letters]), min_size=1, max_size=4).map(
        "".join
    ),
)
PLAIN = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], exclude_characters="%\\/"),
    min_size=1,
    max_size=20,
)
NAMES = st.one_of(HOSTILE, PLAIN)
LINE_BREAK_ATTACK = "x\ntouch canary #\n"


def shape(text: str) -> list[str]:
    """Option of sbatch, or first words of the command, of each line of a script."""
    return [re.match(r"#SBATCH --[a-z-]+|#.*|export \w+|\S*", line)[0] for line in text.split("\n")]


def profile_of(word: str, value: str) -> ClusterProfile:
    raw = {
        "partition": word or None,
        "exclude": ["n1"],
        "environment": {"X": value},
        "setup": ["true"],
        "python": "/bin/true",
    }
    return validate(ClusterProfile, raw, where="profile.yaml")


@cases(1000)
@given(NAMES, st.one_of(st.just("gpu"), HOSTILE), NAMES, st.booleans())
@example(LINE_BREAK_ATTACK, "gpu", "x", False)
@example("x", "gpu\n#SBATCH --uid=0", "x", False)
@example("x", "gpu", LINE_BREAK_ATTACK, True)
@example("50%", "gpu", "x", True)
@example("a\\b", "gpu", "x", False)
def test_scripts_hold_no_foreign_line(name, word, value, array):
    def created(folder: Path, profile: ClusterProfile) -> str:
        spec = JobSpec(
            "train", ["train", "x.yaml", as_override("name", name)], folder, 2, cwd="/home"
        )
        return (
            array_batch_script([spec], profile, 1, folder.parent / "links")
            if array
            else batch_script(spec, profile)
        )

    try:
        text = created(Path("/runs", name.lstrip("/")), profile_of(word, value))
    except LPLError as refusal:
        assert len(str(refusal)) < 1_000
        return
    assert shape(text) == shape(created(Path("/runs/x"), profile_of(word and "gpu", "x")))
    assert not [c for c in text if not c.isprintable() and c not in "\n\t" and ord(c) < 0xA0]


SRUN = """#!/bin/sh
printf '%s\\0' "$@" > "$NOTED"
printf '%s' "$X" > "$NOTED.x"
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Function that runs a script: (arguments of srun, $X, files that were created)."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    (folder / "home").mkdir()
    path, logged = f"{folder}:{os.environ['PATH']}", folder / "logged"

    def run(text: str) -> tuple[list[str], str, list[str]]:
        environment = {"PATH": path, "NOTED": str(logged), "SLURM_ARRAY_TASK_ID": "0"}
        subprocess.run(
            ["bash", "-s"],
            input=text.encode(),
            env=environment,
            cwd=folder / "home",
            check=True,
            capture_output=True,
        )
        arguments = os.fsdecode(logged.read_bytes()).split("\0")[:-1]
        return arguments, os.fsdecode(Path(f"{logged}.x").read_bytes()), os.listdir(folder / "home")

    return run


@cases(120)
@given(NAMES, NAMES, st.booleans())
@example(
    'it\'s a "run" #1 $(touch canary) `touch canary` ; touch canary', "$(touch canary)'\"", False
)
@example(LINE_BREAK_ATTACK, LINE_BREAK_ATTACK, False)
def test_scripts_run_no_foreign_command(shell, name, value, array):
    """srun gets the folder of the task, and the variable its value."""
    spec = JobSpec("train", ["train", "x.yaml"], Path("/runs", name.lstrip("/")), 2)
    try:
        profile = profile_of("gpu", value)
        links = spec.run_dir.parent / "links"
        text = (
            array_batch_script([spec], profile, 1, links) if array else batch_script(spec, profile)
        )
    except LPLError:
        return
    arguments, x, created = shell(text)
    assert created == [] and x == value
    folder = str(links / "%a") if array else str(spec.folder.path)
    assert arguments[-5:] == ["/bin/true", "-u", "-m", "submitit.core._submit", folder]


def resolve_argv(cls, argv: list[str], at: int):
    """Configuration that `lpl-pretrain` resolves from a command."""
    return load_config(
        cls, argv[at], [word for word in argv[at + 1 :] if not word.startswith("--")]
    )


def check_configuration(spec: JobSpec, cls, at: int) -> object:
    """Check that the printed command and the pickled one resolve to the submitted configuration."""
    with tempfile.TemporaryDirectory() as scratch:
        (stored := Path(scratch, "stored.yaml")).write_text(spec.config, encoding="utf-8")
        submitted = load_config(cls, stored)
        DelayedSubmission(make_worker(spec, ClusterProfile())).dump(Path(scratch, "task.pkl"))
        argv = DelayedSubmission.load(Path(scratch, "task.pkl")).function.argv
        assert argv == [
            *spec.argv[:at],
            str(spec.folder.config),
            *(w for w in spec.argv[at + 1 :] if w.startswith("--")),
        ]
    assert resolve_argv(cls, spec.argv, at) == submitted
    return submitted


FOLDERS = NAMES.filter(lambda text: text.strip() and "\0" not in text)
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["name", "run_dir", "data.folder", "autoencoder"]), FOLDERS).map(
            lambda pair: as_override(*pair)
        ),
        st.tuples(st.sampled_from(["name", "run_dir", "data.folder"]), NAMES).map(
            "=".join
        ),  # as a user types it
        st.sampled_from(
            [
                "steps=7",
                "optimizer.lr=1e-5",
                "optimizer.betas=[0.9, 0.95]",
                "lpl={target_fraction: 0.1}",
                "ema.decay=0.99",
            ]
        ),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a cluster profile."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "cluster.yaml").write_text("processes_per_node: 1\n")
    return folder


def write(path: Path, config) -> str:
    """Write a configuration, whose values may be any text."""
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return str(path)


def submitted_by(*arguments: str) -> list[JobSpec]:
    """Jobs that `python -m launch` would submit; none when it refuses."""
    specs: list[JobSpec] = []

    def submit(spec, profile):
        batch_script(spec, profile)
        specs.append(spec)
        return "1"

    def submit_array(some, profile, at_most):
        array_batch_script(some, profile, at_most, some[0].array_dir / "launch" / "array")
        specs.extend(some)
        return [f"1_{number}" for number in range(len(some))]

    with ExitStack() as stack:
        stack.enter_context(patch("launch.submit.submit", submit))
        stack.enter_context(patch("launch.submit.submit_array", submit_array))
        stack.enter_context(patch.object(sweep, "accepted", lambda *_: None))
        stack.enter_context(patch.object(evaluation_jobs, "check_protocol", lambda protocol: None))
        done = CliRunner().invoke(commands, arguments)
    if done.exception is not None:
        assert isinstance(done.exception, (LPLError, SystemExit)), (done.exception, done.output)
        return []
    return specs


def raw_train(name: str, folder: str, run_dir: str | None) -> dict:
    return {
        "name": name,
        "run_dir": run_dir,
        "steps": 6,
        "autoencoder": "asset:autoencoder_emoji",
        "data": {"folder": folder},
        "model": {"width": 32, "depth": 2, "heads": 2},
        "diffusion": {"prediction": "flow", "schedule": "rectified_flow"},
        "batch": {"global_batch_size": 8},
    }


@pytest.mark.parametrize(
    "name",
    ["run #2", "a: b", 'it\'s a "run"', "- x", "null", "1e3", "été \U0001f600", "$(touch canary)"],
)
def test_names_that_are_special_to_yaml_are_submitted(files, name):
    """The tests below would otherwise pass if every name were refused."""
    config = write(files / "named.yaml", raw_train(name, name, name))
    (spec,) = submitted_by(
        "train", config, as_override("name", name), "--cluster", str(files / "cluster.yaml")
    )
    settings = check_configuration(spec, TrainConfig, 1)
    assert (settings.name, settings.data.folder, settings.run_dir) == (
        name,
        name,
        str(Path(name).resolve()),
    )


@cases(150)
@given(
    NAMES,
    FOLDERS,
    st.none() | FOLDERS,
    OVERRIDES,
    st.none() | st.lists(FOLDERS, min_size=1, max_size=2),
)
@example("run #2", "data", None, [], None)
@example("a: b", "data", None, [], None)
@example("x", "data #1", "runs/a: b", ["name=it's #1"], ["a,b", 'c "d" #'])
@example(LINE_BREAK_ATTACK, "data", None, [], None)
@example("x", "\ufeff", "\x85\u2028", ["run_dir=~"], None)
def test_training_job_has_the_submitted_configuration(
    files, name, folder, run_dir, overrides, swept
):
    config = write(files / "train.yaml", raw_train(name, folder, run_dir))
    values = [as_override("", each).removeprefix("=") for each in swept or ()]
    axes = ["--sweep", f"data.folder={','.join(values)}"] if values else []
    specs = submitted_by(
        "train", config, "--cluster", str(files / "cluster.yaml"), *axes, "--", *overrides
    )
    for number, spec in enumerate(specs):
        settings = check_configuration(spec, TrainConfig, 1)
        assert Path(settings.run_dir or f"runs/{settings.name}") == spec.run_dir
        if axes:
            assert settings.data.folder == swept[number], "the given value"
        elif not overrides:
            assert (settings.name, settings.data.folder) == (name, folder)


@cases(60)
@given(FOLDERS, FOLDERS, NAMES)
@example("latents #2", "pictures: all", "x")
@example(LINE_BREAK_ATTACK, "x", "x")
def test_encoding_jobs_have_the_submitted_configuration(files, output, source, value):
    raw = {"source": source, "output": output, "autoencoder": value, "resolution_px": 64}
    config = write(files / "encode.yaml", raw)
    for spec in submitted_by(
        "encode",
        config,
        as_override("autoencoder", value),
        "--cluster",
        str(files / "cluster.yaml"),
    ):
        settings = check_configuration(spec, EncodeConfig, 1)
        assert Path(settings.output) == spec.run_dir == Path(output).resolve()
        assert (settings.source, settings.autoencoder) == (source, value)


@cases(50)
@given(FOLDERS, FOLDERS, NAMES, OVERRIDES)
@example("latents #2", "a: b", "run #2", ["steps=7"])
@example("latents", LINE_BREAK_ATTACK, "x", [])
def test_pipeline_jobs_have_the_submitted_configurations(files, output, run_dir, name, overrides):
    encoding = write(
        files / "e.yaml",
        {"source": "x", "output": output, "autoencoder": "asset:x", "resolution_px": 64},
    )
    training = write(files / "t.yaml", raw_train(name, "elsewhere", run_dir))
    given_files = (
        "--encode",
        encoding,
        "--train",
        training,
        "--cluster",
        str(files / "cluster.yaml"),
    )
    specs = submitted_by("pipeline", *given_files, "--", *overrides)
    assert [spec.kind for spec in specs] in ([], ["encode", "encode", "train"])
    for spec in specs[:-1]:
        assert check_configuration(spec, EncodeConfig, 1).output == str(Path(output).resolve())
    for spec in specs[-1:]:
        settings = check_configuration(spec, TrainConfig, 1)
        assert (
            settings.data.folder == str(Path(output).resolve())
            and Path(settings.run_dir) == spec.run_dir
        )


@cases(60)
@given(NAMES, FOLDERS, NAMES, st.booleans())
@example("run #2", "real: pictures", "p", True)
@example(LINE_BREAK_ATTACK, "x", "p", False)
def test_evaluation_jobs_have_the_submitted_configuration(files, run, reference, name, watch):
    """The same for the evaluation jobs that a watching job submits."""
    raw = {"name": name, "images": 8, "sampler": {"kind": "euler"}, "reference": reference}
    protocol = write(files / "protocol.yaml", raw)
    more = ["--watch"] if watch else []
    given_words = [run, protocol, as_override("reference", reference)]
    arguments = ["evaluate", "--cluster", str(files / "cluster.yaml"), *more, "--", *given_words]
    for spec in submitted_by(*arguments):
        settings = check_configuration(spec, EvaluateConfig, 2)
        assert (settings.name, settings.reference) == (name, reference) and spec.argv[1] == str(
            Path(run).resolve()
        )
        scoring = EvaluationWatcher(
            RunDir(spec.run_dir), spec.command[2:3], name, ClusterProfile(), 1, 1, spec.config
        ).job_spec(7)
        assert scoring.config == spec.config and scoring.command[:2] == [
            "evaluate",
            str(spec.run_dir),
        ]
        assert scoring.command[2:] == [str(scoring.folder.config), "--step=7", "--pending"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=5,
)
KEYS = ["kind", "part", "argv", "run_dir", "cwd", "nodes", "profile", "at_most", "job", "version"]


@cases(150)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(HOSTILE), min_size=1, max_size=3))
@example({"argv": ["-c", "import os"]})
@example({"part": "../.."})
@example({"job": "--user=me"})
@example({"profile": {"setup": [LINE_BREAK_ATTACK]}})
def test_changed_record_is_refused_or_harmless(files, changes):
    folder = JobFolder(files / "run" / "launch")
    folder.path.mkdir(parents=True, exist_ok=True)
    settings = train_config(run_dir=str(folder.run_dir))
    folder.write_config(dump(settings))
    record_of_run = {
        "job": "7",
        "kind": "train",
        "part": "",
        "argv": ["train", "x.yaml"],
        "run_dir": str(folder.run_dir),
        "nodes": 1,
    }
    folder.write_record(
        {
            **record_of_run,
            "cwd": "/",
            "profile": ClusterProfile().model_dump(mode="json"),
            **changes,
        }
    )
    try:
        spec, record = read_spec(folder)
        text = batch_script(spec, record.profile)
    except LPLError as refusal:
        assert len(str(refusal)) < 3_000
        return
    assert spec.folder == folder and make_worker(spec, record.profile).argv == [
        "train",
        str(folder.config),
    ]
    assert shape(text)[:3] == ["#!/bin/bash", "", "# Parameters"]


@cases(300)
@given(st.text(), st.sampled_from(["name", "data.folder"]))
@example("run #2", "name")
@example("a: b", "name")
@example("".join(map(chr, range(0x300))), "name")
@example("\ufeff\u2028\u2029\x85\U0001f600\U000e0001\ufffe\uffff\udcff", "name")
def test_any_text_can_be_an_override(text, key):
    name, _, value = as_override(key, text).partition("=")
    assert name == key and yaml.safe_load(value) == text == json.loads(value)
