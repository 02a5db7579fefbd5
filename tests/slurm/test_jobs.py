"""Other work than training, and what is refused: on the real scheduler, from pictures to scores."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import yaml

from launch.job_folder import JobFolder
from lpl_pretrain.config.override import as_override
from tests.slurm.job import COLD, STRATEGIES, Job, launch
from tests.slurm.troubles import crash, preempt

PIPED = 'it\'s: "piped" #2 $(touch canary)'
"""A name that YAML and the shell would read otherwise."""
ONE_EACH = ["--set", "processes_per_node=1", "--set", "gpus_per_node=1"]


def test_scores_arrive_though_all_are_preempted_and_a_node_is_lost(cluster, folder):
    """A job watches and submits one for each checkpoint: all are scored, once each, and it ends
    when no more can come.
    """
    protocol = {
        "name": "quick",
        "images": 8,
        "batch_size": 4,
        "sampler": {"kind": "euler", "steps": 2},
    }
    protocol |= {"reference": str(folder / "images"), "grid_images": 0}
    (folder / "quick.yaml").write_text(yaml.safe_dump(protocol))
    way = [*STRATEGIES["fsdp2"], "steps=120", "checkpoint.every_steps=40", "lpl=null"]
    job = Job(cluster, folder, "scored", *way, more=["--evaluate-with", folder / "quick.yaml"])
    watcher = JobFolder(job.run / "launch" / "watch" / "quick")
    job.wait_steps(30)
    preempt(job)
    job.wait(lambda: job.resumes(), "training goes on")
    job.wait(lambda: cluster.job_state(watcher.job) == "RUNNING", "watching goes on")
    crash(job, cluster.run("squeue", "-h", "-j", watcher.job, "-o", "%B").stdout.strip())
    job.wait(
        lambda: watcher.read_attempts() and watcher.read_attempts()[-1]["reason"] == "done",
        "all is scored",
        timeout_s=240,
    )
    assert [found["reason"] for found in watcher.read_attempts()] == ["stopped in time", "done"]
    scored = {path.parent.name for path in job.run.glob("evaluations/step_*/quick.json")}
    assert scored >= {f"step_{step:08d}" for step in (40, 80, 120)}
    scorers = {
        path.name: JobFolder(path) for path in (job.run / "launch" / "evaluate" / "quick").iterdir()
    }
    assert set(scorers) == scored, "one folder for each, and so one job at a time"
    job.wait(
        lambda: all(scorer.read_attempts() for scorer in scorers.values()),
        "the last evaluation job's own end",
    )
    for scorer in scorers.values():
        assert [found["reason"] for found in scorer.read_attempts() if not found["requeued"]] == [
            "done"
        ]
    assert "quick: " in (told := job.launch("status", job.run).stdout) and "next step" not in told


def test_a_pipeline_runs_from_pictures_to_scores(cluster, folder):
    """Every process as it starts for users; and when the first part fails the scheduler cancels the
    others.
    """
    encode = {
        "source": str(folder / "images"),
        "output": str(folder / PIPED),
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
    way = [*STRATEGIES["fsdp2"], "steps=20", "lpl=null", "checkpoint.every_steps=20"]

    def pipeline(run):
        shape = ["--cluster", folder / "cluster.yaml", "--nodes", 2, *ONE_EACH, *COLD]
        told = launch(
            cluster, "pipeline", *parts, *way, as_override("run_dir", str(run)), *shape
        ).stdout
        return re.findall(r"^job (\S+), ([^:\n]+)", told, re.MULTILINE)

    tasks = ("encode/0", "encode/1", "verify", "train", "watch/quick")
    assert [part for _, part in pipeline(folder / f"{PIPED} run")] == [*tasks]
    score = folder / f"{PIPED} run" / "evaluations" / "step_00000020" / "quick.json"
    cluster.wait(score.exists, 200, "the score at the end of the pipeline")
    told = launch(cluster, "status", folder / PIPED).stdout.splitlines()[1:]
    assert [(line.split()[0], line.split()[-1]) for line in told] == [
        ("encode/0", "done"),
        ("encode/1", "done"),
    ]
    assert "[0] " in launch(cluster, "logs", folder / PIPED / "launch" / "encode" / "1").stdout
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
        "the rest is cancelled",
    )


def test_what_the_scheduler_or_the_run_refuses(cluster, folder):
    arguments = (
        "train",
        folder / "train.yaml",
        f"run_dir={folder}/refused",
        *STRATEGIES["fsdp2"],
        "--cluster",
        folder / "cluster.yaml",
    )

    nowhere = launch(cluster, *arguments, "--set", "partition=nowhere")
    assert (
        nowhere.returncode == 2
        and "sbatch refused this job" in nowhere.stderr
        and "invalid partition" in nowhere.stderr
    )
    greedy = launch(
        cluster,
        *arguments,
        "--nodes",
        2,
        "--set",
        "gpus_per_node=4",
        "--set",
        "processes_per_node=4",
    )
    assert greedy.returncode == 2 and "node configuration is not available" in greedy.stderr
    uneven = launch(cluster, *arguments, "--nodes", 3).stderr
    assert "global_batch_size=8 is not a multiple of dp_world_size=6" in uneven, (
        "found without the scheduler"
    )


def test_input_that_is_refused_is_not_tried_again(cluster, folder):
    """What the login node could not see: the latents are gone when the job begins."""
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
