"""A temporary multi-node SLURM cluster on one machine: real daemons, simulated hardware.

Each machine of the cluster is a set of kernel namespaces (processes, host name, mounts, network),
so a SIGKILL to its PID 1 is a power cut: all its processes have ended before the kernel lets that
PID 1 be reaped.  Needs root.
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
# two clusters use different job ids: submitit would read the results of an older job of the same id
FirstJobId={first_job_id}
SlurmctldHost=head({head})
# cred_expire is also the delay of a requeued job: 120 s by default, 5 s at least
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
# time-outs for a disconnected host, which refuses no connection
MessageTimeout=5
TCPTimeout=1
# finished jobs stay in the controller's table, where the substitute for sacct reads them
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
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP \\
  PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

SACCT = """\
#!/bin/sh
# Substitute for sacct without slurmdbd: reads the controller's table.
# sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]
ids=$(echo "$*" | grep -oE -e '(-j|--jobs)[ =]?[0-9_,]+' | grep -oE '[0-9][0-9_,]*$' | paste -sd, -)
echo "JobID|State|NodeList"
exec squeue -a -h -r -t all ${ids:+-j "$ids"} -o "%i|%T|%N"
"""

SWITCHBOARD = "munge"
"""Machine of the network switch and of munged, which uses no network."""

# an /etc/hosts and a host name that exist only inside; $1: hosts file, $2: name, $3: address
AS_HOST = (
    'mount --bind "$1" /etc/hosts && hostname "$2" && {{ {wire}; }} && shift 3 && exec "$@" '
    "< /dev/null"
)


@dataclass
class Machine:
    """A running machine."""

    child: subprocess.Popen[bytes]
    """Process that started it."""
    init: int
    """Pid of its PID 1 on the host."""
    namespace: int
    """File descriptor of its process namespace; while it is open, the number is not reused."""


@dataclass
class Cluster:
    """Partition `high` preempts `main`; nodes are node1, node2, ...

    `folder` is absolute, and used for one cluster once.
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
        """Names of the nodes, which are also their host names."""
        return [f"node{index + 1}" for index in range(self.nodes)]

    @property
    def disk(self) -> Path:
        """A small file system that all machines share; tests fill it up."""
        return self.folder / "disk"

    @property
    def env(self) -> dict[str, str]:
        """Environment in which sbatch, squeue, scontrol and sacct use this cluster."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH_", "SRUN_"))
        }
        path = f"{self.folder}/bin:{kept.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**kept, "SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path}

    def up(self) -> None:
        """Start the cluster and return once every node is idle.

        On failure, all of it is stopped and the daemons' logs are printed.
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
        """Stop all machines with all their processes; the folder stays.  May be called twice."""
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
        """Run a command on a machine, by default the login host.

        With `check`, a failed command raises RuntimeError with its output.
        """
        there = in_network_of(self.machines[machine].init)
        command = [*there, "unshare", "--mount", "--uts", *self._as_host(machine), *map(str, argv)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env or self.env
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(map(str, argv))}: exit code {done.returncode}\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def job_state(self, job_id: int | str) -> str:
        """SLURM's state of a job, such as RUNNING; "" for an unknown job."""
        return self.run(
            "squeue", "-h", "-t", "all", "-j", str(job_id), "-o", "%T", check=False
        ).stdout.partition("\n")[0]

    def node_state(self, node: str) -> str:
        """SLURM's state of a node, such as idle, with a star where the node does not answer."""
        return self.run(
            "sinfo", "-h", "-p", "main", "-n", node, "-o", "%T", check=False
        ).stdout.strip()

    def wait_state(self, job_id: int | str, states: str | tuple[str, ...], timeout_s: float) -> str:
        """Wait for one of the states and return it; a TimeoutError holds `scontrol show job`."""
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
        """Wait until `predicate` returns a true value, and return that.

        `what`: what is waited for, for the TimeoutError.
        """
        end = time.monotonic() + timeout_s
        while not (result := predicate()):
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s} s without success for {what}")
            time.sleep(0.05)
        return result

    def pids_on(self, node: str) -> list[tuple[int, str]]:
        """(pid on this machine, command line) of each process of the node, also after its crash."""
        namespace = os.fstat(self.machines[node].namespace).st_ino
        processes = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.stat(entry / "ns" / "pid").st_ino == namespace:
                    command = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    processes.append((int(entry.name), command.strip()))
        return processes

    def crash(self, node: str, mark_down: bool = False) -> None:
        """Cut the power of a node.  SLURM notices by its timeout, or with `mark_down` at once."""
        machine = self.machines[node]
        if machine.child.poll() is None:
            os.kill(machine.init, signal.SIGKILL)
            machine.child.wait(10)
        if mark_down:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def boot(self, node: str) -> None:
        """Boot a crashed node; returns when SLURM uses it again."""
        self._power_off(node)
        self._start_node(node)
        self._wait_ready(node)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL the node's slurmd only: SLURM loses the node while its jobs keep running."""
        os.kill(self.machines[node].init, signal.SIGUSR1)
        self.wait(lambda: not self._has_slurmd(node), 10, f"the end of slurmd on {node}")

    def start_slurmd(self, node: str) -> None:
        """Start slurmd again; returns when SLURM uses the node again."""
        os.kill(self.machines[node].init, signal.SIGUSR2)
        self._wait_ready(node)

    def disconnect(self, node: str) -> None:
        """Unplug the node's network: its processes keep running, and SLURM notices later."""
        set_cable(self.machines[SWITCHBOARD].init, node, plugged=False)

    def reconnect(self, node: str) -> None:
        """Plug the network in again; returns when SLURM uses the node again."""
        set_cable(self.machines[SWITCHBOARD].init, node, plugged=True)
        self._wait_ready(node)

    def logs(self) -> str:
        """Last lines of all daemons' logs, for the report of a failed test."""
        # NAME.log, which has times, replaces NAME.out
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
                # SLURM requires character devices: copies of /dev/null
                os.mknod(device, 0o20666, os.makedev(1, 3))
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
        """Start a machine whose PID 1 is the command; the one without an address is the switch."""
        # pdeathsig and kill-child end the machine with this process, even if that is killed.  The
        # kernel watches the thread that started it, so a cluster must be started in the main thread
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
            # a session of its own, so that Ctrl-C does not reach the daemons
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
