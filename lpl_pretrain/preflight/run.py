"""The first seconds of a training: ranks compare what they have found, and begin together or not at
all.

They meet at the store by which the group will be made, before there is one: a node without its
accelerators would choose another backend than the others, and all would wait for ever.  Rank 0
judges; the network is measured on the group, afterwards.
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
from lpl_pretrain.runtime.atomic import atomic_write
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
    """Communicates: what `join(store=...)` gives, called once all nodes were found fit.

    Where one is not, every process ends here: with UNFIT on that node, with 0 on the others.
    Raises what is no node's fault.
    """
    if config.preflight is None:
        return join()
    set_up_logging(world.rank)  # to no file: there may be no folder for it
    began, store = time.monotonic(), dist.rendezvous_store(world)
    channel, facts = gather_reports(store, world, inspect_node(config, run_dir, world, data))
    publish_verdict(channel, facts, diagnose(facts, config.preflight), run_dir)
    device = join(store=store)
    bandwidths = (
        measure_bandwidth(channel, facts, device, config.preflight, run_dir)
        if world.world_size > 1
        else ""
    )
    if world.rank == 0:
        log.info("preflight: %s%s; %.1f s", summary(facts), bandwidths, time.monotonic() - began)
    return device


def report_refusal(config: TrainConfig, run_dir: RunDir, world: World, refusal: LPLError) -> None:
    """Communicates: stands in for `start` on a rank that cannot begin; returns where the others
    cannot either.
    """
    assert config.preflight is not None
    set_up_logging(world.rank)
    channel, facts = gather_reports(
        dist.rendezvous_store(world), world, inspect_node(config, run_dir, world, None, refusal)
    )
    with suppress(PreflightError):
        publish_verdict(channel, facts, diagnose(facts, config.preflight), run_dir)


def gather_reports(
    store: Store, world: World, mine: NodeReport
) -> tuple[StoreChannel, list[NodeReport]]:
    """Communicates: on rank 0 what all ranks have found, with their clocks; elsewhere nothing.

    All ranks read their clocks between two moments of rank 0's, whose distance is the accuracy of
    the comparison.
    """
    channel = StoreChannel(store, world, mine.host)
    found = channel.gather("facts", asdict(mine))
    before = time.time()
    channel.send("clock", None)
    channel.recv("clock")
    clocks = channel.gather("clocks", time.time())
    middle, accuracy = (time.time() + before) / 2, (time.time() - before) / 2
    return channel, [
        replace(NodeReport(**fact), clock_s=clock - middle, clock_accuracy_s=accuracy)
        for fact, clock in zip(found, clocks, strict=True)
    ]


def measure_bandwidth(
    channel: StoreChannel,
    facts: Sequence[NodeReport],
    device: torch.device,
    config: PreflightConfig,
    run_dir: RunDir,
) -> str:
    """Communicates: how fast the group is, and each node in it, in words."""
    nodes = by_host(facts)
    channel.send("leaders", [ranks[0].rank for ranks in nodes.values()])
    leaders = channel.recv("leaders")
    reduced, received = (
        all_reduce_mib_per_s(device),
        channel.gather("ring", ring_mib_per_s(leaders, device)),
    )
    bandwidths = []
    if len(nodes) > 1:
        for (host, ranks), leader, behind in zip(
            nodes.items(), leaders, [*leaders[1:], leaders[0]], strict=True
        ):
            bandwidths.append(
                NodeBandwidth(
                    host, [found.rank for found in ranks], max(received[leader], received[behind])
                )
            )
    publish_verdict(channel, facts, diagnose_bandwidth(bandwidths, config), run_dir, bandwidths)
    return f", all_reduce {reduced:.0f} MiB/s" + "".join(
        f", {bandwidth.host} {bandwidth.mib_per_s:.0f} MiB/s" for bandwidth in bandwidths
    )


def publish_verdict(
    channel: StoreChannel,
    facts: Sequence[NodeReport],
    findings: Sequence[Finding],
    run_dir: RunDir,
    bandwidths: Sequence[NodeBandwidth] | None = None,
) -> None:
    """Communicates: what rank 0 has decided, is written and done; returns where nothing is in the
    way of training.
    """
    name, unfit = (
        "network" if bandwidths is not None else "nodes",
        {finding.host for finding in findings if finding.fault == "node"},
    )
    able = sorted(
        (found.host in unfit, found.rank) for found in facts if found.run_dir_problem is None
    )
    if any(finding.fault == "run" for finding in findings):
        able = []  # the error says it, and the disk may be full
    report = {
        "time_s": time.time(),
        "findings": findings,
        "links": bandwidths or [],
        "ranks": facts,
    }
    channel.send(f"{name} report", json.loads(json.dumps(report, default=asdict)))
    channel.send(
        name, {"findings": list(map(asdict, findings)), "writer": able[0][1] if able else None}
    )
    verdict = channel.recv(name)
    if verdict["writer"] == channel.world.rank:
        with atomic_write(run_dir.preflight) as temporary:
            temporary.write_text(json.dumps(channel.recv(f"{name} report"), indent=1) + "\n")
    enforce(channel, [Finding(**finding) for finding in verdict["findings"]])


def enforce(channel: StoreChannel, findings: Sequence[Finding]) -> None:
    """Communicates where training cannot begin: rank 0 is the last to go, because the store goes
    with it.
    """
    unfit = {finding.host for finding in findings if finding.fault == "node"}
    general = [finding for finding in findings if finding.fault == "run"]
    file = channel.world.error_file()
    here = [
        finding
        for finding in findings
        if finding.fault == "node" and finding.host == channel.host and file is not None
    ]
    for finding in findings:
        if channel.world.rank == 0 and finding.fault != "run" and finding not in here:
            log.warning(
                "preflight: %s%s",
                finding,
                "; this node is unfit" if finding.fault == "node" else "",
            )
    if unfit or general:
        channel.gather("gone", True)
    if general:
        may_pass = all(finding.check == "disk" for finding in general)
        raise PreflightError("\n".join(map(str, general)), status=1 if may_pass else BAD_INPUT)
    if file is not None and here:  # torchrun says it
        record_error(
            "\n".join(f"preflight: {finding}; this node is unfit" for finding in here), file
        )
    if unfit:
        dist.exit(UNFIT if channel.host in unfit else 0)


def summary(facts: Sequence[NodeReport]) -> str:
    """Of nodes that are fit, in a line."""
    first, clocks = facts[0], [found.clock_s for found in facts]
    free = min(found.free_gib for found in facts if found.free_gib is not None)
    return (
        f"{len(facts)} ranks on {len(by_host(facts))} nodes, {first.device or 'cpu'}, code "
        f"{first.code[:12]}, "
        f"torch {first.versions['torch']}, {free:.1f} GiB free ({first.required_gib:.2f} wanted), "
        f"clocks within {max(clocks) - min(clocks):.3f} s (± {first.clock_accuracy_s:.3f})"
    )
