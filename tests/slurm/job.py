"""A training job on the test cluster: 2 nodes of 2 processes, started by `launch`."""

from __future__ import annotations

import json
import sys
import time

import yaml

from launch.job_folder import JobFolder
from tests.support import fork_server
from tests.support.commands import ROOT, metric_lines
from tests.support.latents import tiny_dataset

EVERY = 10
TRAIN = """
name: slurm
steps: 200
autoencoder: {autoencoder}
data: {{folder: {latents}, verify: sizes}}
model: {{width: 32, depth: 2, heads: 2}}
diffusion: {{prediction: flow, schedule: rectified_flow}}
lpl: {{weight: 1.0, gate: {{noise_level_below: 1.0}}, start_step: 60}}
optimizer: {{lr: 1.0e-3}}
batch: {{global_batch_size: 8}}
checkpoint: {{every_steps: {every}}}
log: {{every_steps: 1, sample_indices: true}}
"""
STRATEGIES = {
    "fsdp2": ["parallel.strategy=fsdp2"],
    "zero2": ["parallel.strategy=zero", f"parallel.zero_config={ROOT}/configs/zero/zero2.json"],
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
COLD = ["--set", "container=[]"]
"""Start every process without preloaded imports, as for users."""


def prepare(folder):
    """Write latents, `train.yaml` and `cluster.yaml`."""
    latents, autoencoder = tiny_dataset(folder)
    config = TRAIN.format(
        every=EVERY, autoencoder=json.dumps(autoencoder), latents=json.dumps(latents)
    )
    (folder / "train.yaml").write_text(config)
    (folder / "cluster.yaml").write_text(
        yaml.safe_dump({**PROFILE, "container": fork_server.command_prefix()})
    )


def launch(cluster, *arguments):
    return cluster.run(sys.executable, "-m", "launch", *map(str, arguments), check=False, cwd=ROOT)


class Job:
    def __init__(self, cluster, folder, run, *overrides, changes=(), more=()):
        """`run`: its folder, or the name of one in `folder`."""
        self.cluster, self.run = cluster, folder / run
        self.unfinished_faults = []  # functions that wait for the last effects of a fault
        launched = self.submit(cluster, folder, run, *overrides, changes=changes, more=more)
        assert launched.returncode == 0, launched.stdout + launched.stderr
        self.folder = JobFolder(self.run / "launch")
        self.id = self.folder.read_raw_record()["job"]

    @staticmethod
    def submit(cluster, folder, run, *overrides, changes=(), more=()):
        """Run `launch train`, which SLURM may refuse."""
        options = [option for change in changes for option in ("--set", change)]
        arguments = [
            f"run_dir={folder / run}",
            *overrides,
            "--cluster",
            folder / "cluster.yaml",
            "--nodes",
            2,
        ]
        return launch(cluster, "train", folder / "train.yaml", *arguments, *options, *more)

    def launch(self, *arguments):
        return launch(self.cluster, *arguments)

    def log(self):
        return metric_lines(self.run) if (self.run / "metrics.jsonl").exists() else []

    def steps(self):
        """Logged steps, repeated ones included."""
        return [line["step"] for line in self.log() if "event" not in line]

    def resumes(self):
        return [line for line in self.log() if line.get("event") == "resumed"]

    def wait_steps(self, more):
        """Wait until `more` further steps are logged."""
        before = len(self.steps())
        self.wait(lambda: len(self.steps()) >= before + more, f"{more} more steps after {before}")

    def wait(self, predicate, what, timeout_s=150):
        try:
            self.cluster.wait(predicate, timeout_s, what)
        except Exception as error:
            logs = self.launch("logs", self.run).stdout[-6000:]
            raise AssertionError(f"{what}\n{self.folder.read_attempts()}\n{logs}") from error

    def wait_end(self):
        self.wait(lambda: self.cluster.job_state(self.id) in ("COMPLETED", ""), "the end")

    def ranks(self, node=None):
        """(pid, command) of the training processes on one node, or on all."""
        processes = [
            process
            for name in ([node] if node else self.cluster.names)
            for process in self.cluster.pids_on(name)
        ]
        return [
            (pid, command)
            for pid, command in processes
            if "lpl_pretrain train" in command and fork_server.__file__ not in command
        ]

    def nodes(self):
        """[node of the batch script and rank 0, other node]."""
        first, listed = self.cluster.run(
            "squeue", "-h", "-j", self.id, "-o", "%B %N"
        ).stdout.split()
        hosts = self.cluster.run("scontrol", "show", "hostnames", listed).stdout.split()
        return sorted(hosts, key=lambda node: node != first)

    def restarts(self):
        """Number of restarts, by SLURM."""
        return int(self.cluster.run("squeue", "-h", "-j", self.id, "-O", "RestartCnt").stdout)

    def resumes_after(self, fault):
        """Apply a fault; return the seconds until the run has resumed, and the number of steps that
        are repeated.
        """
        resumed, started = len(self.resumes()), time.time()
        fault(self)
        self.wait(lambda: len(self.resumes()) > resumed, "resumed")
        log_lines = self.log()
        at = [i for i, line in enumerate(log_lines) if line.get("event") == "resumed"][resumed]
        made = max(line["step"] for line in log_lines[:at] if "event" not in line)
        return round(log_lines[at]["time_s"] - started, 1), made - log_lines[at]["step"]


def weights(run, step):
    """{name: bytes} of a checkpoint's files, without its manifest."""
    files = (run / "checkpoints" / f"step_{step:08d}").iterdir()
    return {file.name: file.read_bytes() for file in files if file.name != "manifest.json"}
