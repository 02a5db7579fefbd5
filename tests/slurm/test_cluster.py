"""The test cluster behaves as a real one: what the launcher's tests rest on."""

from __future__ import annotations

import os
import re
import sys
import time

import pytest

# says what happened to it in a file, so that a test waits for words and not for times
TALKING = """#!/bin/sh
say() {{ echo "$1" >> {diary}; }}
trap 'say USR2' USR2
trap 'say TERM; exit 1' TERM
say "start ${{SLURM_RESTART_COUNT:-0}} on $(hostname)"
while :; do sleep 0.2; done
"""


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a script and get the job's id; the jobs are cancelled and gone from their nodes when
    the test ends.
    """
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
def talking(cluster, submit, tmp_path):
    """Submit a job that keeps a diary and wait until it runs: its id and a reader of the diary."""
    diary = tmp_path / "diary"

    def read():
        return diary.read_text().splitlines() if diary.exists() else []

    def start(*options):
        job = submit(TALKING.format(diary=diary), *options)
        cluster.wait(read, 20, "the job's first words")
        return job, read

    return start


def restarted(read, count=1):
    return any(line.startswith(f"start {count} ") for line in read())


def sleeps(cluster, node):
    return any(command.startswith("sleep") for _, command in cluster.pids_on(node))


def test_steps_on_two_nodes_have_own_names_ranks_and_gpus(cluster, submit, tmp_path):
    said = 'echo "$(hostname) rank $SLURM_PROCID gpus $CUDA_VISIBLE_DEVICES"'
    job = submit(
        f"#!/bin/sh\nsrun sh -c '{said}'\n", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2"
    )
    cluster.wait_state(job, "COMPLETED", 20)
    words = [
        re.fullmatch(r"(\w+) rank (\d) gpus (\S+)", line).groups()
        for line in (tmp_path / f"{job}.out").read_text().splitlines()
    ]
    assert sorted(int(rank) for _, rank, _ in words) == [0, 1, 2, 3]
    assert len({host for host, _, _ in words}) == 2
    assert {host for host, _, _ in words} <= set(cluster.names)
    assert {gpus for _, _, gpus in words} == {"0,1"}
    assert (
        cluster.run("sacct", "-o", "JobID,State", "--parsable2", "-j", job)
        .stdout.splitlines()[1]
        .startswith(f"{job}|COMPLETED|")
    )
    assert cluster.job_state(int(job) + 1000) == ""


def test_time_limit_is_announced_by_the_signal(cluster, talking):
    # SLURM looks at time limits every 30 s, and announces one up to a minute early
    _, read = talking("--time=1", "--signal=B:USR2@30")
    cluster.wait(lambda: "USR2" in read(), 40, "SIGUSR2 before the time limit")
    assert "TERM" not in read()


def test_preemption_announces_itself_and_requeues(cluster, submit, talking):
    cluster.run("scontrol", "update", "partitionname=main", "gracetime=2")
    try:
        job, read = talking("--nodelist=node1", "--exclusive", "--signal=B:USR2@10")
        high = submit("#!/bin/sh\nsleep 2\n", "--partition=high", "--nodelist=node1", "--exclusive")
        cluster.wait_state(high, ("RUNNING", "COMPLETING", "COMPLETED"), 40)
        assert read()[1:3] == ["USR2", "TERM"]
        assert cluster.job_state(job) == "PENDING"
        cluster.wait(lambda: restarted(read), 30, "the preempted job's second start")
    finally:
        cluster.run("scontrol", "update", "partitionname=main", f"gracetime={cluster.grace_s}")


def test_requeue_by_hand_starts_the_job_again(cluster, talking):
    job, read = talking()
    cluster.run("scontrol", "requeue", job)
    cluster.wait(lambda: restarted(read), 30, "the second start")
    assert cluster.job_state(job) == "RUNNING"


def test_crash_of_a_node_ends_all_on_it_and_requeues(cluster, talking):
    job, read = talking()
    node = read()[0].split()[-1]
    cluster.wait(lambda: sleeps(cluster, node), 10, "the job's process")
    pids = [pid for pid, _ in cluster.pids_on(node)]
    cluster.crash(node, tell=True)
    try:
        assert cluster.pids_on(node) == []
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert cluster.node_state(node).startswith("down")
        cluster.wait(lambda: restarted(read), 30, "the start on another node")
        assert node not in read()[-1].split()
        assert cluster.job_state(job) == "RUNNING"
    finally:
        cluster.boot(node)


def test_jobs_outlive_the_slurmd_of_their_node(cluster, talking):
    job, read = talking()
    node = read()[0].split()[-1]
    cluster.kill_slurmd(node)
    cluster.wait(lambda: sleeps(cluster, node), 10, "the job's process without slurmd")
    cluster.start_slurmd(node)
    assert cluster.job_state(job) == "RUNNING"
    assert len(read()) == 1


def test_what_runs_on_a_node_that_is_cut_off_runs_on_while_its_job_begins_again_elsewhere(
    cluster, talking
):
    """Until the node is back: then SLURM ends it."""
    job, read = talking()
    node = read()[0].split()[-1]
    old = [pid for pid, command in cluster.pids_on(node) if "slurm_script" in command]
    cluster.cut(node)
    try:
        cluster.wait(lambda: cluster.node_state(node) == "down*", 30, "SLURM misses the node")
        cluster.wait(lambda: restarted(read), 30, "the start on another node")
        assert node not in read()[-1].split() and cluster.job_state(job) == "RUNNING"
        assert old and all(os.path.exists(f"/proc/{pid}") for pid in old)
    finally:
        cluster.mend(node)
    cluster.wait(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in old),
        30,
        "the end of the old attempt",
    )
    assert cluster.job_state(job) == "RUNNING" and not restarted(read, 2)


def test_nothing_passes_a_cut_cable_and_no_connection_hears_of_it(cluster, submit, tmp_path):
    """A sender on one node and a receiver on another, which go on where they were when the cable is
    back.
    """
    heard = tmp_path / "heard"
    talk = f"""#!{sys.executable}
import os, socket, time
if os.environ["SLURM_PROCID"] == "0":
    channel = socket.create_server(("node1", 7000)).accept()[0]
    while data := channel.recv(99):
        with open({str(heard)!r}, "ab") as file:
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
        return heard.read_text().split() if heard.exists() else []

    cluster.wait(lambda: len(numbers()) > 5, 20, "what is sent is heard")
    cluster.cut("node2")
    try:
        time.sleep(0.5)
        before = len(numbers())
        time.sleep(1)
        assert len(numbers()) == before
    finally:
        cluster.mend("node2")
    cluster.wait(lambda: len(numbers()) > before + 5, 20, "the same connection goes on")
    assert numbers() == [str(number) for number in range(len(numbers()))]
