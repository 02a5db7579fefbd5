"""PID 1 of a node: `python node.py SLURM_CONF NODE` keeps slurmd and reaps what jobs leave.

SIGUSR1 kills slurmd and SIGUSR2 starts it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main(conf: str, node: str) -> None:
    # blocked and waited for, not handled: a PID 1 loses signals that come before it has a handler
    signals = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    slurmd, wanted = 0, True
    while True:
        if wanted and not slurmd:
            argv = ["/usr/sbin/slurmd", "-D", "-N", node, "-f", conf]
            slurmd = os.posix_spawn(argv[0], argv, os.environ, setsigmask=[])
            wanted = False
        number = signal.sigwaitinfo(signals).si_signo
        if number == signal.SIGUSR1 and slurmd:
            os.kill(slurmd, signal.SIGKILL)
        # remembered, as the old slurmd may still be dying
        wanted = wanted or number == signal.SIGUSR2
        with contextlib.suppress(ChildProcessError):  # no child is left
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                slurmd = 0 if pid == slurmd else slurmd


if __name__ == "__main__":
    main(*sys.argv[1:])
