"""Records of jobs: `launch resume` submits the same job again, or refuses the record."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from launch import job as job_module
from launch.batch_script import make_worker
from launch.cli import commands
from launch.job import JobSpec, read_spec
from launch.job_folder import JobFolder
from launch.monitor import cancel, status_report
from launch.submit import submit
from lpl_pretrain.config.cluster import ClusterProfile
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError
from tests.support.configs import train_config


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """Programs that log their arguments; sbatch accepts everything."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        line = (
            f'echo {name} "$@" >> {tmp_path}/commands; '
            f"{'echo Submitted batch job 4711' if name == 'sbatch' else ':'}"
        )
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def folder(scheduler):
    """Job folder of a submitted training."""
    run = scheduler / "a run"
    settings = train_config(run_dir=str(run))
    (scheduler / "train.yaml").write_text(dump(settings))
    spec = JobSpec("train", ["train", str(scheduler / "train.yaml")], run, 2, config=dump(settings))
    submit(spec, ClusterProfile(partition="gpu"))
    return JobFolder(run / "launch")


def commands_of(scheduler, program):
    return [
        line
        for line in (scheduler / "commands").read_text().splitlines()
        if line.startswith(program)
    ]


def test_resume_submits_the_same_job(folder, scheduler, monkeypatch):
    """Resume works from any folder, also when the configuration file has been removed."""
    before, record = read_spec(folder)
    (scheduler / "train.yaml").unlink()
    monkeypatch.chdir(folder.path)
    after, _ = read_spec(folder)
    assert after == before and after.cwd == record.cwd != os.getcwd()
    assert make_worker(after, record.profile).argv == ["train", str(folder.config)]
    done = CliRunner().invoke(commands, ["resume", str(folder.run_dir)])
    assert done.exit_code == 0 and len(commands_of(scheduler, "sbatch")) == 2, done.exception


def test_edits_after_the_submission_do_not_reach_the_job(folder, scheduler):
    submitted = load_config(TrainConfig, scheduler / "train.yaml")
    (scheduler / "train.yaml").write_text(dump(train_config(steps=999)))
    spec, _ = read_spec(folder)
    assert load_config(TrainConfig, spec.command[1], spec.command[2:]) == submitted


def test_record_of_an_older_version_is_submitted_again(folder):
    """Such a record has neither a working directory nor a stored configuration."""
    record = folder.read_raw_record()
    folder.write_record(
        {key: value for key, value in record.items() if key not in ("cwd", "part", "at_most")}
    )
    folder.config.unlink()
    spec, _ = read_spec(folder)
    assert spec.command == spec.argv == record["argv"] and spec.cwd == os.getcwd()


HOSTILE = [
    {"argv": ["-c", "import os; os.system('touch PWNED')"]},
    {"argv": ["encode", "x.yaml"]},
    {"argv": []},
    {"argv": "train x.yaml"},
    {"argv": ["train", 5]},
    {"argv": ["train", "a\0b"]},
    {"argv": None},
    {"kind": "python"},
    {"kind": "watch"},
    {"kind": ["train"]},
    {"part": "../../elsewhere"},
    {"part": "/etc"},
    {"part": 7},
    {"kind": "watch", "argv": ["watch"], "part": "watch/../.."},
    {"run_dir": "/elsewhere"},
    {"run_dir": "x\ntouch PWNED"},
    {"run_dir": None},
    {"nodes": "2; touch PWNED"},
    {"nodes": 0},
    {"profile": {"partition": "gpu\n#SBATCH --uid=0"}},
    {"profile": {"setup": ["true\ntouch PWNED"]}},
    {"profile": {"setup": ["echo 'open"]}},
    {"profile": {"unknown": 1}},
    {"profile": None},
    {"profile": []},
    {"cwd": "a\nb"},
    {"cwd": 3},
    {"job": "--user=root"},
    {"job": 4711},
    {"job": "4711\n"},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=str)
def test_edited_record_is_refused(folder, scheduler, changes):
    folder.write_record({**folder.read_raw_record(), **changes})
    done = CliRunner().invoke(commands, ["resume", str(folder.run_dir)])
    assert isinstance(done.exception, ConfigError), done.exception
    assert len(commands_of(scheduler, "sbatch")) == 1 and not list(scheduler.rglob("PWNED"))


@pytest.mark.parametrize(
    "text", ["", "{ not", "[1]", "null", "[" * 5_000, b"\xff\xfe", '{"job": {}}'], ids=str
)
def test_error_names_a_damaged_record(folder, scheduler, text):
    folder.record_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in ("status", "cancel", "resume", "logs"):
        done = CliRunner().invoke(commands, [command, str(folder.run_dir)])
        assert isinstance(done.exception, ConfigError) and str(folder.record_file) in str(
            done.exception
        ), command
    assert commands_of(scheduler, "scancel") == [] and len(commands_of(scheduler, "sbatch")) == 1


def test_option_instead_of_a_job_id_is_refused(folder, scheduler):
    folder.write_record({**folder.read_raw_record(), "job": "--user=me"})
    with pytest.raises(ConfigError, match="job='--user=me': wanted the number of a job"):
        cancel(folder.run_dir)
    assert commands_of(scheduler, "scancel") == []


def test_stored_configuration_of_another_run_is_refused(folder):
    folder.config.write_text(dump(train_config(run_dir="/elsewhere")))
    with pytest.raises(ConfigError, match="its command trains in /elsewhere"):
        read_spec(folder)
    folder.config.write_text("{ not")
    with pytest.raises(ConfigError, match="config.yaml, line 1: not valid YAML"):
        read_spec(folder)


def test_record_of_a_copied_run_is_refused(folder, scheduler):
    """Resumed there, the job would continue the original run."""
    folder.run_dir.rename(scheduler / "moved")
    with pytest.raises(ConfigError, match="was the run moved or copied"):
        read_spec(JobFolder(scheduler / "moved" / "launch"))


def test_record_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(job_module.os, "geteuid", lambda: 4321)
    os.chown(folder.record_file, 1234, -1) if os.getuid() == 0 else pytest.skip(
        "only root can change the owner of a file"
    )
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_spec(folder)


def test_status_escapes_control_characters(folder):
    folder.write_record({**folder.read_raw_record(), "argv": ["train", "x\x1b[2J\n"]})
    shown = status_report(folder.run_dir)
    assert "\x1b" not in shown and r"x\x1b[2J\n" in shown


def test_status_ignores_damaged_lines(folder):
    folder.attempts.write_text(
        '{"job": "4711"\n[]\n7\n{"job": "4711"}\n'
        + json.dumps({"job": "1", "reason": "", "requeued": True})
    )
    lines = [
        "[1]",
        '{"step": "x"}',
        '{"step": 3, "samples_per_s": "fast", "time_s": null}',
        '{"event": "straggler", "time_s": 9e99}',
    ]
    (folder.run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n"\\ud8')
    assert "step        3" in status_report(folder.run_dir).splitlines()
