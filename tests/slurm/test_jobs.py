"""Encoding, evaluation and pipelines on a real SLURM cluster, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import yaml

from launch.job_folder import JobFolder
from lpl_pretrain.config.override import as_override
from tests.slurm.faults import crash, preempt
from tests.slurm.job import COLD, STRATEGIES, Job, launch

SPECIAL_NAME = 'it\'s: "piped" #2 $(touch canary)'
"""A folder name with characters that are special to YAML and the shell."""
ONE_EACH = ["--set", "processes_per_node=1", "--set", "gpus_per_node=1"]


def test_all_checkpoints_are_scored_despite_preemption_and_a_crash(cluster, folder):
    """The watching job submits one evaluation for each checkpoint and ends after the last one."""
    protocol = {
        "name": "quick",
        "images": 8,
        "batch_size": 4,
        "sampler": {"kind": "euler", "steps": 2},
    }
    protocol |= {"reference": str(folder / "images"), "grid_images": 0}
    (folder / "quick.yaml").write_text(yaml.safe_dump(protocol))
    overrides = [*STRATEGIES["fsdp2"], "steps=120", "checkpoint.every_steps=40", "lpl=null"]
    job = Job(
        cluster, folder, "scored", *overrides, more=["--evaluate-with", folder / "quick.yaml"]
    )
    watcher = JobFolder(job.run / "launch" / "watch" / "quick")
    job.wait_steps(30)
    preempt(job)
    job.wait(lambda: job.resumes(), "training resumes")
    job.wait(lambda: cluster.job_state(watcher.job) == "RUNNING", "the watching job restarts")
    crash(job, cluster.run("squeue", "-h", "-j", watcher.job, "-o", "%B").stdout.strip())
    job.wait(
        lambda: watcher.read_attempts() and watcher.read_attempts()[-1]["reason"] == "done",
        "all checkpoints are scored",
        timeout_s=240,
    )
    assert [attempt["reason"] for attempt in watcher.read_attempts()] == ["stopped in time", "done"]
    scored = {path.parent.name for path in job.run.glob("evaluations/step_*/quick.json")}
    assert scored >= {f"step_{step:08d}" for step in (40, 80, 120)}
    evaluations = {
        path.name: JobFolder(path) for path in (job.run / "launch" / "evaluate" / "quick").iterdir()
    }
    assert set(evaluations) == scored, "one folder, and so one job at a time, for each checkpoint"
    job.wait(
        lambda: all(evaluation.read_attempts() for evaluation in evaluations.values()),
        "the last evaluation job's own end",
    )
    for evaluation in evaluations.values():
        assert [
            attempt["reason"] for attempt in evaluation.read_attempts() if not attempt["requeued"]
        ] == ["done"]
    assert (
        "quick: " in (output := job.launch("status", job.run).stdout) and "next step" not in output
    )


def test_pipeline_runs_from_images_to_scores(cluster, folder):
    """Without preloaded imports; when the first part fails, SLURM cancels the others."""
    encode = {
        "source": str(folder / "images"),
        "output": str(folder / SPECIAL_NAME),
        "resolution_px": 32,
    }
    encode["autoencoder"] = str(folder / "autoencoder")
    (folder / "encode.yaml").write_text(yaml.safe_dump(encode))
    protocol = {
        "name": "quick",
        "images": 8,
        "sampler": {"kind": "euler", "steps": 2},
        "grid_images": 0,
    }
    (folder / "end.yaml").write_text(
        yaml.safe_dump({**protocol, "reference": str(folder / "images")})
    )
    parts = [
        "--encode",
        folder / "encode.yaml",
        "--train",
        folder / "train.yaml",
        "--evaluate",
        folder / "end.yaml",
    ]
    overrides = [*STRATEGIES["fsdp2"], "steps=20", "lpl=null", "checkpoint.every_steps=20"]

    def pipeline(run):
        shape = ["--cluster", folder / "cluster.yaml", "--nodes", 2, *ONE_EACH, *COLD]
        output = launch(
            cluster, "pipeline", *parts, *overrides, as_override("run_dir", str(run)), *shape
        ).stdout
        return re.findall(r"^job (\S+), ([^:\n]+)", output, re.MULTILINE)

    tasks = ("encode/0", "encode/1", "verify", "train", "watch/quick")
    assert [part for _, part in pipeline(folder / f"{SPECIAL_NAME} run")] == [*tasks]
    score = folder / f"{SPECIAL_NAME} run" / "evaluations" / "step_00000020" / "quick.json"
    cluster.wait(score.exists, 200, "the score at the end of the pipeline")
    output = launch(cluster, "status", folder / SPECIAL_NAME).stdout.splitlines()[1:]
    assert [(line.split()[0], line.split()[-1]) for line in output] == [
        ("encode/0", "done"),
        ("encode/1", "done"),
    ]
    assert (
        "[0] " in launch(cluster, "logs", folder / SPECIAL_NAME / "launch" / "encode" / "1").stdout
    )
    (folder / "encode.yaml").write_text(
        yaml.safe_dump(
            {**encode, "source": str(folder / "nothing"), "output": str(folder / "none")}
        )
    )
    jobs = [job for job, _ in pipeline(folder / "never")]
    cluster.wait_state(jobs[0], "FAILED", 100)
    cluster.wait(
        lambda: all(cluster.job_state(job) in ("CANCELLED", "") for job in jobs[2:]),
        60,
        "the other jobs are cancelled",
    )


def test_refusals_by_sbatch_and_by_the_run(cluster, folder):
    arguments = (
        "train",
        folder / "train.yaml",
        f"run_dir={folder}/refused",
        *STRATEGIES["fsdp2"],
        "--cluster",
        folder / "cluster.yaml",
    )

    unknown_partition = launch(cluster, *arguments, "--set", "partition=nowhere")
    assert (
        unknown_partition.returncode == 2
        and "sbatch refused this job" in unknown_partition.stderr
        and "invalid partition" in unknown_partition.stderr
    )
    too_many_gpus = launch(
        cluster,
        *arguments,
        "--nodes",
        2,
        "--set",
        "gpus_per_node=4",
        "--set",
        "processes_per_node=4",
    )
    assert too_many_gpus.returncode == 2
    assert "node configuration is not available" in too_many_gpus.stderr
    uneven = launch(cluster, *arguments, "--nodes", 3).stderr
    assert "global_batch_size=8 is not a multiple of dp_world_size=6" in uneven, (
        "refused without sbatch"
    )


def test_job_with_refused_input_is_not_requeued(cluster, folder):
    """The latents are removed when the job starts, which the login node could not know."""
    shutil.copytree(folder / "latents", folder / "short lived")
    setup = [f"rm -r {shlex.quote(str(folder / 'short lived'))}"]
    own = [f"data.folder={folder / 'short lived'}", *STRATEGIES["fsdp2"]]
    job = Job(cluster, folder, "bad", *own, changes=[f"setup={json.dumps(setup)}"])
    job.wait(lambda: job.folder.read_attempts(), "the end of an attempt")
    cluster.wait_state(job.id, "FAILED", 20)
    (attempt,) = job.folder.read_attempts()
    assert (
        attempt["status"] == 2
        and attempt["reason"] == "refused its input: see the log"
        and not attempt["requeued"]
    )
    assert "short lived" in job.launch("logs", job.run).stdout
