"""Processes that need not import torch: forked off one that has, with the name, the streams and the
namespaces of whoever asks.

    python -IS warm.py SOCKET PYTHON -m MODULE ...

is, to those that start, signal or kill it, the process `PYTHON -m MODULE ...`, seconds earlier.
Half of a minute of CPU time, that is, for a training of four ranks, which these tests start over
and over.  What is imported beforehand is other people's, never ours.

The process is not a child of the one that asks, but of one that watches both: it hands signals on,
reports how the process ended, and kills it once nobody asks any more.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    "deepspeed",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers",
    "pydantic",
    "timm",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "wandb",
    "webdataset",
)
NAMESPACES = {"mnt": 0x00020000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000}
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TITLE_BYTES = 8192
LONGEST = 1 << 17
"""Of a request, bytes."""


@functools.cache
def prefix() -> list[str]:
    """What a command is run by to start warm; nothing where there is a GPU, whose driver does not
    outlive a fork.
    """
    if os.path.exists("/dev/nvidiactl"):
        return []
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    path = os.path.join(folder.name, "socket")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, os.path.abspath(__file__), "serve", path, "-" * TITLE_BYTES]
    with open(os.path.join(folder.name, "log"), "wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    while not os.path.exists(path):
        assert server.poll() is None, f"{' '.join(command[:4])} ended with {server.poll()}"
        time.sleep(0.01)
    return [sys.executable, "-IS", os.path.abspath(__file__), path]


def ask(path: str, argv: list[str]) -> int:
    """The client: its end is that of the process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        umask = os.umask(0)
        os.umask(umask)
        request = {
            "argv": argv,
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
            "umask": umask,
        }
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        for number in HANDED_ON:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        if not (told := connection.recv(16)):
            sys.exit(
                "what processes are forked off has ended: "
                f"{Path(path).with_name('log').read_text()[-2000:]}"
            )
    if (status := int(told)) < 0:  # of a signal
        with contextlib.suppress(OSError):  # of those that nobody handles
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(path: str) -> None:
    """Returns in each process that was asked for, as which it goes on; the server itself ends with
    whoever started it.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    for module in IMPORTED:
        importlib.import_module(module)
    for module in [name for name in sys.modules if name.split(".")[0] == "lpl_pretrain"]:
        del sys.modules[module]  # torch loads torchrun's plugins, of which one is ours
    gc.freeze()  # what nobody collects, and so nobody copies
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who watch
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return become(connection)
        connection.close()


def become(connection: socket.socket) -> None:
    data, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
    if not data:
        os._exit(0)
    request = json.loads(data)
    enter_namespaces_of(
        int.from_bytes(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder
        )
    )
    if process := os.fork():
        watch(process, connection)
    connection.close()
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    rank = request["environment"].get("RANK", "0")
    entitle(f"RANK={rank} {' '.join(request['argv'])}")
    _python, _m, *sys.argv = request["argv"]
    sys.path[0:1] = [request["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]


def watch(process: int, connection: socket.socket) -> NoReturn:
    """Until the process has ended."""
    ended = os.pidfd_open(process)
    with contextlib.suppress(ConnectionError):
        while ended not in (ready := select.select([ended, connection], [], [])[0]):
            if not (signals := connection.recv(1)):
                break
            os.kill(process, signals[0])
    if ended not in ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def enter_namespaces_of(pid: int) -> None:
    """With children in the process's own PID namespace; nothing where they are ours anyway, for
    that needs root.
    """
    other = {
        kind
        for kind in NAMESPACES
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    }
    if other:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(os.pidfd_open(pid), sum(NAMESPACES[kind] for kind in other)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def entitle(title: str) -> None:
    """What /proc/PID/cmdline says from now on."""
    with open("/proc/self/stat") as file:
        numbers = file.read().rpartition(")")[2].split()
    start, end = int(numbers[45]), int(numbers[46])
    ctypes.memmove(start, title.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)


def run(module: str) -> NoReturn:
    """As `python -m` does it, but for the end, at which Python would take all modules apart: for
    longer than they take here.
    """
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] != "serve":
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[2])
    run(sys.argv[0])
