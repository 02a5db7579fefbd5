"""The test cluster behaves as a real one, as the other tests here assume."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest

# writes each event to a file, so that a test waits for lines and not for times
LOGGING_JOB = """#!/bin/sh
note() {{ echo "$1" >> {events}; }}
trap 'note USR2' USR2
trap 'note TERM; exit 1' TERM
note "start ${{SLURM_RESTART_COUNT:-0}} on $(hostname)"
while :; do sleep 0.2; done
"""


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a script and return the job's id; at the end, all jobs have left their nodes."""
    jobs = []

    def send(text, *options):
        script = tmp_path / f"job{len(jobs)}.sh"
        script.write_text(text)
        jobs.append(
            cluster.run(
                "sbatch",
                "--parsable",
                f"--output={tmp_path}/%j.out",
                *options,
                script,
                cwd=tmp_path,
            ).stdout.strip()
        )
        return jobs[-1]

    yield send
    cluster.run("scancel", *jobs, check=False)
    cluster.wait(
        lambda: all(cluster.node_state(node) == "idle" for node in cluster.names),
        30,
        "all nodes idle again",
    )


@pytest.fixture
def logging_job(cluster, submit, tmp_path):
    """Start a job that writes its events to a file; (job id, reader of the file)."""
    events = tmp_path / "events"

    def read():
        return events.read_text().splitlines() if events.exists() else []

    def start(*options):
        job = submit(LOGGING_JOB.format(events=events), *options)
        cluster.wait(read, 20, "the job's first event")
        return job, read

    return start


def restarted(read, count=1):
    return any(line.startswith(f"start {count} ") for line in read())


def sleeps(cluster, node):
    return any(command.startswith("sleep") for _, command in cluster.pids_on(node))


def test_steps_on_two_nodes_have_names_ranks_and_gpus(cluster, submit, tmp_path):
    command = 'echo "$(hostname) rank $SLURM_PROCID gpus $CUDA_VISIBLE_DEVICES"'
    job = submit(
        f"#!/bin/sh\nsrun sh -c '{command}'\n", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2"
    )
    cluster.wait_state(job, "COMPLETED", 20)
    tasks = [
        re.fullmatch(r"(\w+) rank (\d) gpus (\S+)", line).groups()
        for line in (tmp_path / f"{job}.out").read_text().splitlines()
    ]
    assert sorted(int(rank) for _, rank, _ in tasks) == [0, 1, 2, 3]
    assert len({host for host, _, _ in tasks}) == 2
    assert {host for host, _, _ in tasks} <= set(cluster.names)
    assert {gpus for _, _, gpus in tasks} == {"0,1"}
    assert (
        cluster.run("sacct", "-o", "JobID,State", "--parsable2", "-j", job)
        .stdout.splitlines()[1]
        .startswith(f"{job}|COMPLETED|")
    )
    assert cluster.job_state(int(job) + 1000) == ""


def test_signal_comes_before_the_time_limit(cluster, logging_job):
    # SLURM checks time limits every 30 s, and signals up to a minute early
    _, read = logging_job("--time=1", "--signal=B:USR2@30")
    cluster.wait(lambda: "USR2" in read(), 40, "SIGUSR2 before the time limit")
    assert "TERM" not in read()


def test_preemption_signals_and_requeues(cluster, submit, logging_job):
    cluster.run("scontrol", "update", "partitionname=main", "gracetime=2")
    try:
        job, read = logging_job("--nodelist=node1", "--exclusive", "--signal=B:USR2@10")
        high = submit("#!/bin/sh\nsleep 2\n", "--partition=high", "--nodelist=node1", "--exclusive")
        cluster.wait_state(high, ("RUNNING", "COMPLETING", "COMPLETED"), 40)
        assert read()[1:3] == ["USR2", "TERM"]
        assert cluster.job_state(job) == "PENDING"
        cluster.wait(lambda: restarted(read), 30, "the preempted job's second start")
    finally:
        cluster.run("scontrol", "update", "partitionname=main", f"gracetime={cluster.grace_s}")


