"""What is submitted, what is refused before it is, and what becomes of an attempt; the real
scheduler is in tests/slurm.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.batch_script import batch_script, job_name, make_worker
from launch.job import JobSpec
from launch.job_folder import HUNG, JobFolder
from launch.monitor import format_failure, new_lines, status_report
from launch.profile import ClusterProfile
from launch.requeue import AttemptResult, Decision, decide
from launch.signals import FORWARDED, SignalForwarder
from launch.slurm import parse_seconds, reached_time_limit, sbatch_error
from launch.worker import Worker
from lpl_pretrain.config.load import load_config, validate
from lpl_pretrain.errors import BAD_INPUT, ConfigError
from lpl_pretrain.runtime.source_hash import source_hash

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "a b;$(touch hacked)`touch hacked`\n#SBATCH --nodes=99\n'\""


def launch(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def spec(run_dir, *argv):
    return JobSpec("train", ["train", "x.yaml", *argv], Path(run_dir), 4)


def test_a_script_asks_for_what_the_profile_says(tmp_path):
    profile = ClusterProfile(
        partition="gpu",
        processes_per_node=8,
        gpus_per_node=8,
        memory_gib_per_node=0.5,
        exclude=("n1", "n2"),
        signal_s=60,
    )
    lines = batch_script(spec(tmp_path), profile).splitlines()
    for wanted in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "mem=512M",
        "exclude=n1,n2",
        "signal=USR2@60",
        "partition=gpu",
        "requeue",
    ):
        assert f"#SBATCH --{wanted}" in lines, wanted
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in srun
    assert lines[-1].endswith("$?") and "-m launch.epilog" in lines[-1], (
        "the last line learns how srun ended"
    )


@pytest.mark.parametrize("where", ["run_dir", "environment"])
def test_nothing_hostile_reaches_a_shell_or_the_scheduler(tmp_path, where):
    """The script is run by a real shell, with programs that do nothing in the place of srun and
    python.
    """
    hostile = HOSTILE.replace("\n", "")  # lines are refused: test_script.py
    run_dir = tmp_path / (hostile if where == "run_dir" else "run")
    profile = ClusterProfile(
        environment={"X": hostile if where == "environment" else "x"}, python="/bin/true"
    )
    text = batch_script(spec(run_dir, HOSTILE), profile)
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH --nodes=99")]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").symlink_to("/bin/true")
    (tmp_path / "script.sh").write_text(text + '\nprintf %s "$X" > x.txt\n')
    done = subprocess.run(
        ["bash", "script.sh"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/bin:/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        not list(tmp_path.rglob("hacked"))
        and (tmp_path / "x.txt").read_text() == profile.environment["X"]
    )


def test_directives_end_where_the_shell_begins(tmp_path):
    """sbatch reads `#SBATCH` up to the first command: a later one, in a quoted value, is none."""
    text = batch_script(
        spec(tmp_path), ClusterProfile(environment={"X": HOSTILE.replace("\n", " ")})
    )
    first_command = next(
        i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#")
    )
    assert all("nodes=99" not in line for line in text.splitlines()[:first_command])


def test_names_of_jobs_are_plain():
    assert (
        job_name(spec("/runs/" + HOSTILE.replace("/", "")))
        == "a_b_touch_hacked_touch_hacked_SBATCH_--nodes_99_-train"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, "colour"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "environment.WANDB_API_KEY: looks like a secret"),
        (
            {"gpus_per_node": 8},
            "processes_per_node=1 with gpus_per_node=8: one process for each GPU",
        ),
        ({"partition": "a b"}, "partition"),
        ({"time_limit_min": 1, "signal_s": 60}, "the signal comes before the job"),
    ],
)
def test_profiles_that_make_no_sense(changes, words):
    with pytest.raises(ConfigError, match=words):
        validate(ClusterProfile, changes, where="profile.yaml")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_profile_loads(path):
    load_config(ClusterProfile, path)


def ending(**changes):
    return AttemptResult(
        **{
            "status": 0,
            "finished": False,
            "cancelled": False,
            "timed_out": False,
            "steps": (10, 20),
            **changes,
        }
    )


def attempt(status=0, steps=(0, 0), reason="stopped in time"):
    return {"status": status, "steps": list(steps), "reason": reason}


@pytest.mark.parametrize(
    ("found", "earlier", "decision"),
    [
        (ending(finished=True), [], Decision(False, "done")),
        (ending(cancelled=True), [], Decision(False, "cancelled")),
        (ending(status=2, steps=(0, 0)), [], Decision(False, "refused its input: see the log")),
        (ending(), [attempt()] * 500, Decision(True, "stopped in time")),
        (ending(timed_out=True), [], Decision(True, "time limit, 1 of 2")),
        (
            ending(timed_out=True),
            [attempt(reason="time limit, 1 of 2"), attempt()],
            Decision(True, "time limit, 2 of 2"),
        ),
        (
            ending(timed_out=True),
            [attempt(reason="time limit")] * 2,
            Decision(False, "time limit, 3 of 2"),
        ),
        (
            ending(status=HUNG, logged=1234),
            [],
            Decision(True, "hung after step 1,234, 1 of 2 in a row"),
        ),
        (
            ending(status=HUNG, steps=(5, 5)),
            [attempt(HUNG, (5, 5))] * 2,
            Decision(False, "hung after step 0, 3 of 2 in a row"),
        ),
        (
            ending(status=137),
            [attempt(1, (0, 0))] * 9,
            Decision(True, "failed with status 137, 1 of 2 in a row"),
        ),
        (
            ending(status=1, steps=(5, 5)),
            [attempt(1, (5, 5))],
            Decision(True, "failed with status 1, 2 of 2 in a row"),
        ),
        (
            ending(status=1, steps=(5, 5)),
            [attempt(1, (5, 5))] * 2,
            Decision(False, "failed with status 1, 3 of 2 in a row"),
        ),
        (
            ending(status=1, steps=(5, 5)),
            [attempt(1, (5, 5)), attempt(0)],
            Decision(True, "failed with status 1, 1 of 2 in a row"),
        ),
    ],
)
def test_whether_a_job_goes_on(found, earlier, decision):
    """Preemptions are not counted, time-outs are, failures only while no checkpoint was made."""
    assert decide(found, earlier, max_timeouts=2, max_failures=2, on_hang="requeue") == decision
    stopped = decide(found, earlier, max_timeouts=2, max_failures=2, on_hang="stop")
    assert (
        stopped == decision
        if found.status != HUNG
        else not stopped.requeue and "in a row" not in stopped.reason
    )


@pytest.mark.parametrize(
    ("run_time", "up"), [("00:08:20", False), ("00:08:50", True), ("1-00:00:00", True)]
)
def test_a_time_limit_is_told_from_a_preemption(run_time, up):
    fields = {"RunTime": run_time, "TimeLimit": "00:10:00"}
    assert reached_time_limit(fields, 10) is up
    assert not reached_time_limit({}, 10)
    assert not reached_time_limit({**fields, "TimeLimit": "UNLIMITED"}, 10)
    assert parse_seconds("2-03:04:05") == 2 * 86400 + 3 * 3600 + 4 * 60 + 5


def test_the_schedulers_words_are_passed_on():
    error = (
        "Command returned 1\nsbatch: error: invalid partition specified: x\nsbatch: error: "
        "Batch job submission failed\nTraceback"
    )
    assert (
        sbatch_error(error)
        == "error: invalid partition specified: x error: Batch job submission failed"
    )


def test_logs_of_all_ranks_are_one(tmp_path):
    (tmp_path / "7_0_log.out").write_text("one\ntw")
    (tmp_path / "7_1_log.err").write_text("eins\n")
    (tmp_path / "8_0_log.out").write_text("another job\n")
    read = {}
    assert list(new_lines(tmp_path, "7", read)) == ["[0] one", "[1] eins"]
    with (tmp_path / "7_0_log.out").open("a") as file:
        file.write("o\n")
    assert list(new_lines(tmp_path, "7", read)) == ["[0] two"]


def test_exits_are_told_in_the_order_in_which_they_came(tmp_path):
    folder = JobFolder(tmp_path)
    for rank, status in ((3, 9), (0, 137)):
        folder.write_exit("7", 1, rank, status, "node1", stopped=False)
    folder.write_exit("7", 0, 1, 1, "node2", stopped=True)
    assert [found["rank"] for found in folder.exits("7", 1)] == [3, 0]


def test_without_a_scheduler(tmp_path):
    """Everything else is checked first; then the remedy is said."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text(yaml.safe_dump({"environment": {"X": "1"}}))
    config = ROOT / "configs/encode/emoji.yaml"
    path = {**os.environ, "PATH": "/nowhere"}
    arguments = ("encode", config, f"output={tmp_path}/latents", "--cluster", profile)
    assert (
        "sbatch: not on the PATH: submit from a login node"
        in (refused := launch(*arguments, env=path)).stderr
    )
    assert refused.returncode == 2
    shown = launch(*arguments, "--dry-run", env={**path, "WANDB_API_KEY": "very-secret"})
    assert (
        shown.returncode == 0
        and "export X=1" in shown.stdout
        and "resolution_px: 64" in shown.stdout
    )
    assert "very-secret" not in shown.stdout and not (tmp_path / "latents").exists()
    assert "nothing was launched" in launch("status", tmp_path).stderr
    (tmp_path / "sbatch").touch(0o755)
    there = {**path, "PATH": str(tmp_path)}
    blind = launch("encode", config, f"output={profile}/latents", "--cluster", profile, env=there)
    assert (
        blind.returncode == 2
        and "cannot be made from here" in blind.stderr
        and "Traceback" not in blind.stderr
    )
    unknown = launch("encode", config, "--cluster", profile, "--set", "colour=red")
    assert unknown.returncode == 2 and "colour" in unknown.stderr


