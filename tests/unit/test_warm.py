"""A process that starts warm is, to all who deal with it, the one that would have started cold."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import warm

TELL = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["WORD"], sys.stdin.read(), oct(os.umask(0)), __name__, sys.path[0])
print([name for name in sys.modules if name.startswith(("lpl_pretrain", "launch", "tests"))])
print("and this", file=sys.stderr)
"""


def start(folder, code, *arguments, cold=False, **options):
    (folder / "probe.py").write_text(code)
    command = [*([] if cold else warm.prefix()), sys.executable, "-m", "probe", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_sees_what_a_cold_one_sees(tmp_path):
    options = {"stdin": subprocess.PIPE, "env": {"WORD": "ü x", "PATH": "/bin"}, "umask": 0o027}
    told = [
        start(tmp_path, TELL, "a b", "", "--c", cold=cold, **options).communicate("in")
        for cold in (True, False)
    ]
    assert (
        told[0] == told[1]
        and told[0][0].startswith("['a b', '', '--c'] ")
        and told[0][1] == "and this\n"
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
def test_ends_as_a_cold_one_ends(tmp_path, code):
    ends = []
    for cold in (True, False):
        process = start(tmp_path, code, cold=cold)
        ends.append((*process.communicate(), process.returncode))
    assert ends[0] == ends[1]


def test_tells_of_an_exception(tmp_path):
    process = start(tmp_path, "1 / 0")
    assert "ZeroDivisionError" in process.communicate()[1] and process.returncode == 1


def test_hears_of_signals(tmp_path):
    hear = (
        "import signal, sys\nsignal.signal(signal.SIGUSR2, lambda *_: "
        "sys.exit(5))\nprint('ready', flush=True)\nsignal.pause()"
    )
    process = start(tmp_path, hear)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    process.communicate()
    assert process.returncode == 5


def test_dies_with_the_one_that_asked(tmp_path):
    """Even where it is stopped."""
    process = start(tmp_path, "import os\nprint(os.getpid(), flush=True)\nos.kill(os.getpid(), 19)")
    proc = Path("/proc", process.stdout.readline().strip())
    assert "-m probe" in (proc / "cmdline").read_text().replace("\0", " ")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while proc.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