def test_requeue_restarts_the_job(cluster, logging_job):
    job, read = logging_job()
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: restarted(read), 30, "the second start")
    assert cluster.job_state(job) == "RUNNING"


def test_crash_of_a_node_ends_its_processes_and_requeues_the_job(cluster, logging_job):
    job, read = logging_job()
    node = read()[0].split()[-1]
    cluster.wait(lambda: sleeps(cluster, node), 10, "the job's process")
    pids = [pid for pid, _ in cluster.pids_on(node)]
    cluster.crash(node, mark_down=True)
    try:
        assert cluster.pids_on(node) == []
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert cluster.node_state(node).startswith("down")
        cluster.wait(lambda: restarted(read), 30, "the start on another node")
        assert node not in read()[-1].split()
        assert cluster.job_state(job) == "RUNNING"
    finally:
        cluster.boot(node)


def test_job_survives_the_end_of_slurmd(cluster, logging_job):
    job, read = logging_job()
    node = read()[0].split()[-1]
    cluster.kill_slurmd(node)
    cluster.wait(lambda: sleeps(cluster, node), 10, "the job's process without slurmd")
    cluster.start_slurmd(node)
    assert cluster.job_state(job) == "RUNNING"
    assert len(read()) == 1


def test_old_attempt_survives_on_a_disconnected_node_while_the_job_restarts_elsewhere(
    cluster, logging_job
):
    """SLURM ends it once the node is reconnected."""
    job, read = logging_job()
    node = read()[0].split()[-1]
    old = [pid for pid, command in cluster.pids_on(node) if "slurm_script" in command]
    cluster.disconnect(node)
    try:
        cluster.wait(
            lambda: cluster.node_state(node) == "down*", 30, "SLURM notices the disconnected node"
        )
        cluster.wait(lambda: restarted(read), 30, "the start on another node")
        assert node not in read()[-1].split() and cluster.job_state(job) == "RUNNING"
        assert old and all(os.path.exists(f"/proc/{pid}") for pid in old)
    finally:
        cluster.reconnect(node)
    cluster.wait(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in old),
        30,
        "the end of the old attempt",
    )
    assert cluster.job_state(job) == "RUNNING" and not restarted(read, 2)


def test_connection_survives_a_disconnected_network(cluster, submit, tmp_path):
    """A sender on one node and a receiver on another continue once the network is reconnected."""
    received = tmp_path / "received"
    talk = f"""#!{sys.executable}
import os, socket, time
if os.environ["SLURM_PROCID"] == "0":
    channel = socket.create_server(("node1", 7000)).accept()[0]
    while data := channel.recv(99):
        with open({str(received)!r}, "ab") as file:
            file.write(data)
while True:
    try:
        channel = socket.create_connection(("node1", 7000))
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
for number in range(10**6):
    channel.sendall(b"%d\\n" % number)
    time.sleep(0.1)
"""
    (tmp_path / "talk.py").write_text(talk)
    (tmp_path / "talk.py").chmod(0o755)
    submit(
        f"#!/bin/sh\nsrun {tmp_path}/talk.py\n",
        "--nodelist=node1,node2",
        "--ntasks-per-node=1",
        "--no-requeue",
    )

    def numbers():
        return received.read_text().split() if received.exists() else []

    cluster.wait(lambda: len(numbers()) > 5, 20, "the receiver gets data")
    cluster.disconnect("node2")
    try:
        time.sleep(0.5)
        before = len(numbers())
        time.sleep(1)
        assert len(numbers()) == before
    finally:
        cluster.reconnect("node2")
    cluster.wait(lambda: len(numbers()) > before + 5, 20, "the same connection continues")
    assert numbers() == [str(number) for number in range(len(numbers()))]
