"""A throw-away multi-node SLURM cluster on one machine: the real daemons, made-up hardware, no
trace left behind.

Every machine of the cluster is a set of kernel namespaces (processes, host name, mounts, network),
so a SIGKILL to its PID 1 is a power cut: whatever ran there is gone before the kernel lets anybody
reap that PID 1. Needs root.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.slurm.network import ADDRESS, HEAD, PLUG_IN, SWITCH, in_network_of, set_cable

CONF = """\
ClusterName=test
# job ids of two clusters must differ: submitit takes the results of an older job of the same id for those of the new one
FirstJobId={first_job_id}
SlurmctldHost=head({head})
# cred_expire is also how long a requeued job has to wait: 120 s unless told otherwise, and below 5 s it is refused
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
# no control groups and no systemd needed
ProctrackType=proctrack/linuxproc
# hardware as declared below, not as found
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=100
PropagateResourceLimits=NONE
SlurmdTimeout={slurmd_timeout_s}
KillWait={kill_wait_s}
# a host whose cable is pulled refuses nothing: how long everybody tries to reach it
MessageTimeout=5
TCPTimeout=1
# finished jobs stay in the controller's table: the stand-in for sacct reads them there
MinJobAge=86400
# a node that comes back serves again, whatever it was down for
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# the signal of --signal also announces a preemption
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/head.log
SlurmdLogFile={folder}/log/%n.log
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

SACCT = """\
#!/bin/sh
# Stand-in for sacct where no slurmdbd runs: `-o JobID,State,NodeList --parsable2 -j ID [-j ID ...]` from the controller's table.
ids=$(echo "$*" | grep -oE -e '(-j|--jobs)[ =]?[0-9_,]+' | grep -oE '[0-9][0-9_,]*$' | paste -sd, -)
echo "JobID|State|NodeList"
exec squeue -a -h -r -t all ${ids:+-j "$ids"} -o "%i|%T|%N"
"""

SWITCHBOARD = "munge"
"""The machine that has the switch: munged speaks to nobody over a network."""

# own /etc/hosts and own host name, seen by nobody outside; $1 is the hosts file, $2 the name, $3
# the address
AS_HOST = (
    'mount --bind "$1" /etc/hosts && hostname "$2" && {{ {wire}; }} && shift 3 && exec "$@" '
    "< /dev/null"
)


@dataclass
class Machine:
    """A running machine: our child that holds it, its PID 1 as the host counts, and its process
    namespace kept open.
    """

    child: subprocess.Popen[bytes]
    init: int
    namespace: int  # while this is open the kernel gives the namespace's number to no other one


