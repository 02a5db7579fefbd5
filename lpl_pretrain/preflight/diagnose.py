"""Which nodes cannot train, decided from what their ranks have found: no clock, no file, no process
group.

A node is at fault where it differs from most others, or cannot do what another one can.  What no
node can do, and what as many nodes have one way as another, is no node's fault but the run's; data
that nobody can read are left to `data.on_error`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Literal

from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.preflight.node_report import NodeReport

MEMORY_SHARE = 0.9
"""Of the free memory that most nodes have on their devices."""

Fault = Literal["node", "run", "none"]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    host: str
    ranks: list[int]
    found: str
    wanted: str
    remedy: str
    fault: Fault
    """`node`: it is unfit; `run`: training cannot begin anywhere; `none`: it is reported."""

    def __str__(self) -> str:
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        return (
            f"{self.host} ({ranks}): {self.check}: found {self.found}, wanted {self.wanted}: "
            f"{self.remedy}"
        )


@dataclass(frozen=True, slots=True)
class NodeBandwidth:
    """How fast a node sends or receives, whichever is faster: the other end may be a slow one."""

    host: str
    ranks: list[int]
    mib_per_s: float


def diagnose(facts: Sequence[NodeReport], config: PreflightConfig) -> list[Finding]:
    """One entry of `facts` for each rank; none where another rank judges."""
    if not facts:
        return []

    def room(found: NodeReport) -> str | None:
        wanted = found.required_gib if config.min_free_gib is None else config.min_free_gib
        short = found.free_gib is not None and found.free_gib < wanted
        return (
            f"{found.free_gib:.2f} GiB free where checkpoints need {wanted:.2f}" if short else None
        )

    def versions(found: NodeReport) -> str:
        return ", ".join(f"{name} {version}" for name, version in found.versions.items())

    def no_device(found: NodeReport) -> str | None:
        absent = (
            found.device is None
            and found.device_problem is None
            and any(other.device for other in facts)
        )
        return found.no_device or ("none" if absent else None)

    return [
        *_failing(
            "input",
            facts,
            lambda f: f.refusal,
            "what other nodes accept",
            "see what this node has mounted",
        ),
        *_minority(
            "code", facts, lambda f: f.code[:12], "let all nodes see one copy of this package"
        ),
        *_minority("versions", facts, versions, "install the same on all nodes"),
        *_failing(
            "run folder",
            facts,
            lambda f: f.run_dir_problem,
            "to write in it",
            "mount it there, or set run_dir",
        ),
        *_failing(
            "run",
            facts,
            lambda f: f.in_use,
            "a run that nobody trains",
            "wait for its end",
            comparable=lambda f: f.rank,
        ),
        *_failing(
            "disk",
            facts,
            room,
            "that much",
            "make room, keep fewer checkpoints, or set preflight.min_free_gib",
        ),
        *_failing(
            "data",
            facts,
            lambda f: f.shard_problem,
            "to read it",
            "mount it there",
            comparable=lambda f: f.shard,
            fault_if_all="none",
        ),
        *_failing(
            "devices", facts, no_device, "one for each process", "start fewer processes on a node"
        ),
        *_failing(
            "arithmetic",
            facts,
            lambda f: f.device_problem,
            "the right product",
            "have the node repaired",
            fault_if_all="node",
        ),
        *_minority("device", facts, lambda f: f.device, "use nodes of one kind"),
        *_device_memory(facts),
        *_clock_skew(facts, config),
    ]


def diagnose_bandwidth(
    bandwidths: Sequence[NodeBandwidth], config: PreflightConfig
) -> list[Finding]:
    """One link for each node."""
    if not bandwidths:
        return []
    usual = median_high(bandwidth.mib_per_s for bandwidth in bandwidths)
    wanted = max(usual / config.slow_node_factor, config.min_bandwidth_mib_per_s or 0.0)
    slow = [bandwidth for bandwidth in bandwidths if bandwidth.mib_per_s < wanted]
    fault: Fault = "node" if config.strict and len(slow) < len(bandwidths) else "none"
    found = [
        (bandwidth, f"{bandwidth.mib_per_s:.0f} MiB/s to its neighbours") for bandwidth in slow
    ]
    remedy = "look at its network, or at NCCL_SOCKET_IFNAME"
    return [
        Finding("network", bandwidth.host, bandwidth.ranks, text, f"{wanted:.0f}", remedy, fault)
        for bandwidth, text in found
    ]


def by_host(facts: Sequence[NodeReport]) -> dict[str, list[NodeReport]]:
    hosts: dict[str, list[NodeReport]] = {}
    for found in facts:
        hosts.setdefault(found.host, []).append(found)
    return hosts


def _failing(
    check: str,
    facts: Sequence[NodeReport],
    trouble: Callable[[NodeReport], str | None],
    wanted: str,
    remedy: str,
    *,
    comparable: Callable[[NodeReport], Hashable] = lambda found: None,
    fault_if_all: Fault = "run",
) -> list[Finding]:
    """Ranks in `trouble`: their nodes are at fault where one that tried the same (`alike`) is in
    none, else it is `of_all`.
    """
    well = {comparable(found) for found in facts if trouble(found) is None}
    findings = []
    for host, ranks in by_host(facts).items():
        troubles = [(found, text) for found in ranks if (text := trouble(found)) is not None]
        if troubles:
            fault: Fault = (
                "node" if any(comparable(found) in well for found, _ in troubles) else fault_if_all
            )
            findings.append(
                Finding(
                    check,
                    host,
                    [found.rank for found, _ in troubles],
                    troubles[0][1],
                    wanted,
                    remedy,
                    fault,
                )
            )
    return findings


def _minority(
    check: str, facts: Sequence[NodeReport], value: Callable[[NodeReport], str | None], remedy: str
) -> list[Finding]:
    """Nodes whose `value`, where they have one, is not the commonest; all of them, where none is."""
    hosts = by_host(facts)
    seen = {
        host: {text for found in ranks if (text := value(found))} for host, ranks in hosts.items()
    }
    values = {host: " and ".join(sorted(texts)) for host, texts in seen.items() if texts}
    most = max(Counter(values.values()).values(), default=0)
    usual = [found for found, nodes in Counter(values.values()).items() if nodes == most]
    fault: Fault = "node" if len(usual) == 1 else "run"
    wanted = f"{usual[0]}, as on {most} nodes" if len(usual) == 1 else "the same on all nodes"
    odd = {host: found for host, found in values.items() if [found] != usual}
    return [
        Finding(check, host, [f.rank for f in hosts[host]], found, wanted, remedy, fault)
        for host, found in odd.items()
    ]


def _device_memory(facts: Sequence[NodeReport]) -> list[Finding]:
    """Of the device with the least free memory on each node: another process may be there."""
    least = {
        host: min(free)
        for host, ranks in by_host(facts).items()
        if (
            free := [
                (found.memory_gib, found.rank) for found in ranks if found.memory_gib is not None
            ]
        )
    }
    if not least:
        return []
    wanted = MEMORY_SHARE * median_high(gib for gib, _ in least.values())
    remedy = "end what else runs on that device"
    return [
        Finding("memory", host, [rank], f"{gib:.1f} GiB free", f"{wanted:.1f}", remedy, "node")
        for host, (gib, rank) in least.items()
        if gib < wanted
    ]


def _clock_skew(facts: Sequence[NodeReport], config: PreflightConfig) -> list[Finding]:
    """By each node's first rank."""
    firsts = [ranks[0] for ranks in by_host(facts).values()]
    usual, most = median_high(found.clock_s for found in firsts), config.max_clock_skew_s
    return [
        Finding(
            "clock",
            found.host,
            [found.rank],
            f"{found.clock_s - usual:+.1f} s from the others (± {found.clock_accuracy_s:.2f})",
            f"at most {most:g}",
            "set it, by NTP",
            "node" if config.strict else "none",
        )
        for found in firsts
        if abs(found.clock_s - usual) - found.clock_accuracy_s > most
    ]
