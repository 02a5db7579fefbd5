"""Sweeps before a scheduler sees them: values, names, checks, the script of the array, and what is
told of its runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from submitit.core.utils import DelayedSubmission

from launch import epilog, monitor
from launch.batch_script import array_batch_script
from launch.job import JobSpec
from launch.job_folder import JobFolder, find_job_folders, single_job_folder
from launch.monitor import new_lines
from launch.profile import ClusterProfile
from launch.slurm import current_job_id
from launch.submit import submit_array, submit_or_preview_encoding
from launch.sweep import LONGEST_NAME, combinations, plan_runs, run_name, split_values
from launch.worker import Allocation
from lpl_pretrain.config.load import dump, load_config
from lpl_pretrain.config.override import as_override
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import ConfigError
from tests.support.commands import ROOT
from tests.support.configs import dataset_index, train_config

HOSTILE = "a b;$(touch hacked)'\""
SBATCH = """#!/bin/sh
if [ "$1" = --parsable ]; then cat "$2" > {folder}/submitted.sh; echo '4711;cluster'
else cat "$1" >> {folder}/singles.sh; echo Submitted batch job 4712; fi
"""
SQUEUE = "#!/bin/sh\necho '4711_0 RUNNING\n4711_1 PENDING'\n"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,0.1,0.2", ["0", "0.1", "0.2"]),
        ("[0.9,0.99],[0.9,0.95]", ["[0.9,0.99]", "[0.9,0.95]"]),
        ("null,{kind: a, of: [1,2]}", ["null", "{kind: a, of: [1,2]}"]),
        ("'a,b',\"c]\",d", ["'a,b'", '"c]"', "d"]),
    ],
)
def test_values_are_split_at_the_outer_commas(text, values):
    assert split_values(text) == values
    assert text.split(",") == values or len(text.split(",")) > len(values), (
        "the naive way differs where there are inner ones"
    )


def test_all_combinations_the_last_key_fastest():
    found = combinations(["a=1,2", "b=x,[y,z]"])
    assert found == [("a=1", "b=x"), ("a=1", "b=[y,z]"), ("a=2", "b=x"), ("a=2", "b=[y,z]")]
    assert combinations([]) == [()], "without a sweep: one run that changes nothing"


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["lpl"], "wanted key=value,value"),
        (["a=1,,2"], "wanted key=value,value"),
        (["=1"], "wanted key=value,value"),
        (["a=1", "a=2"], "--sweep a: given 2 times"),
        (["run_dir=x,y"], "--sweep run_dir: cannot be swept"),
        (["name=x,y"], "--sweep name: cannot be swept"),
        (["a=1,1"], "2 combinations would be called a=1"),
        (["a=x y,x_y"], "2 combinations would be called a=x_y"),
    ],
)
def test_what_is_no_sweep(sweeps, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        combinations(sweeps)


def test_names_say_what_was_changed_and_are_safe(tmp_path):
    assert (
        run_name(("lpl.target_fraction=0.1", "optimizer.lr=1e-4"))
        == "lpl.target_fraction=0.1,optimizer.lr=1e-4"
    )
    assert (
        run_name(("optimizer.betas=[0.9,0.99]",)) == "optimizer.betas=0.9_0.99"
        and run_name(()) == ""
    )
    for value in (HOSTILE, "../../up", "a/b", "%j\n", "-rf"):
        name = run_name((f"key={value}",))
        assert re.fullmatch(r"key=[A-Za-z0-9._+-]*", name) and (tmp_path / name).parent == tmp_path
    long, longer = (run_name((f"key={'x' * count}",)) for count in (500, 501))
    assert len(long) == len(longer) == LONGEST_NAME and long != longer


@pytest.fixture
def config(tmp_path):
    """Of a run whose data are known by their index alone, and whose autoencoder is the one that
    ships.
    """
    from lpl_pretrain.config.hashing import autoencoder_identity
    from lpl_pretrain.config.load import resolve_path

    identity = autoencoder_identity(resolve_path("asset:autoencoder_emoji"))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "index.json").write_text(
        dataset_index(identity=identity).model_dump_json()
    )
    settings = train_config(
        data__folder=str(tmp_path / "latents"),
        run_dir=str(tmp_path / "swept"),
        parallel__strategy="ddp",
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return tmp_path / "train.yaml"


def test_a_run_for_each_combination(config, tmp_path):
    found = plan_runs(str(config), ["steps=7"], ["optimizer.lr=1e-3,2e-3"], 2)
    assert [run.run_dir for run in found] == [
        tmp_path / "swept" / f"optimizer.lr={rate}" for rate in ("1e-3", "2e-3")
    ]
    assert [run.settings.optimizer.lr for run in found] == [1e-3, 2e-3] and {
        run.settings.steps for run in found
    } == {7}
    assert found[1].argv == [
        "train",
        str(config),
        "steps=7",
        "optimizer.lr=2e-3",
        f'run_dir="{found[1].run_dir}"',
    ]
    assert {run.settings.run_dir for run in found} == {str(run.run_dir) for run in found}
    (alone,) = plan_runs(str(config), [], [], 2)
    assert alone.run_dir == tmp_path / "swept"


def test_every_wrong_combination_is_named(config):
    with pytest.raises(ConfigError) as refusal:
        plan_runs(str(config), [], ["batch.global_batch_size=8,9", "steps=2,0"], 2)
    lines = str(refusal.value).splitlines()
    names = [
        f"batch.global_batch_size={size},steps={steps}" for size, steps in ((8, 0), (9, 2), (9, 0))
    ]
    assert [line.partition(": ")[0] for line in lines] == names
    assert "global_batch_size=9 is not a multiple of dp_world_size=2" in lines[1]
    with pytest.raises(ConfigError, match="optimizer.rate=1: .*unknown key"):
        plan_runs(str(config), [], ["optimizer.rate=1,2"], 2)


def test_a_folder_with_another_run_is_refused_before_anything_is_submitted(config, tmp_path):
    taken = RunDir(tmp_path / "swept" / "optimizer.lr=1e-3")
    taken.path.mkdir(parents=True)
    taken.config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    taken.metrics.write_text('{"step": 1}\n')  # without a step it would take this configuration
    with pytest.raises(
        ConfigError,
        match=r"optimizer.lr=1e-3: .* belongs to another configuration:\n(.*\n)*  seed: the "
        r"run has 1",
    ):
        plan_runs(str(config), [], ["optimizer.lr=1e-3,2e-3"], 2)
    plan_runs(str(config), [], ["optimizer.lr=2e-3,3e-3"], 2)


def test_a_folder_is_a_run_or_holds_a_sweep(config, tmp_path):
    JobFolder(tmp_path / "swept" / "x" / "launch").path.mkdir(parents=True)
    plan_runs(str(config), [], [], 2)
    JobFolder(tmp_path / "swept" / "x" / "launch").write_record({"job": "1"})
    with pytest.raises(ConfigError, match="swept: holds the runs of a sweep"):
        plan_runs(str(config), [], [], 2)
    plan_runs(str(config), [], ["optimizer.lr=1e-3"], 2)
    (tmp_path / "swept" / "config.yaml").write_text(config.read_text())
    with pytest.raises(ConfigError, match="swept: is a run itself"):
        plan_runs(str(config), [], ["optimizer.lr=1e-3"], 2)


def specs(folder, count=2):
    return [
        JobSpec("train", ["train", "x.yaml", f"n={n}"], folder / f"n={n}", 4) for n in range(count)
    ]


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """Programs that say what SLURM would."""
    for name, text in {
        "sbatch": SBATCH.format(folder=tmp_path),
        "squeue": SQUEUE,
        "scancel": "#!/bin/sh\n",
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("count", "at_most", "asked"),
    [(3, 2, "0-2%2"), (3, None, "0-2%3"), (1, None, "0-0%1"), (2, 9, "0-1%2")],
)
def test_the_script_asks_for_an_array(tmp_path, count, at_most, asked):
    lines = array_batch_script(
        specs(tmp_path / "a sweep", count), ClusterProfile(), at_most, tmp_path / "links"
    ).splitlines()
    assert [line for line in lines if "--array" in line] == [f"#SBATCH --array={asked}"]
    assert "#SBATCH --job-name=a_sweep-train" in lines and "#SBATCH --requeue" in lines


@pytest.mark.parametrize("number", [0, 1])
def test_each_task_finds_its_own_folder(scheduler, number):
    """The script is run by a real shell, with programs in the place of srun and python that note
    what they are told.
    """
    sweep = scheduler / "a sweep with 'marks' and $(touch hacked)"
    tasks = submit_array(specs(sweep), ClusterProfile(python="echo"), None)
    assert (
        tasks == ["4711_0", "4711_1"]
        and [JobFolder(o.run_dir / "launch").job for o in specs(sweep)] == tasks
    )
    (scheduler / "bin" / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (scheduler / "bin" / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", scheduler / "submitted.sh"],
        env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": str(number)},
        capture_output=True,
        text=True,
        cwd=scheduler,
    )
    assert done.returncode == 0 and not list(scheduler.rglob("hacked")), done.stderr
    words = done.stdout.splitlines()
    of_task = Path(words[words.index("submitit.core._submit") + 1].replace("%a", str(number)))
    assert of_task.resolve() == sweep / f"n={number}" / "launch", (
        "where submitit looks for the task, and logs are written"
    )
    assert (of_task / f"4711_{number}_submitted.pkl").is_file()
    assert (of_task / f"4711_{number}_submission.sh").read_text() == (
        scheduler / "submitted.sh"
    ).read_text(), "asked about again"
    (epilog_line,) = [line for line in words if "launch.epilog" in line]
    told = Path(epilog_line.partition("launch.epilog ")[2].removesuffix(" 0"))
    assert JobFolder(told).read_raw_record()["argv"] == ["train", "x.yaml", f"n={number}"]


def test_encoding_is_shared_by_tasks_that_begin_when_they_can(scheduler, capsys, monkeypatch):
    """Two jobs of two processes count as four, and each has a folder of its own."""
    latents = scheduler / "some latents"
    argv = ["encode", "some.yaml", "x=1"]
    profile = ClusterProfile(processes_per_node=2)
    assert submit_or_preview_encoding(argv, latents, 2, profile, "") == "4711"
    submitted = (scheduler / "submitted.sh").read_text()
    assert "#SBATCH --array=0-1%2" in submitted and "#SBATCH --nodes=1\n" in submitted
    assert "#SBATCH --job-name=some_latents-encode\n" in submitted
    assert capsys.readouterr().out.splitlines()[1] == "job 4711_1, encode/1"
    (links,) = (latents / "launch").glob("array_*")
    for name, value in {
        "JOB_ID": "4712",
        "ARRAY_JOB_ID": "4711",
        "ARRAY_TASK_ID": "1",
        "NTASKS": "2",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environments = []
    for number in range(2):
        folder = JobFolder(latents / "launch" / "encode" / str(number))
        assert (links / str(number)).resolve() == folder.path and folder.read_raw_record()["argv"][
            -1
        ] == "x=1"
        task = DelayedSubmission.load(folder.path / f"4711_{number}_submitted.pkl").function
        for rank in range(2):
            monkeypatch.setenv("SLURM_PROCID", str(rank))
            environments.append(task.rank_env(Allocation.from_environment()))
    told = [line.split()[:3] for line in monitor.status_report(latents).splitlines()[1:]]
    assert told == [["encode/0", "4711_0", "RUNNING"], ["encode/1", "4711_1", "PENDING"]]
    assert monitor.status_report(latents / "launch" / "encode" / "1").splitlines()[1].split()[
        :2
    ] == [
        "encode/1",
        "4711_1",
    ]
    assert monitor.cancel(latents).count("`python -m launch encode` continues from there") == 2
    assert [ranks["RANK"] for ranks in environments] == ["0", "1", "2", "3"]
    assert {ranks["WORLD_SIZE"] for ranks in environments} == {"4"}


def test_a_task_is_named_by_its_place_in_the_array(monkeypatch):
    """By its plain number, which may be the array's, `scontrol requeue` would take all of them."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert current_job_id() == "4711"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert current_job_id() == "4711_1"


