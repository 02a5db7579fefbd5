"""A process of the fork server behaves like one that Python started anew (`cold`)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import fork_server

PRINT_SURROUNDINGS = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["WORD"], sys.stdin.read())
print(oct(os.umask(0)), __name__, sys.path[0])
print([name for name in sys.modules if name.startswith(("lpl_pretrain", "launch", "tests"))])
print("and this", file=sys.stderr)
"""


def start(folder, code, *arguments, cold=False, **options):
    (folder / "probe.py").write_text(code)
    command = [
        *([] if cold else fork_server.command_prefix()),
        sys.executable,
        "-m",
        "probe",
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_has_the_arguments_environment_and_streams_of_a_cold_start(tmp_path):
    options = {"stdin": subprocess.PIPE, "env": {"WORD": "ü x", "PATH": "/bin"}, "umask": 0o027}
    outputs = [
        start(tmp_path, PRINT_SURROUNDINGS, "a b", "", "--c", cold=cold, **options).communicate(
            "in"
        )
        for cold in (True, False)
    ]
    assert (
        outputs[0] == outputs[1]
        and outputs[0][0].startswith("['a b', '', '--c'] ")
        and outputs[0][1] == "and this\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        "",
        "exit(7)",
        "exit('words')",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os._exit(3)",
    ],
)
def test_exit_status_and_output_equal_those_of_a_cold_start(tmp_path, code):
    results = []
    for cold in (True, False):
        process = start(tmp_path, code, cold=cold)
        results.append((*process.communicate(), process.returncode))
    assert results[0] == results[1]


def test_prints_a_traceback(tmp_path):
    process = start(tmp_path, "1 / 0")
    assert "ZeroDivisionError" in process.communicate()[1] and process.returncode == 1


def test_receives_signals(tmp_path):
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    process = start(tmp_path, code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    process.communicate()
    assert process.returncode == 5


def test_dies_with_its_client(tmp_path):
    """A stopped worker is killed as well."""
    process = start(tmp_path, "import os\nprint(os.getpid(), flush=True)\nos.kill(os.getpid(), 19)")
    proc = Path("/proc", process.stdout.readline().strip())
    assert "-m probe" in (proc / "cmdline").read_text().replace("\0", " ")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while proc.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
