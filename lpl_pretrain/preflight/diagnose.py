"""Diagnosis of the nodes from the reports of their ranks: no clock, no file, no process group.

A node is at fault where it differs from most others, or fails where another one succeeds.  What
fails on all nodes, and a difference without a majority, is the fault of the run.  Data that no rank
can read are left to `data.on_error`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Literal

from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.preflight.node_report import NodeReport

MEMORY_FRACTION = 0.9
"""A node with less than this fraction of the median free device memory is at fault."""

Fault = Literal["node", "run", "none"]
Check = Callable[[NodeReport], str | None]
"""Problem, or value, that a report holds for one check; None where there is none."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    host: str
    ranks: list[int]
    found: str
    wanted: str
    remedy: str
    fault: Fault
    """`node`: it is unfit; `run`: training can begin nowhere; `none`: only a warning."""

    def __str__(self) -> str:
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        return (
            f"{self.host} ({ranks}): {self.check}: found {self.found}, wanted {self.wanted}: "
            f"{self.remedy}"
        )


@dataclass(frozen=True, slots=True)
class NodeBandwidth:
    """Bandwidth of a node: the faster of sending and receiving, for the peer may be a slow one."""

    host: str
    ranks: list[int]
    mib_per_s: float


def diagnose(reports: Sequence[NodeReport], config: PreflightConfig) -> list[Finding]:
    """Findings from one report for each rank; none from no reports, as on ranks other than 0."""
    if not reports:
        return []
    return [
        *_failing(
            "input",
            reports,
            lambda report: report.refusal,
            "what other nodes accept",
            "see what this node has mounted",
        ),
        *_minority(
            "code",
            reports,
            lambda report: report.code[:12],
            "let all nodes see one copy of this package",
        ),
        *_minority("versions", reports, _versions, "install the same on all nodes"),
        *_failing(
            "run folder",
            reports,
            lambda report: report.run_dir_problem,
            "to write in it",
            "mount it there, or set run_dir",
        ),
        *_failing(
            "run",
            reports,
            lambda report: report.in_use,
            "a run that no other process trains",
            "wait for its end",
            comparable=lambda report: report.rank,
        ),
        *_disk(reports, config),
        *_failing(
            "data",
            reports,
            lambda report: report.shard_problem,
            "to read it",
            "mount it there",
            comparable=lambda report: report.shard,
            fault_if_all="none",
        ),
        *_devices(reports),
        *_device_memory(reports),
        *_clock_skew(reports, config),
    ]


def diagnose_bandwidth(
    bandwidths: Sequence[NodeBandwidth], config: PreflightConfig
) -> list[Finding]:
    """Findings about slow nodes, from one bandwidth for each node."""
    if not bandwidths:
        return []
    usual = median_high(node.mib_per_s for node in bandwidths)
    wanted = max(usual / config.slow_node_factor, config.min_bandwidth_mib_per_s or 0.0)
    slow = [node for node in bandwidths if node.mib_per_s < wanted]
    fault: Fault = "node" if config.strict and len(slow) < len(bandwidths) else "none"
    return [
        Finding(
            "network",
            node.host,
            node.ranks,
            f"{node.mib_per_s:.0f} MiB/s to its neighbours",
            f"{wanted:.0f}",
            "look at its network, or at NCCL_SOCKET_IFNAME",
            fault,
        )
        for node in slow
    ]


def by_host(reports: Sequence[NodeReport]) -> dict[str, list[NodeReport]]:
    hosts: dict[str, list[NodeReport]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report)
    return hosts


def _failing(
    check: str,
    reports: Sequence[NodeReport],
    problem: Check,
    wanted: str,
    remedy: str,
    *,
    comparable: Callable[[NodeReport], Hashable] = lambda report: None,
    fault_if_all: Fault = "run",
) -> list[Finding]:
    """Findings about nodes with a rank that has a problem.

    The node is at fault where a rank with the same `comparable` value has none; otherwise the fault
    is `fault_if_all`.
    """
    succeeded = {comparable(report) for report in reports if problem(report) is None}
    findings = []
    for host, ranks in by_host(reports).items():
        failed = [(report, text) for report in ranks if (text := problem(report)) is not None]
        if not failed:
            continue
        others_succeed = any(comparable(report) in succeeded for report, _ in failed)
        findings.append(
            Finding(
                check,
                host,
                [report.rank for report, _ in failed],
                failed[0][1],
                wanted,
                remedy,
                "node" if others_succeed else fault_if_all,
            )
        )
    return findings