def test_what_watches_asks_for_one_processor_and_says_what_it_will_submit(tmp_path):
    profile = tmp_path / "my cluster.yaml"
    keys = {
        "partition": "gpu",
        "cpu_partition": "small",
        "processes_per_node": 8,
        "gpus_per_node": 8,
        "container": ["run", "it"],
    }
    profile.write_text(yaml.safe_dump({**keys, "memory_gib_per_node": 900}))
    shown = launch(
        *(
            "evaluate",
            tmp_path / "a run",
            ROOT / "configs/evaluate/emoji.yaml",
            "images=2048",
            "--watch",
            "--at-most",
            3,
        ),
        *("--nodes", 2, "--set", "qos=low", "--cluster", profile, "--dry-run"),
    )
    assert shown.returncode == 0, shown.stderr
    for wanted in ("partition=small", "nodes=1", "ntasks-per-node=1", "cpus-per-task=1", "qos=low"):
        assert f"#SBATCH --{wanted}\n" in shown.stdout, wanted
    assert "gpus" not in shown.stdout and "#SBATCH --mem" not in shown.stdout
    (command,) = (
        line for line in shown.stdout.splitlines() if line.startswith("# python -m launch watch")
    )
    for wanted in (
        "images=2048",
        f"--cluster={profile}",
        "--at-most=3",
        "--nodes=2",
        "--set=qos=low",
    ):
        assert shlex.quote(wanted) in command, wanted
    assert "images: 2048" in shown.stdout


