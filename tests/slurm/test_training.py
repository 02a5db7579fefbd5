"""Training on the real scheduler, 2 nodes of 2 processes: whatever happens to it, it ends with the weights of a run left alone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from functools import partial

import pytest
import yaml

from launch.folder import JobFolder
from tests.support.commands import ROOT, lines, lpl
from tests.support.latents import tiny_dataset

STEPS, EVERY = 200, 20
TRAIN = """
name: slurm
steps: {steps}
autoencoder: {autoencoder}
data: {{folder: {latents}, verify: sizes}}
model: {{width: 32, depth: 2, heads: 2}}
diffusion: {{prediction: flow, schedule: rectified_flow}}
lpl: {{weight: 1.0, gate: {{max_noise_level: 1.0}}, start_step: 60}}
optimizer: {{lr: 1.0e-3}}
batch: {{global_batch_size: 8}}
checkpoint: {{every_steps: {every}}}
log: {{every_steps: 1, samples: true}}
"""
STRATEGIES = {
    "fsdp2": ["parallel.strategy=fsdp2"],
    # without LPL, whose decoder makes each of many starts seconds longer
    "zero2": ["parallel.strategy=zero", f"parallel.zero_config={ROOT}/configs/zero/zero2.json", "lpl=null"],
}
PROFILE = {
    "partition": "main",
    "processes_per_node": 2,
    "gpus_per_node": 2,
    "cpus_per_process": 1,
    "signal_s": 30,
    "time_limit_min": 30,
    "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Latents, a configuration, and a profile."""
    folder = tmp_path_factory.mktemp("slurm training")  # a name with a space, as users have them
    latents, autoencoder = tiny_dataset(folder)
    config = TRAIN.format(steps=STEPS, every=EVERY, autoencoder=json.dumps(autoencoder), latents=json.dumps(latents))
    (folder / "train.yaml").write_text(config)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))
    return folder


class Job:
    """A training on the cluster, from where its user sits."""

    def __init__(self, cluster, folder, name, *overrides, changes=(), more=()):
        self.cluster, self.run = cluster, folder / name
        options = [option for change in changes for option in ("--set", change)]
        launched = self.launch(
            "train",
            folder / "train.yaml",
            f"run_dir={self.run}",
            *overrides,
            "--cluster",
            folder / "cluster.yaml",
            "--nodes",
            2,
            *options,
            *more,
        )
        assert launched.returncode == 0, launched.stdout + launched.stderr
        self.folder = JobFolder(self.run / "launch")
        self.id = self.folder.read_facts()["job"]

    def launch(self, *arguments):
        return self.cluster.run(sys.executable, "-m", "launch", *map(str, arguments), check=False, cwd=ROOT)

    def steps(self):
        """That were logged, with repetitions."""
        file = self.run / "metrics.jsonl"
        return [line["step"] for line in lines(self.run) if "event" not in line] if file.exists() else []

    def resumes(self):
        file = self.run / "metrics.jsonl"
        return [line for line in lines(self.run) if line.get("event") == "resumed"] if file.exists() else []

    def wait_steps(self, more):
        """Until so many were made from now on."""
        before = len(self.steps())
        self.wait(lambda: len(self.steps()) >= before + more, f"{more} more steps after {before}")

    def wait(self, predicate, what, timeout_s=150):
        try:
            self.cluster.wait(predicate, timeout_s, what)
        except Exception as error:
            logs = self.launch("logs", self.run).stdout[-6000:]
            raise AssertionError(f"{what}\n{self.folder.read_attempts()}\n{logs}") from error

    def ranks(self, node):
        """(pid, command) of the children that train on a node."""
        return [(pid, command) for pid, command in self.cluster.pids_on(node) if "lpl_pretrain train" in command.replace("\0", " ")]

    def goes_on_after(self, trouble):
        """`trouble` happens once; seconds until the run has resumed, and steps that were made before and are made again."""
        resumed, started = len(self.resumes()), time.time()
        trouble()
        self.wait(lambda: len(self.resumes()) > resumed, "resumed")
        told = lines(self.run)
        at = max(i for i, line in enumerate(told) if line.get("event") == "resumed")
        made = max(line["step"] for line in told[:at] if "event" not in line)
        return round(told[at]["time_s"] - started, 1), made - told[at]["step"]


def weights(run):
    """Bytes of the last checkpoint's pieces, by file."""
    newest = run / "checkpoints" / f"step_{STEPS:08d}"
    return {file.name: file.read_bytes() for file in sorted(newest.glob("*")) if file.name != "manifest.json"}


def preempt(job):
    """A job of a higher partition takes all nodes for two seconds."""
    sent = job.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    return lambda: job.cluster.wait_state(sent.stdout.strip(), "COMPLETED", 60)


