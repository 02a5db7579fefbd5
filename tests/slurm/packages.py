"""Debian packages of the test cluster, and the reason where it cannot run."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

from tests.slurm.network import SWITCH

PACKAGE_OF = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
SBIN = "/usr/sbin:/sbin"


def absent() -> list[str]:
    """Packages whose programs are not on this machine."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    return [
        package for program, package in PACKAGE_OF.items() if not shutil.which(program, path=path)
    ]


def install() -> None:
    """Install missing packages.  Raises CalledProcessError or TimeoutExpired."""
    packages = absent()
    if not packages:
        return
    # --no-install-recommends: nothing of mail, accounting or the desktop comes along
    options = ["-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"]
    environment = {
        **os.environ,
        "DEBIAN_FRONTEND": "noninteractive",
        "RUNLEVEL": "1",
    }  # no service is started
    # one unreachable package source fails the update but need not fail the installation
    subprocess.run(
        ["apt-get", "update", "-qq"], env=environment, check=False, capture_output=True, timeout=240
    )
    subprocess.run(
        ["apt-get", "install", *options, *packages],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )


@functools.cache
def missing() -> str | None:
    """Reason why no cluster can run here, after an attempt to install it; None when one can."""
    if os.geteuid():
        return "a SLURM test cluster needs root: its nodes are kernel namespaces"
    if absent() and not shutil.which("apt-get"):
        return f"no apt-get to install {', '.join(absent())}"
    try:
        install()
    except subprocess.TimeoutExpired as error:
        return f"the installation of {', '.join(absent())} took longer than {error.timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"{', '.join(absent())} cannot be installed: {error.stderr.strip()[-300:]}"
    # root inside a plain container may lack the right
    unshare = [
        "unshare",
        "--mount",
        "--uts",
        "--net",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
    ]
    probe = subprocess.run(
        [*unshare, f"{SWITCH} && ip link add type veth"], capture_output=True, text=True
    )
    return (
        f"root may not create namespaces or network devices here: {probe.stderr.strip()}"
        if probe.returncode
        else None
    )