@pytest.mark.parametrize("broken", [False, True])
def test_a_task_that_ends_early_requeues_itself_alone(scheduler, monkeypatch, broken):
    """And counts its own attempts; by its plain number it would requeue the array, and find no
    attempt of its own.
    """
    for name, value in {
        "JOB_ID": "4711",
        "ARRAY_JOB_ID": "4711",
        "ARRAY_TASK_ID": "1",
        "RESTART_COUNT": "1",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (scheduler / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {scheduler}/asked.txt\n')
    (scheduler / "bin" / "scontrol").chmod(0o755)
    submit_array(specs(scheduler / "sweep"), ClusterProfile(max_failures=2), None)
    folder = JobFolder(scheduler / "sweep" / "n=1" / "launch")
    folder.write_exit("4711_1", 1, 0, 9, "node1", stopped=False)
    if broken:
        monkeypatch.setattr(epilog, "current_job_id", lambda: os.environ["SLURM_JOB_ID"])
    decision = epilog.main(folder, 1)
    asked = (scheduler / "asked.txt").read_text().splitlines()
    assert ("requeue 4711_1" in asked) is not broken and ("requeue 4711" in asked) is broken
    assert ("status 9" in decision.reason) is not broken


def test_logs_of_a_task(tmp_path):
    for name in ("4711_1_0_log.out", "4711_1_12_log.err", "4711_11_0_log.out", "4711_0_0_log.out"):
        (tmp_path / name).write_text(f"{name}\n")
    assert list(new_lines(tmp_path, "4711_1", {})) == [
        "[0] 4711_1_0_log.out",
        "[12] 4711_1_12_log.err",
    ]


def test_nothing_is_submitted_while_one_run_is_worked_on(scheduler):
    sweep = scheduler / "sweep"
    submit_array(specs(sweep, 2), ClusterProfile(), None)
    (scheduler / "submitted.sh").unlink()
    with pytest.raises(ConfigError, match="n=0: its job 4711_0 is RUNNING"):
        submit_array(specs(sweep, 3), ClusterProfile(), None)
    assert not (scheduler / "submitted.sh").exists() and not (sweep / "n=2").exists()


def test_a_line_for_each_run(scheduler):
    sweep = scheduler / "sweep"
    submit_array(specs(sweep, 3), ClusterProfile(), None)
    assert [folder.run_dir for folder in find_job_folders(sweep)] == [
        sweep / f"n={n}" for n in range(3)
    ]
    assert [folder.run_dir for folder in find_job_folders(sweep / "n=1")] == [sweep / "n=1"]
    RunDir(sweep / "n=0").metrics.write_text(
        json.dumps({"step": 1200, "samples_per_s": 51.24}) + "\n"
    )
    attempt = {
        "job": "4711_2",
        "attempt": 0,
        "requeued": False,
        "reason": "refused its input: see the log",
    }
    JobFolder(sweep / "n=2" / "launch").append_attempt(attempt)
    head, *told = (re.split(r"\s{2,}", line) for line in monitor.status_report(sweep).splitlines())
    assert head == ["name", "job", "state", "step", "samples/s", "restarts", "last attempt"]
    assert told == [
        ["n=0", "4711_0", "RUNNING", "1,200", "51.2", "0", "-"],
        ["n=1", "4711_1", "PENDING", "-", "-", "0", "-"],
        ["n=2", "4711_2", "-", "-", "-", "0", "refused its input: see the log"],
    ]
    with pytest.raises(ConfigError, match="holds 3 jobs: name one of them, such as .*n=0"):
        single_job_folder(sweep)


def test_cancel_is_for_those_that_live_and_resume_for_those_that_do_not(scheduler):
    sweep = scheduler / "sweep"
    submit_array(specs(sweep, 4), ClusterProfile(), None)
    finished = RunDir(sweep / "n=3")
    finished.config.write_text(yaml.safe_dump(train_config(steps=6).model_dump(mode="json")))
    finished.checkpoint(6).mkdir(parents=True)
    (finished.checkpoint(6) / "manifest.json").touch()
    assert [folder.name for folder in monitor.unfinished_runs(find_job_folders(sweep))] == ["n=2"]
    (finished.checkpoint(6) / "manifest.json").unlink()
    assert [folder.name for folder in monitor.unfinished_runs(find_job_folders(sweep))] == [
        "n=2",
        "n=3",
    ]
    assert [line.partition(":")[0] for line in monitor.cancel(sweep).splitlines()] == [
        "job 4711_0",
        "job 4711_1",
    ]
    assert [JobFolder(sweep / f"n={n}" / "launch").cancelled.exists() for n in range(4)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_command(config, scheduler):
    """All of it, to the scripts; each run has an evaluator that begins when it does."""
    profile, protocol = scheduler / "cluster.yaml", scheduler / "protocol.yaml"
    profile.write_text("partition: gpu\n")
    scoring = {"name": "p", "images": 8, "sampler": {"kind": "euler"}, "reference": str(scheduler)}
    protocol.write_text(yaml.safe_dump(scoring))

    def launch(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "launch", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    swept = [
        "train",
        config,
        "--sweep",
        "optimizer.lr=1e-3,2e-3",
        "--sweep-at-most",
        1,
        "--cluster",
        profile,
    ]
    shown = launch(*swept, "--dry-run")
    assert (
        shown.returncode == 0
        and "#SBATCH --array=0-1%1" in shown.stdout
        and not (scheduler / "swept").exists()
    )
    assert [
        line.partition(": ")[0] for line in shown.stdout.splitlines() if "optimizer.lr=" in line
    ] == ["# 0", "# 1"]
    wrong = launch(*swept, "--sweep", "steps=0,5")
    assert (
        wrong.returncode == 2
        and "optimizer.lr=1e-3,steps=0: " in wrong.stderr
        and not (scheduler / "swept").exists()
    )
    sent = launch(*swept, "--evaluate-with", protocol)
    assert sent.returncode == 0, sent.stderr
    waits = [
        line
        for line in (scheduler / "singles.sh").read_text().splitlines()
        if "--dependency" in line
    ]
    assert waits == [f"#SBATCH --dependency=after:4711_{n}" for n in range(2)]
    assert "job 4711_1, optimizer.lr=2e-3" in sent.stdout
    refused = launch("resume", scheduler / "swept")
    assert (
        refused.returncode == 2
        and "all its runs are complete, or in SLURM's queue" in refused.stderr
    )
    (scheduler / "bin" / "squeue").write_text("#!/bin/sh\necho 4711_0 RUNNING\n")
    assert "1 jobs, each 1 nodes x 1 processes" in launch("resume", scheduler / "swept").stdout
    assert "#SBATCH --array=0-0%1" in (scheduler / "submitted.sh").read_text()


def test_a_finished_run_is_not_submitted(config, scheduler):
    """Of a sweep the others are."""
    profile = scheduler / "cluster.yaml"
    profile.write_text("partition: gpu\n")

    def launch(*arguments):
        command = [
            sys.executable,
            "-m",
            "launch",
            "train",
            config,
            *map(str, arguments),
            "--cluster",
            profile,
        ]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = RunDir(scheduler / "swept" / "optimizer.lr=1e-3")
    settings = load_config(
        TrainConfig, str(config), ["optimizer.lr=1e-3", as_override("run_dir", str(done.path))]
    )
    done.path.mkdir(parents=True)
    done.config.write_text(dump(settings))
    done.checkpoint(settings.steps).mkdir(parents=True)
    (done.checkpoint(settings.steps) / "manifest.json").touch()
    alone = launch("optimizer.lr=1e-3", as_override("run_dir", str(done.path)))
    assert (
        alone.returncode == 0 and f"{done.path}: complete: {settings.steps} of" in alone.stdout
    ), alone.stderr
    assert not (scheduler / "submitted.sh").exists() and not (done.path / "launch").exists()
    swept = launch("--sweep", "optimizer.lr=1e-3,2e-3")
    assert (
        swept.returncode == 0
        and "complete" in swept.stdout
        and "#SBATCH --array=0-0" in (scheduler / "submitted.sh").read_text()
    )
    assert not (done.path / "launch").exists()


def test_a_damaged_job_file_is_one_line_at_the_end_of_a_job(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text("{")
    command = [sys.executable, "-m", "launch.epilog", str(tmp_path / "launch"), "3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        ended.returncode == 3
        and "job.json: cannot be read" in ended.stdout
        and "Traceback" not in ended.stderr
    )
