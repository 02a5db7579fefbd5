"""Network of the test cluster: a switch, and a cable from it to each machine that can be unplugged.

The switch is a bridge and the machines are network namespaces, so nothing is added to this
machine's own network, and the kernel removes all of it with the processes in it.
"""

from __future__ import annotations

import subprocess

HEAD, ADDRESS = "192.0.2.1", "192.0.2.{number}"
"""Addresses reserved for documentation (RFC 5737)."""
SWITCH = "ip link set lo up && ip link add lan type bridge && ip link set lan up"
# $2 is the machine's name, $3 its address, stdin the switch, in which the cable of a machine that
# has just crashed may still be
PLUG_IN = """\
on_switch() { nsenter --net=/proc/self/fd/0 ip link "$@"; }
on_switch del "$2" 2> /dev/null
ip link set lo up && ip link add eth0 type veth peer name "$2" netns /proc/self/fd/0 &&
ip address add "$3/24" dev eth0 && ip link set eth0 up && on_switch set "$2" master lan up"""


def in_network_of(pid: int) -> list[str]:
    """Prefix of a command that runs in the network namespace of that process."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net"]


def set_cable(switch: int, name: str, *, plugged: bool) -> None:
    """Plug or unplug a machine's cable; `switch` is a process in the switch's namespace.

    Packets of an unplugged machine vanish, and no connection ends or is reset.
    """
    command = [*in_network_of(switch), "ip", "link", "set", name, "up" if plugged else "down"]
    subprocess.run(command, check=True, capture_output=True)
