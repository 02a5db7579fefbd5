"""Messages of the other ranks after one rank has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import fork_server
from tools.faults.processes import free_port

BODY = """
import os, sys
import click
import torch
import torch.distributed as dist
from lpl_pretrain.cli.main import run

@click.command()
def command():
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == "1":
        os._exit(1)
    {statement}

sys.argv = ["train"]
run(command)
"""


def output_of_rank0(folder, statement: str) -> tuple[str, int]:
    """Runs two ranks of which rank 1 ends; returns stderr and exit status of rank 0."""
    (folder / "probe.py").write_text(BODY.replace("{statement}", statement))
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    command = [*fork_server.command_prefix(), sys.executable, "-m", "probe"]
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env={**shared, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    texts = [rank.communicate(timeout=120)[1] for rank in ranks]
    return texts[0], ranks[0].returncode


def test_a_lost_rank_is_reported_in_one_line(tmp_path):
    text, status = output_of_rank0(tmp_path, "dist.all_reduce(torch.zeros(4))")
    assert "another rank has ended" in text and "its own error says why" in text and status == 1
    assert "Traceback" not in text


@pytest.mark.parametrize("error", ["RuntimeError('shapes differ')", "ValueError('Broken pipe')"])
def test_other_errors_keep_their_traceback(tmp_path, error):
    text, status = output_of_rank0(tmp_path, f"raise {error}")
    assert "Traceback" in text and status == 1