def kill_a_rank(job):
    pid, _ = next(found for node in job.cluster.names for found in job.ranks(node))
    os.kill(pid, signal.SIGKILL)


def crash_rank_0(job):
    """With the batch script and the rendezvous on it."""
    node = job.cluster.run("squeue", "-h", "-j", job.id, "-o", "%B").stdout.strip()
    job.cluster.crash(node, tell=True)
    job.cluster.boot(node)


def kill_while_saving(job):
    """The moment that a checkpoint begins to be written."""
    deadline = time.monotonic() + 60
    while not list((job.run / "checkpoints").glob(".writing_*")):  # it lasts for milliseconds
        assert time.monotonic() < deadline, "no checkpoint was written"
    kill_a_rank(job)


TROUBLES = {
    "preempted": preempt,
    "requeued": lambda job: job.cluster.run("scontrol", "requeue", job.id),
    "rank killed": kill_a_rank,
    "killed while saving": kill_while_saving,
    "node crashed": crash_rank_0,
}


@pytest.mark.parametrize("way", STRATEGIES)
def test_ends_with_the_weights_of_a_run_left_alone(cluster, folder, way):
    lpl("train", folder / "train.yaml", f"run_dir={folder}/{way}_alone", *STRATEGIES[way], ranks=4)
    job, seen = Job(cluster, folder, f"{way}_troubled", *STRATEGIES[way]), {}
    for name, trouble in TROUBLES.items():
        job.wait_steps(20)
        seen[name] = job.goes_on_after(partial(trouble, job))
    job.wait(lambda: cluster.job_state(job.id) in ("COMPLETED", ""), "the end")
    print(f"\n{way}: seconds until it went on, and steps lost: {seen}")
    assert weights(job.run) == weights(folder / f"{way}_alone")
    lost = {name: steps for name, (_, steps) in seen.items()}
    assert lost["preempted"] == lost["requeued"] == 0 and all(0 <= steps <= EVERY + 5 for steps in lost.values()), (
        "one checkpoint, and its writing"
    )
    assert sorted(set(job.steps())) == list(range(1, STEPS + 1))
    told = lpl("audit", job.run).stdout
    assert f"{STEPS} updates of 8 samples, {1 + len(job.resumes())} starts" in told and "none was seen twice" in told
    attempts = job.folder.read_attempts()
    assert "stopped in time" in [found["reason"] for found in attempts], "when preempted, and when requeued if there was time"
    assert attempts[-1]["reason"] == "done" and any(found["status"] == 137 or found["status"] == -9 for found in attempts)
    assert not [found for node in cluster.names for found in job.ranks(node)], "no process is left"


def test_a_time_limit_is_no_end(cluster, folder):
    """Two minutes, whose end SLURM may announce a minute before the 30 seconds asked for; then the job goes on from there."""
    job = Job(cluster, folder, "limited", *STRATEGIES["fsdp2"], "steps=100000", "lpl=null", changes=["time_limit_min=2"])
    job.wait(lambda: job.resumes(), "resumed after the time limit", timeout_s=300)
    first, *_ = job.folder.read_attempts()
    assert first["reason"] == "time limit, 1 of 100" and first["status"] == 0 and first["steps"][1] == job.resumes()[0]["step"]
    again = job.launch("resume", job.run)
    assert again.returncode == 2 and f"its job {job.id} is RUNNING" in again.stderr
    told = job.launch("status", job.run).stdout
    assert f"job         {job.id}: RUNNING" in told and "restarts    1" in told and "time limit, 1 of 100" in told
    assert "resumed at step" in job.launch("logs", job.run).stdout
    job.launch("cancel", job.run)
    job.wait(lambda: cluster.job_state(job.id) == "FAILED", "the end, which is no good one for jobs that depend on it")
    assert job.folder.read_attempts()[-1]["reason"] == "cancelled"
    assert job.steps() == list(range(1, job.steps()[-1] + 1)) and "0 updates made again" in lpl("audit", job.run).stdout


def test_scores_arrive_though_all_are_preempted(cluster, folder):
    """A job watches and submits one for each checkpoint: all are scored, once each, and it ends when no more can come."""
    protocol = {"name": "quick", "images": 8, "batch_size": 4, "sampler": {"kind": "euler", "steps": 2}}
    protocol |= {"reference": str(folder / "pictures"), "grid_images": 0}
    (folder / "quick.yaml").write_text(yaml.safe_dump(protocol))
    way = [*STRATEGIES["fsdp2"], "steps=120", "checkpoint.every_steps=40", "lpl=null"]
    job = Job(cluster, folder, "scored", *way, more=["--evaluate-with", folder / "quick.yaml"])
    watcher = JobFolder(job.run / "launch" / "watch" / "quick")
    job.wait_steps(30)
    preempt(job)
    job.wait(lambda: job.resumes(), "training goes on")
    job.wait(lambda: watcher.read_attempts() and watcher.read_attempts()[-1]["reason"] == "done", "all is scored", timeout_s=240)
    assert [found["reason"] for found in watcher.read_attempts()] == ["stopped in time", "done"]
    scored = {path.parent.name for path in job.run.glob("evaluations/step_*/quick.json")}
    assert scored >= {f"step_{step:08d}" for step in (40, 80, 120)}
    scorers = {path.name: JobFolder(path) for path in (job.run / "launch" / "evaluate" / "quick").iterdir()}
    assert set(scorers) == scored, "one folder for each, and so one job at a time"
    job.wait(lambda: all(scorer.read_attempts() for scorer in scorers.values()), "the last evaluation job's own end")
    for scorer in scorers.values():
        assert [found["reason"] for found in scorer.read_attempts() if not found["requeued"]] == ["done"]
    assert "quick: " in (told := job.launch("status", job.run).stdout) and "next step" not in told


