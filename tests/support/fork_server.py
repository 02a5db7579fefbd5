"""Fork server: starts Python processes that have torch and other heavy packages imported already.

    python -IS fork_server.py SOCKET PYTHON -m MODULE ...

behaves like `PYTHON -m MODULE ...` for everyone who starts, signals or kills it, but starts seconds
earlier: a training of four ranks saves half a minute of CPU time, and the tests start many.  The
server imports third-party packages only, never code of this repository.

Three processes take part in a request.  The client is the command above.  The worker runs MODULE
with the client's arguments, environment, standard streams and namespaces.  The supervisor, parent
of the worker, forwards the client's signals, reports the worker's exit status to the client and
kills the worker when the client dies.
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

PRELOADED = (
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
NAMESPACE_FLAGS = {"mnt": 0x00020000, "uts": 0x04000000, "net": 0x40000000, "pid": 0x20000000}
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TITLE_BYTES = 8192
"""Space for a worker's command line, reserved in the server's own."""
MAX_REQUEST_BYTES = 1 << 17


@functools.cache
def command_prefix() -> list[str]:
    """Words to put before a command so that the fork server runs it; starts the server.

    Empty on a machine with a GPU: a CUDA driver does not survive a fork.
    """
    if os.path.exists("/dev/nvidiactl"):
        return []
    folder = tempfile.TemporaryDirectory(prefix="fork-server-")
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


def run_client(path: str, argv: list[str]) -> int:
    """Run `argv` through the server at `path`; return its exit status, or die of its signal."""
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
        for number in FORWARDED_SIGNALS:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        reply = connection.recv(16)
        if not reply:
            log = Path(path).with_name("log").read_text()
            sys.exit(f"the fork server ended before the process did; end of its log: {log[-2000:]}")
    status = int(reply)
    if status < 0:  # the worker died of a signal
        with contextlib.suppress(OSError):  # SIGKILL and SIGSTOP have no handler to reset
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(path: str) -> None:
    """Accept requests until standard input closes, when the process that started the server ended.

    Returns in each worker only, which then runs its module.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    for module in PRELOADED:
        importlib.import_module(module)
    for module in [name for name in sys.modules if name.split(".")[0] == "lpl_pretrain"]:
        del sys.modules[module]  # torch loads torchrun's plugins, of which one is ours
    gc.freeze()  # the collector would write to the shared pages and so copy them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps supervisors
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return start_worker(connection)
        connection.close()


def start_worker(connection: socket.socket) -> None:
    """Fork the worker of one request and return in it; its parent becomes the supervisor."""
    data, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
    if not data:
        os._exit(0)
    request = json.loads(data)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    enter_namespaces_of(int.from_bytes(credentials[:4], sys.byteorder))
    if worker := os.fork():
        supervise(worker, connection)
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
    set_command_line(f"RANK={rank} {' '.join(request['argv'])}")
    _python, _m, *sys.argv = request["argv"]
    sys.path[0:1] = [request["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]


def supervise(worker: int, connection: socket.socket) -> NoReturn:
    """Forward signals to the worker until it ends or the client does; send its exit status."""
    ended = os.pidfd_open(worker)
    with contextlib.suppress(ConnectionError):
        while ended not in (ready := select.select([ended, connection], [], [])[0]):
            if not (signals := connection.recv(1)):
                break
            os.kill(worker, signals[0])
    if ended not in ready:
        os.kill(worker, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(status).encode())
    os._exit(0)


def enter_namespaces_of(pid: int) -> None:
    """Join the namespaces of process `pid`; later children also join its PID namespace.

    Makes no system call where they are this process's own, because joining needs root.
    """
    other = {
        kind
        for kind in NAMESPACE_FLAGS
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    }
    if other:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(os.pidfd_open(pid), sum(NAMESPACE_FLAGS[kind] for kind in other)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def set_command_line(title: str) -> None:
    """Overwrite what /proc/PID/cmdline of this process shows."""
    with open("/proc/self/stat") as file:
        numbers = file.read().rpartition(")")[2].split()
    start, end = int(numbers[45]), int(numbers[46])
    ctypes.memmove(start, title.encode()[: end - start - 1].ljust(end - start, b"\0"), end - start)


def run(module: str) -> NoReturn:
    """Run a module as `python -m` does, but skip the interpreter's slow teardown of modules."""
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
        sys.exit(run_client(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[2])
    run(sys.argv[0])