@dataclass
class Cluster:
    """Partition `main` is preempted by `high`; nodes are node1, node2, ...; the folder is absolute
    and serves one cluster once.
    """

    folder: Path
    nodes: int = 3
    cpus: int = 4
    gpus: int = 2
    mem_mib: int = 4000
    grace_s: int = 20
    kill_wait_s: int = 5
    slurmd_timeout_s: int = 4
    disk_mib: int = 32
    machines: dict[str, Machine] = field(default_factory=dict, init=False)

    @property
    def names(self) -> list[str]:
        """The nodes' names, which are their host names too."""
        return [f"node{index + 1}" for index in range(self.nodes)]

    @property
    def disk(self) -> Path:
        """A small one that every machine sees, to be filled."""
        return self.folder / "disk"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which sbatch, squeue, scontrol and the stand-in for sacct talk to this
        cluster.
        """
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH_", "SRUN_"))
        }
        path = f"{self.folder}/bin:{kept.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**kept, "SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path}

    def up(self) -> None:
        """Return once every node is idle; where that fails nothing stays and the daemons' logs are
        printed.
        """
        atexit.register(self.down)
        try:
            self._configure()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={self.disk_mib}m", "small", str(self.disk)],
                check=True,
            )
            files = [
                f"--{kind}={self.folder}/run/munge.{kind}"
                for kind in ("socket", "key-file", "pid-file", "seed-file")
            ]
            self._start(SWITCHBOARD, "", "/usr/sbin/munged", "--foreground", "--force", *files)
            self.wait((self.folder / "run" / "munge.socket").exists, 10, "munged")
            self._start_head()
            for node in self.names:
                self._start_node(node)
            self.wait(
                lambda: all(self.node_state(node) == "idle" for node in self.names),
                30,
                "all nodes idle",
            )
        except BaseException:
            print(self.logs(), file=sys.stderr)
            self.down()
            raise

    def down(self) -> None:
        """End every machine with all that runs on it; the folder stays. Harmless when repeated."""
        for name in reversed(list(self.machines)):
            self._power_off(name)
        if self.disk.is_mount():
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
        atexit.unregister(self.down)

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        machine: str = "head",
    ) -> subprocess.CompletedProcess[str]:
        """A command as on the login host, where the nodes' names resolve; with `check` a failure
        raises its output.
        """
        there = in_network_of(self.machines[machine].init)
        command = [*there, "unshare", "--mount", "--uts", *self._as_host(machine), *map(str, argv)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env or self.env
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, argv))}: exit code "
                f"{done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def job_state(self, job_id: int | str) -> str:
        """SLURM's word for the state, such as RUNNING; empty for a job that it does not know."""
        return self.run(
            "squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%T", check=False
        ).stdout.partition("\n")[0]

    def node_state(self, node: str) -> str:
        """SLURM's word for the state, such as idle; a star at its end says that the node does not
        answer.
        """
        return self.run(
            "sinfo", "-h", "-p", "main", "-n", node, "-o", "%T", check=False
        ).stdout.strip()

    def wait_state(self, job_id: int | str, states: str | tuple[str, ...], timeout_s: float) -> str:
        """Wait for one of the states and return it; a time-out tells all that SLURM knows about the
        job.
        """
        wanted = (states,) if isinstance(states, str) else states
        try:
            return self.wait(
                lambda: (state := self.job_state(job_id)) in wanted and state,
                timeout_s,
                f"job {job_id} {wanted}",
            )
        except TimeoutError as error:
            raise TimeoutError(
                f"{error}\n{self.run('scontrol', 'show', 'job', str(job_id), check=False).stdout}"
            ) from None

    def wait(self, predicate: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Wait until the predicate's answer is true and return that answer; `TimeoutError` names
        `what` did not come.
        """
        end = time.monotonic() + timeout_s
        while not (answer := predicate()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s} s in vain for {what}")
            time.sleep(0.05)
        return answer

    def pids_on(self, node: str) -> list[tuple[int, str]]:
        """Every process of the node, also after its crash: its number on this machine and its
        command line.
        """
        namespace = os.fstat(self.machines[node].namespace).st_ino
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we looked
                if os.stat(entry / "ns" / "pid").st_ino == namespace:
                    command = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    found.append((int(entry.name), command.strip()))
        return found

    def crash(self, node: str, tell: bool = False) -> None:
        """A power cut; SLURM notices when the node is silent for too long, or at once with `tell`."""
        machine = self.machines[node]
        if machine.child.poll() is None:
            os.kill(machine.init, signal.SIGKILL)
            machine.child.wait(10)
        if tell:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def boot(self, node: str) -> None:
        """Bring a crashed node back; returns when SLURM counts on it again."""
        self._power_off(node)
        self._start_node(node)
        self._wait_ready(node)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's slurmd alone: SLURM loses sight of the node while the jobs on it run
        on.
        """
        os.kill(self.machines[node].init, signal.SIGUSR1)
        self.wait(lambda: not self._has_slurmd(node), 10, f"the end of slurmd on {node}")

    def start_slurmd(self, node: str) -> None:
        """Start slurmd again on a node that lost it; returns when SLURM counts on the node again."""
        os.kill(self.machines[node].init, signal.SIGUSR2)
        self._wait_ready(node)

    def cut(self, node: str) -> None:
        """Pull the node's cable: what runs there runs on, and SLURM notices when the node is silent
        for too long.
        """
        set_cable(self.machines[SWITCHBOARD].init, node, plugged=False)

    def mend(self, node: str) -> None:
        """Plug the cable in again; returns when SLURM counts on the node again."""
        set_cable(self.machines[SWITCHBOARD].init, node, plugged=True)
        self._wait_ready(node)

    def logs(self) -> str:
        """The ends of all daemons' logs, for the report of a failed test."""
        # slurmd and slurmctld say everything twice, and with the time only in NAME.log: it replaces
        # NAME.out where there are both
        files = {file.stem: file for file in sorted((self.folder / "log").glob("*"), reverse=True)}
        ends = {
            name: file.read_text(errors="replace").splitlines()[-40:]
            for name, file in files.items()
        }
        return "\n".join("\n".join([f"--- {name}", *lines]) for name, lines in sorted(ends.items()))

    def _configure(self) -> None:
        for name in (
            "run",
            "state",
            "log",
            "dev",
            "bin",
            "disk",
            *(f"spool/{node}" for node in self.names),
        ):
            (self.folder / name).mkdir(parents=True)
        lines = [CONF.format(head=HEAD, first_job_id=random.randint(1000, 60000), **vars(self))]
        hosts, gres = ["127.0.0.1 localhost", f"{HEAD} head"], ["AutoDetect=off"]
        for node in self.names:
            hosts.append(f"{self._address(node)} {node}")
            machine = (
                f"NodeAddr={self._address(node)} CPUs={self.cpus} RealMemory={self.mem_mib} "
                f"Gres=gpu:{self.gpus}"
            )
            lines.append(f"NodeName={node} NodeHostname={node} {machine} State=UNKNOWN")
            for gpu in range(self.gpus):
                device = self.folder / "dev" / f"{node}-gpu{gpu}"
                os.mknod(
                    device, 0o20666, os.makedev(1, 3)
                )  # SLURM wants character devices: twins of /dev/null
                gres.append(f"NodeName={node} Name=gpu File={device}")
        # cgroup.conf has to be there and stays empty: slurmd 22.05 dies of CgroupPlugin=disabled
        for name, content in {
            "slurm.conf": lines,
            "gres.conf": gres,
            "hosts": hosts,
            "cgroup.conf": [],
        }.items():
            (self.folder / name).write_text("\n".join(content) + "\n")
        for name, mode, data in (
            ("run/munge.key-file", 0o400, os.urandom(128)),
            ("bin/sacct", 0o755, SACCT.encode()),
        ):
            (self.folder / name).touch(mode)
            (self.folder / name).write_bytes(data)

    def _address(self, node: str) -> str:
        return ADDRESS.format(number=10 + self.names.index(node))

    def _as_host(self, name: str, address: str = "", wire: str = ":") -> list[str]:
        return [
            "sh",
            "-c",
            AS_HOST.format(wire=wire),
            "sh",
            str(self.folder / "hosts"),
            name,
            address,
        ]

    def _start(self, name: str, address: str, *argv: str) -> None:
        """Start a machine whose PID 1 is the command; the one without an address has the switch."""
        # pdeathsig and kill-child: even where we are killed outright the machine ends with us. The
        # kernel means the thread that started it, not the process: bring a cluster up in the main
        # thread
        keep = ["setpriv", "--pdeathsig", "SIGKILL", "unshare", "--kill-child=SIGKILL"]
        host = self._as_host(name, address, PLUG_IN if address else SWITCH)
        command = [
            *keep,
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--fork",
            "--mount-proc",
            *host,
            *argv,
        ]
        switch = f"/proc/{self.machines[SWITCHBOARD].init}/ns/net" if address else os.devnull
        with open(self.folder / "log" / f"{name}.out", "ab") as log, open(switch) as stdin:
            # its own session: Ctrl-C must not reach the daemons before the tests have taken them
            # down
            child = subprocess.Popen(
                command, stdin=stdin, stdout=log, stderr=log, start_new_session=True, env=self.env
            )
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        init = int(
            self.wait(lambda: children.read_text().strip(), 10, f"the first process of {name}")
        )
        self.machines[name] = Machine(child, init, os.open(f"/proc/{init}/ns/pid", os.O_RDONLY))

    def _start_head(self) -> None:
        self._start(
            "head", HEAD, "/usr/sbin/slurmctld", "-D", "-f", str(self.folder / "slurm.conf")
        )

    def _start_node(self, node: str) -> None:
        init = Path(__file__).resolve().with_name("node.py")
        self._start(
            node,
            self._address(node),
            sys.executable,
            "-IS",
            str(init),
            f"{self.folder}/slurm.conf",
            node,
        )

    def _power_off(self, name: str) -> None:
        self.crash(name)
        os.close(self.machines.pop(name).namespace)

    def _has_slurmd(self, node: str) -> bool:
        return any(command.startswith("/usr/sbin/slurmd -D") for _, command in self.pids_on(node))

    def _wait_ready(self, node: str) -> None:
        ready = ("idle", "mixed", "allocated", "completing")
        self.wait(
            lambda: self._has_slurmd(node) and self.node_state(node) in ready, 30, f"{node} ready"
        )