def test_submitting_costs_no_torch():
    modules = (
        "launch.__main__, launch.submit, launch.monitor, launch.epilog, launch.worker, "
        "launch.evaluation_jobs"
    )
    code = (
        f"import sys, {modules}; print([name for name in ('torch', 'diffusers') if name in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_facts_of_a_job_are_plain_json(tmp_path):
    folder = JobFolder(tmp_path)
    folder.write_record({"job": "7", "profile": ClusterProfile().model_dump(mode="json")})
    assert json.loads(folder.record_file.read_text())["job"] == "7" and folder.read_attempts() == []


@pytest.fixture
def allocated(monkeypatch):
    """This process is the only task of job 7; a task's handlers of signals do not outlive the test."""
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in FORWARDED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("policy", ["warn", "refuse"])
def test_code_that_has_changed_is_told_and_refused_if_asked(tmp_path, policy, allocated, capsys):
    """As after a requeue: the task was pickled when the code was another."""
    task = Worker(["--version"], str(tmp_path), [], "0" * 64, policy)
    if policy == "refuse":
        with pytest.raises(SystemExit) as ended:
            task()
        assert ended.value.code == BAD_INPUT
    else:
        assert task() == 0
    assert (
        "the code has changed since this job was submitted (000000000000 then, "
        in capsys.readouterr().out
    )
    (found,) = JobFolder(tmp_path).exits("7", 0)
    assert found["status"] == (BAD_INPUT if policy == "refuse" else 0) and not found["stopped"]


def test_a_child_is_told_of_signals_that_came_before_it(tmp_path, allocated, monkeypatch):
    """Between the start of the process and that of its child; and one that dies of it has ended
    well.
    """
    task = Worker([], str(tmp_path), ["sh", "-c", "sleep 30"], source_hash())
    monkeypatch.setattr(
        SignalForwarder,
        "forward_to",
        lambda self, child, real=SignalForwarder.forward_to: (
            os.kill(os.getpid(), signal.SIGUSR2),
            real(self, child),
        ),
    )
    assert task() == 0
    (found,) = JobFolder(tmp_path).exits("7", 0)
    assert found["status"] == 0 and found["stopped"]


@pytest.mark.parametrize(
    ("child", "kill_on_hang", "status"),
    [
        ("echo stacks > $LPL_STACKS_FILE; exec sleep 30", True, HUNG),
        ("echo stacks > $LPL_STACKS_FILE; sleep 2", False, 0),
        ("echo stacks > $LPL_STACKS_FILE; sleep 0.5", True, 0),
        (": > $LPL_STACKS_FILE; sleep 2; exit 3", True, 3),
    ],
    ids=["hangs", "hangs and is let be", "went on and ended well", "fails"],
)
def test_a_child_that_hangs_is_ended(tmp_path, allocated, monkeypatch, child, kill_on_hang, status):
    """Rank 3 was in training too and has written nothing: it is the suspect."""
    monkeypatch.setattr("launch.worker.STACKS_POLL_S", 0.1)
    monkeypatch.setattr("launch.worker.GRACE_S", 1.0)
    folder = JobFolder(tmp_path)
    folder.stacks("7", 0, 3, "node-2.site").touch()
    task = Worker([], str(tmp_path), ["sh", "-c", child], source_hash(), kill_on_hang=kill_on_hang)
    if status:
        with pytest.raises(SystemExit) as ended:
            task()
        assert ended.value.code == status
    else:
        assert task() == 0
    (found,) = folder.exits("7", 0)
    assert found["status"] == status
    assert found.get("silent_ranks") == (
        [{"rank": 3, "host": "node-2.site"}] if status == HUNG else None
    )
    folder.remove_empty_stacks("7")
    assert len(list(tmp_path.glob("stacks_7_0_rank_00000_*.txt"))) == (
        status != 3
    ) and not folder.silent_ranks("7", 0)


def test_who_is_to_blame_is_told():
    known = {"job": "7", "attempt": 2}
    assert (
        format_failure({**known, "rank": 1, "host": "n1"}) == " (rank 1 on n1)"
        and format_failure(known) == ""
    )
    told = " (silent: rank 3 on n2; stacks: launch/stacks_7_2_*.txt)"
    assert format_failure({**known, "silent_ranks": [{"rank": 3, "host": "n2"}]}) == told
    assert "silent: none" in format_failure({**known, "silent_ranks": []})


@pytest.mark.parametrize(
    ("kind", "policy", "kill_on_hang"),
    [("train", "stop", True), ("train", "wait", False), ("encode", "stop", False)],
)
def test_training_alone_is_watched(tmp_path, kind, policy, kill_on_hang):
    assert (
        make_worker(JobSpec(kind, [], tmp_path, 1), ClusterProfile(on_hang=policy)).kill_on_hang
        is kill_on_hang
    )


@pytest.mark.parametrize(("age_s", "told"), [(180, True), (3600, False)])
def test_the_newest_straggler_is_told_while_it_is_news(tmp_path, age_s, told):
    folder = JobFolder(tmp_path / "launch")
    folder.path.mkdir()
    folder.write_record({"job": None, "nodes": 1, "argv": ["train"], "profile": {"exclude": []}})
    slow = [
        {"event": "straggler", "rank": rank, "host": "n1", "measure": "data", "times": 2.5}
        for rank in (1, 3)
    ]
    lines = [
        {"step": 4, "time_s": time.time() - age_s, **line}
        for line in (*slow, {"event": "resumed"}, {})
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"step": 5, "tim'
    )
    shown = status_report(tmp_path)
    assert ("straggler   rank 3 on n1: 2.5 times the median in `data`, 3 min ago" in shown) is told
    assert "rank 1" not in shown and "step        4" in shown


def test_the_console_script_is_the_module():
    script = subprocess.run(
        [Path(sys.executable).with_name("lpl-launch"), "--help"], capture_output=True, text=True
    )
    usage, _, options = script.stdout.partition("\n")
    assert usage.startswith("Usage: lpl-launch") and "SLURM" in options
    assert launch("--help").stdout.partition("\n")[2] == options