def _minority(
    check: str, reports: Sequence[NodeReport], value: Check, remedy: str
) -> list[Finding]:
    """Findings about nodes whose `value` is not the most common one; about all nodes where several
    values are equally common.  Nodes without a value are not compared.
    """
    hosts = by_host(reports)
    values = {}
    for host, ranks in hosts.items():
        texts = {text for report in ranks if (text := value(report))}
        if texts:
            values[host] = " and ".join(sorted(texts))
    counts = Counter(values.values())
    most = max(counts.values(), default=0)
    usual = [text for text, nodes in counts.items() if nodes == most]
    fault: Fault = "node" if len(usual) == 1 else "run"
    wanted = f"{usual[0]}, as on {most} nodes" if len(usual) == 1 else "the same on all nodes"
    return [
        Finding(check, host, [report.rank for report in hosts[host]], text, wanted, remedy, fault)
        for host, text in values.items()
        if [text] != usual
    ]


def _versions(report: NodeReport) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _disk(reports: Sequence[NodeReport], config: PreflightConfig) -> list[Finding]:
    """Findings about too little free space for checkpoints."""

    def problem(report: NodeReport) -> str | None:
        required = report.required_gib if config.min_free_gib is None else config.min_free_gib
        if report.free_gib is None or report.free_gib >= required:
            return None
        return f"{report.free_gib:.2f} GiB free where checkpoints need {required:.2f}"

    remedy = "free some space, keep fewer checkpoints, or set preflight.min_free_gib"
    return _failing("disk", reports, problem, "that much", remedy)


def _devices(reports: Sequence[NodeReport]) -> list[Finding]:
    """Findings about missing, broken and unequal devices."""
    any_device = any(report.device for report in reports)

    def missing(report: NodeReport) -> str | None:
        if report.no_device:
            return report.no_device
        absent = report.device is None and report.device_problem is None and any_device
        return "none" if absent else None

    return [
        *_failing(
            "devices",
            reports,
            missing,
            "one for each process",
            "start fewer processes on a node",
        ),
        *_failing(
            "arithmetic",
            reports,
            lambda report: report.device_problem,
            "the right product",
            "have the node repaired",
            fault_if_all="node",
        ),
        *_minority("device", reports, lambda report: report.device, "use nodes of one kind"),
    ]


def _device_memory(reports: Sequence[NodeReport]) -> list[Finding]:
    """Findings about devices whose memory another process may use: of each node, the device with
    the least free memory counts.
    """
    least = {}
    for host, ranks in by_host(reports).items():
        free = [(report.memory_gib, report.rank) for report in ranks]
        known = [(gib, rank) for gib, rank in free if gib is not None]
        if known:
            least[host] = min(known)
    if not least:
        return []
    wanted = MEMORY_FRACTION * median_high(gib for gib, _ in least.values())
    remedy = "end what else runs on that device"
    return [
        Finding("memory", host, [rank], f"{gib:.1f} GiB free", f"{wanted:.1f}", remedy, "node")
        for host, (gib, rank) in least.items()
        if gib < wanted
    ]


def _clock_skew(reports: Sequence[NodeReport], config: PreflightConfig) -> list[Finding]:
    """Findings about clocks far from the median; the first rank of each node counts."""
    firsts = [ranks[0] for ranks in by_host(reports).values()]
    usual = median_high(report.clock_s for report in firsts)
    most = config.max_clock_skew_s
    return [
        Finding(
            "clock",
            report.host,
            [report.rank],
            f"{report.clock_s - usual:+.1f} s from the others (± {report.clock_accuracy_s:.2f})",
            f"at most {most:g}",
            "set it, by NTP",
            "node" if config.strict else "none",
        )
        for report in firsts
        if abs(report.clock_s - usual) - report.clock_accuracy_s > most
    ]