def test_a_pipeline_runs_from_pictures_to_scores(cluster, folder):
    """And when its first part fails the others are cancelled by the scheduler."""
    encode = {"source": str(folder / "pictures"), "output": str(folder / "piped"), "resolution_px": 32}
    encode["autoencoder"] = str(folder / "autoencoder")
    (folder / "encode.yaml").write_text(yaml.safe_dump(encode))
    protocol = {"name": "quick", "images": 8, "sampler": {"kind": "euler", "steps": 2}, "grid_images": 0}
    (folder / "end.yaml").write_text(yaml.safe_dump({**protocol, "reference": str(folder / "pictures")}))
    parts = ["--encode", folder / "encode.yaml", "--train", folder / "train.yaml", "--evaluate", folder / "end.yaml"]
    way = [*STRATEGIES["fsdp2"], "steps=20", "lpl=null", "checkpoint.every_steps=20"]

    def pipeline(run):
        shape = ["--cluster", folder / "cluster.yaml", "--nodes", 1]
        arguments = ["pipeline", *parts, *way, f"run_dir={run}", *shape]
        return cluster.run(sys.executable, "-m", "launch", *map(str, arguments), check=False, cwd=ROOT)

    done = pipeline(folder / "piped run")
    assert done.returncode == 0 and [line.split(",")[1].split(":")[0] for line in done.stdout.splitlines()] == [
        f" {part}" for part in ("encode", "verify", "train", "watch/quick")
    ]
    score = folder / "piped run" / "evaluations" / "step_00000020" / "quick.json"
    cluster.wait(score.exists, 200, "the score at the end of the pipeline")
    (folder / "encode.yaml").write_text(
        yaml.safe_dump({**encode, "source": str(folder / "nothing"), "output": str(folder / "none")})
    )
    jobs = [line.split(",")[0].removeprefix("job ") for line in pipeline(folder / "never").stdout.splitlines()]
    cluster.wait_state(jobs[0], "FAILED", 100)
    cluster.wait(lambda: all(cluster.job_state(job) in ("CANCELLED", "") for job in jobs[1:]), 60, "the rest is cancelled")


def test_what_the_scheduler_or_the_run_refuses(cluster, folder):
    arguments = (
        "train",
        folder / "train.yaml",
        f"run_dir={folder}/refused",
        *STRATEGIES["fsdp2"],
        "--cluster",
        folder / "cluster.yaml",
    )

    def launch(*more):
        return cluster.run(sys.executable, "-m", "launch", *map(str, (*arguments, *more)), check=False, cwd=ROOT)

    nowhere = launch("--set", "partition=nowhere")
    assert nowhere.returncode == 2 and "sbatch refused this job" in nowhere.stderr and "invalid partition" in nowhere.stderr
    greedy = launch("--nodes", 2, "--set", "gpus_per_node=4", "--set", "processes_per_node=4")
    assert greedy.returncode == 2 and "node configuration is not available" in greedy.stderr
    assert "global_batch_size=8 is not a multiple of dp_world_size=6" in launch("--nodes", 3).stderr, "found without the scheduler"


def test_input_that_is_refused_is_not_tried_again(cluster, folder):
    """What the login node could not see: the latents are gone when the job begins."""
    shutil.copytree(folder / "latents", folder / "short lived")
    setup = [f"rm -r {shlex.quote(str(folder / 'short lived'))}"]
    own = [f"data.folder={folder / 'short lived'}", *STRATEGIES["fsdp2"]]
    job = Job(cluster, folder, "bad", *own, changes=[f"setup={json.dumps(setup)}"])
    job.wait(lambda: job.folder.read_attempts(), "the end of an attempt")
    cluster.wait_state(job.id, "FAILED", 20)
    (attempt,) = job.folder.read_attempts()
    assert attempt["status"] == 2 and attempt["reason"] == "refused its input: see the log" and not attempt["requeued"]
    assert "short lived" in job.launch("logs", job.run).stdout
