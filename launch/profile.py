"""A cluster as this package sees it: where jobs go, what a node has, what its processes need around
them.  No hyper-parameters.
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

from launch.script_checks import control_character
from launch.secrets import looks_secret, secret_in_line, secret_in_words
from lpl_pretrain.config.base import PathText, Section


def _one_line(text: str) -> str:
    if (found := control_character(text, allowed="\t")) is not None:
        raise ValueError(
            f"holds the control character {found!r}: write one line for each command, and "
            "plain values"
        )
    return text


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:,@%&|*\[\]()=+-]+$")]
"""What a scheduler's option can be: no spaces, quotes or line ends."""


class ClusterProfile(Section):
    partition: Optional[Word] = None
    cpu_partition: Optional[Word] = None
    """For jobs of one process without accelerators; absent: the same partition."""
    account: Optional[Word] = None
    qos: Optional[Word] = None
    constraint: Optional[Word] = None
    exclude: tuple[Word, ...] = ()
    """Nodes that are not to be used."""
    processes_per_node: PositiveInt = 1
    """One for each accelerator."""
    gpus_per_node: NonNegativeInt = 0
    cpus_per_process: PositiveInt = 4
    memory_gib_per_node: Optional[PositiveFloat] = None
    """Absent: the scheduler's own default."""
    time_limit_min: PositiveInt = 1440
    signal_s: PositiveInt = 120
    """How long before the time limit, and before a preempted job is killed, its processes are told:
    time for a checkpoint.
    """
    setup: tuple[Line, ...] = ()
    """Lines of shell before the job, such as `module load cuda`."""
    container: tuple[PathText, ...] = ()
    """What a command is run by: [apptainer, exec, --nv, /images/lpl.sif]."""
    python: Optional[PathText] = None
    """Interpreter on the nodes; absent: the one that submits."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = {}
    """Variables such as NCCL_SOCKET_IFNAME.  Secrets are inherited from the submitting shell and
    belong into no file.
    """
    on_changed_code: Literal["warn", "refuse"] = "warn"
    """What a requeued job does when this package is not what it was at submission."""
    on_unfit_node: Literal["exclude", "stop"] = "exclude"
    """When the preflight of a training finds a node unfit: go on without it, or stop."""
    on_hang: Literal["requeue", "stop", "wait"] = "requeue"
    """Training in which no step ends for long (`hang` of its configuration): kill it and begin
    again, kill it, or let it be.
    """
    max_timeouts: PositiveInt = 100
    """A job that meets its time limit goes on that often."""
    max_failures: NonNegativeInt = 3
    """A job that fails begins again so many times in a row without having made a new checkpoint."""

    def of_one_process(self) -> ClusterProfile:
        """For work that needs no accelerator: watching, verification."""
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
        """Asked first: what other refusals print is no secret then."""
        if not isinstance(raw, dict):
            return raw
        environment = raw.get("environment")
        for name, value in environment.items() if isinstance(environment, dict) else ():
            if (reason := looks_secret(str(name), str(value))) is not None:
                raise ValueError(_refusal(f"environment.{name}", reason))
        for line in _texts(raw.get("setup")):
            if (found := secret_in_line(line)) is not None:
                raise ValueError(_refusal(f"setup: {found[0]}", found[1]))
        if (found := secret_in_words(_texts(raw.get("container")))) is not None:
            raise ValueError(_refusal(f"container: {found[0]}", found[1]))
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
    """What a list of lines or words holds, before it is known to be one."""
    return list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]


def _refusal(what: str, reason: str) -> str:
    return (
        f"{what}: looks like a secret ({reason}), which scripts would show: export it where "
        "you submit"
    )
