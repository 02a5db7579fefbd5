"""The cluster profile (configs/cluster/*.yaml): partition, resources of a node, time limit, and the
environment of a job's processes.  It holds no hyper-parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lpl_pretrain.config.base import PathText, Section
from lpl_pretrain.config.names import control_character
from lpl_pretrain.config.secret_patterns import looks_secret, secret_in_line, secret_in_words


def _one_line(text: str) -> str:
    character = control_character(text, allowed="\t")
    if character is not None:
        raise ValueError(
            f"holds the control character {character!r}: write one line for each command, and "
            "plain values"
        )
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""One line of shell, or the value of an environment variable."""
SlurmValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:,@%&|*\[\]()=+-]+$")]
"""Value of an option of sbatch: no spaces, quotes or line breaks."""
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ClusterProfile(Section):
    """Submission of jobs to one SLURM cluster: `python -m launch ... --cluster FILE`."""

    partition: Optional[SlurmValue] = None
    """SLURM partition; absent: the cluster's default one."""
    cpu_partition: Optional[SlurmValue] = None
    """Partition for jobs of one process without accelerators; absent: `partition`."""
    account: Optional[SlurmValue] = None
    """SLURM account that the jobs are charged to."""
    qos: Optional[SlurmValue] = None
    """SLURM quality of service."""
    constraint: Optional[SlurmValue] = None
    """Features that a node must have, such as `h100`, as in `sbatch --constraint`."""
    exclude: tuple[SlurmValue, ...] = ()
    """Nodes that jobs must not run on."""
    processes_per_node: PositiveInt = 1
    """Ranks on each node: one for each accelerator."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs that a job asks for on each node."""
    cpus_per_process: PositiveInt = 4
    """CPU cores for each rank."""
    memory_gib_per_node: Optional[PositiveFloat] = None
    """Host memory of a job on each node; absent: SLURM's default."""
    time_limit_min: PositiveInt = 1440
    """Time limit of one job; a training that reaches it saves a checkpoint and is requeued."""
    signal_s: PositiveInt = 120
    """Seconds between the signal to save a checkpoint and the time limit, or the kill of a
    preempted job.
    """
    setup: tuple[Line, ...] = ()
    """Lines of shell that run before the job's command, such as `module load cuda`."""
    container: tuple[PathText, ...] = ()
    """Words before the command that run it in a container:
    `[apptainer, exec, --nv, /images/lpl.sif]`.
    """
    python: Optional[PathText] = None
    """Python interpreter on the nodes; absent: the one that submits."""
    environment: dict[VariableName, Line] = {}
    """Environment variables of a job, such as NCCL_SOCKET_IFNAME.  Secrets are inherited from the
    submitting shell and do not belong into a file.
    """
    on_changed_code: Literal["warn", "refuse"] = "warn"
    """Reaction of a requeued job to code of this package that is not the code that submitted it."""
    on_unfit_node: Literal["exclude", "stop"] = "exclude"
    """Reaction to a node that the preflight finds unfit: requeue the job without it, or stop."""
    on_hang: Literal["requeue", "stop", "wait"] = "requeue"
    """Reaction to a hang that the watchdog of a training reports: kill and requeue the job, kill
    it, or leave it running.
    """
    max_timeouts: PositiveInt = 100
    """Times that a job is requeued after its time limit."""
    max_failures: NonNegativeInt = 3
    """Times in a row that a failed job is requeued without having saved a new checkpoint."""

    def of_one_process(self) -> ClusterProfile:
        """Profile of a job that needs one process and no accelerator, such as an evaluation's
        watcher.
        """
        return self.model_copy(
            update={
                "partition": self.cpu_partition or self.partition,
                "processes_per_node": 1,
                "gpus_per_node": 0,
                "cpus_per_process": 1,
                "memory_gib_per_node": None,
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, raw: Any) -> Any:
        """Runs before every other check, so that their messages never print a secret."""
        if not isinstance(raw, dict):
            return raw
        environment = raw.get("environment")
        if isinstance(environment, dict):
            for name, value in environment.items():
                reason = looks_secret(str(name), str(value))
                if reason is not None:
                    raise ValueError(_secret_message(f"environment.{name}", reason))
        for line in _texts(raw.get("setup")):
            secret = secret_in_line(line)
            if secret is not None:
                raise ValueError(_secret_message(f"setup: {secret[0]}", secret[1]))
        secret = secret_in_words(_texts(raw.get("container")))
        if secret is not None:
            raise ValueError(_secret_message(f"container: {secret[0]}", secret[1]))
        return raw

    @model_validator(mode="after")
    def _one_process_for_each_accelerator(self) -> ClusterProfile:
        if self.gpus_per_node and self.processes_per_node != self.gpus_per_node:
            raise ValueError(
                f"processes_per_node={self.processes_per_node} with "
                f"gpus_per_node={self.gpus_per_node}: one process for each GPU"
            )
        if self.signal_s >= 60 * self.time_limit_min:
            raise ValueError(
                f"signal_s={self.signal_s} with time_limit_min={self.time_limit_min}: the signal "
                "comes before the job"
            )
        return self


def _texts(value: Any) -> list[str]:
    """Elements of a list of lines or words, before its type was checked."""
    if isinstance(value, (list, tuple)):
        return list(map(str, value))
    return [str(value)]


def _secret_message(key: str, reason: str) -> str:
    return (
        f"{key}: looks like a secret ({reason}), which scripts would show: export it where "
        "you submit"
    )
