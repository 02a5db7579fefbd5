"""Preflight, the first seconds of a training: ranks compare their nodes, and begin together or not
at all.

They exchange reports through the store that the process group will use, before there is a group: a
node without its GPUs would choose another backend than the others, and all would wait forever.
Rank 0 diagnoses.  The bandwidth is measured on the group, afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from torch.distributed import Store

from lpl_pretrain.config.data_mixture import DataFolders
from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.config.rundir import RunDir
from lpl_pretrain.config.schema import TrainConfig
from lpl_pretrain.errors import BAD_INPUT, UNFIT, LPLError, PreflightError
from lpl_pretrain.preflight.bandwidth import all_reduce_mib_per_s, ring_mib_per_s
from lpl_pretrain.preflight.diagnose import (
    Finding,
    NodeBandwidth,
    by_host,
    diagnose,
    diagnose_bandwidth,
)
from lpl_pretrain.preflight.node_report import NodeReport, inspect_node
from lpl_pretrain.preflight.store_channel import StoreChannel
from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.atomic import atomic_write_json
from lpl_pretrain.runtime.log import log, set_up_logging
from lpl_pretrain.runtime.torchrun import record_error
from lpl_pretrain.runtime.world import World


def run_preflight(
    config: TrainConfig,
    run_dir: RunDir,
    world: World,
    data: DataFolders,
    join: Callable[..., torch.device],
) -> torch.device:
    """Collective.  Check all nodes, then return `join(store=...)`, which makes the process group.

    Where a node is unfit, every process ends here: with UNFIT on that node, with 0 on the others.
    Raises PreflightError for what is no node's fault.
    """
    if config.preflight is None:
        return join()
    set_up_logging(world.rank)  # to no file: the run's folder may not exist
    began_s = time.monotonic()
    store = dist.rendezvous_store(world)
    channel, reports = gather_reports(store, world, inspect_node(config, run_dir, world, data))
    publish_verdict(channel, reports, diagnose(reports, config.preflight), run_dir)
    device = join(store=store)
    network = ""
    if world.world_size > 1:
        network = measure_bandwidth(channel, reports, device, config.preflight, run_dir)
    if world.rank == 0:
        seconds = time.monotonic() - began_s
        log.info("preflight: %s%s; %.1f s", summary(reports), network, seconds)
    return device


def report_refusal(config: TrainConfig, run_dir: RunDir, world: World, refusal: LPLError) -> None:
    """Collective.  Called instead of `run_preflight` by a rank that refuses its input.

    Returns where all other ranks refuse it too.
    """
    assert config.preflight is not None
    set_up_logging(world.rank)
    report = inspect_node(config, run_dir, world, None, refusal)
    channel, reports = gather_reports(dist.rendezvous_store(world), world, report)
    with suppress(PreflightError):
        publish_verdict(channel, reports, diagnose(reports, config.preflight), run_dir)


def gather_reports(
    store: Store, world: World, report: NodeReport
) -> tuple[StoreChannel, list[NodeReport]]:
    """Collective.  All ranks' reports with their clocks on rank 0, none on the others.

    All ranks read their clocks between two readings of rank 0's; half the distance of these two is
    the accuracy of the comparison.
    """
    channel = StoreChannel(store, world, report.host)
    gathered = channel.gather("reports", asdict(report))
    before_s = time.time()
    channel.send("clock", None)
    channel.recv("clock")
    clocks_s = channel.gather("clocks", time.time())
    after_s = time.time()
    middle_s = (after_s + before_s) / 2
    accuracy_s = (after_s - before_s) / 2
    return channel, [
        replace(NodeReport(**fields), clock_s=clock_s - middle_s, clock_accuracy_s=accuracy_s)
        for fields, clock_s in zip(gathered, clocks_s, strict=True)
    ]


def measure_bandwidth(
    channel: StoreChannel,
    reports: Sequence[NodeReport],
    device: torch.device,
    config: PreflightConfig,
    run_dir: RunDir,
) -> str:
    """Collective.  Text with the bandwidth of the group and of each node."""
    nodes = by_host(reports)
    channel.send("leaders", [ranks[0].rank for ranks in nodes.values()])
    leaders = channel.recv("leaders")
    all_reduce = all_reduce_mib_per_s(device)
    received = channel.gather("ring", ring_mib_per_s(leaders, device))
    bandwidths = []
    if len(nodes) > 1:
        next_leaders = [*leaders[1:], leaders[0]]
        for (host, ranks), leader, after in zip(nodes.items(), leaders, next_leaders, strict=True):
            # what a leader receives it receives from the one before it, so `after` shows its sends
            fastest = max(received[leader], received[after])
            bandwidths.append(NodeBandwidth(host, [report.rank for report in ranks], fastest))
    publish_verdict(channel, reports, diagnose_bandwidth(bandwidths, config), run_dir, bandwidths)
    per_node = "".join(f", {node.host} {node.mib_per_s:.0f} MiB/s" for node in bandwidths)
    return f", all_reduce {all_reduce:.0f} MiB/s{per_node}"


def publish_verdict(
    channel: StoreChannel,
    reports: Sequence[NodeReport],
    findings: Sequence[Finding],
    run_dir: RunDir,
    bandwidths: Sequence[NodeBandwidth] | None = None,
) -> None:
    """Collective.  Send rank 0's findings to all ranks, write preflight.json, and enforce them.

    Returns where training can begin.
    """
    name = "nodes" if bandwidths is None else "network"
    unfit = {finding.host for finding in findings if finding.fault == "node"}
    writers = sorted(
        (report.host in unfit, report.rank) for report in reports if report.run_dir_problem is None
    )
    if any(finding.fault == "run" for finding in findings):
        writers = []  # the error says it, and the disk may be full
    document = {
        "time_s": time.time(),
        "findings": findings,
        "links": bandwidths or [],
        "ranks": reports,
    }
    channel.send(f"{name} report", json.loads(json.dumps(document, default=asdict)))
    writer = writers[0][1] if writers else None
    channel.send(name, {"findings": list(map(asdict, findings)), "writer": writer})
    verdict = channel.recv(name)
    if verdict["writer"] == channel.world.rank:
        atomic_write_json(run_dir.preflight, channel.recv(f"{name} report"), indent=1)
    enforce(channel, [Finding(**finding) for finding in verdict["findings"]])


def enforce(channel: StoreChannel, findings: Sequence[Finding]) -> None:
    """Collective where training cannot begin.  Log the findings and end processes accordingly.

    Rank 0 ends last, because the store ends with it.
    """
    unfit = {finding.host for finding in findings if finding.fault == "node"}
    of_run = [finding for finding in findings if finding.fault == "run"]
    error_file = channel.world.error_file()
    for_torchrun = []  # torchrun prints these
    if error_file is not None:
        for_torchrun = [
            finding
            for finding in findings
            if finding.fault == "node" and finding.host == channel.host
        ]
    for finding in findings:
        if channel.world.rank == 0 and finding.fault != "run" and finding not in for_torchrun:
            consequence = "; this node is unfit" if finding.fault == "node" else ""
            log.warning("preflight: %s%s", finding, consequence)
    if unfit or of_run:
        channel.gather("ended", True)
    if of_run:
        retry = all(finding.check == "disk" for finding in of_run)
        raise PreflightError("\n".join(map(str, of_run)), status=1 if retry else BAD_INPUT)
    if error_file is not None and for_torchrun:
        lines = [f"preflight: {finding}; this node is unfit" for finding in for_torchrun]
        record_error("\n".join(lines), error_file)
    if unfit:
        dist.exit(UNFIT if channel.host in unfit else 0)


def summary(reports: Sequence[NodeReport]) -> str:
    """One line about nodes that are fit."""
    first = reports[0]
    clocks_s = [report.clock_s for report in reports]
    free_gib = min(report.free_gib for report in reports if report.free_gib is not None)
    return (
        f"{len(reports)} ranks on {len(by_host(reports))} nodes, {first.device or 'cpu'}, code "
        f"{first.code[:12]}, torch {first.versions['torch']}, {free_gib:.1f} GiB free "
        f"({first.required_gib:.2f} wanted), clocks within {max(clocks_s) - min(clocks_s):.3f} s "
        f"(± {first.clock_accuracy_s:.3f})"
    )
