"""Diagnosis of each check without a process group: six ranks on three nodes, some with a defect."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.preflight.diagnose import NodeBandwidth, diagnose, diagnose_bandwidth
from lpl_pretrain.preflight.node_report import NodeReport

NODES = ("a", "a", "b", "b", "c", "c")
REPORTS = [
    NodeReport(
        rank=rank,
        host=host,
        code="0" * 64,
        versions={"torch": "2.9"},
        free_gib=100.0,
        required_gib=40.0,
        shard=f"s{rank % 2}",
        device="H100",
        memory_gib=78.0,
    )
    for rank, host in enumerate(NODES)
]
DEFECTS = {
    "input": {"refusal": "DataError: no index"},
    "code": {"code": "f" * 64},
    "versions": {"versions": {"torch": "2.8"}},
    "run folder": {"run_dir_problem": "OSError: read-only"},
    "disk": {"free_gib": 3.0},
    "data": {"shard_problem": "FileNotFoundError: s0"},
    "devices": {"no_device": "1 for process 1"},
    "arithmetic": {"device_problem": "3 wrong numbers"},
    "device": {"device": "A100"},
    "memory": {"memory_gib": 20.0},
    "clock": {"clock_s": 9.0, "clock_accuracy_s": 0.1},
}


def with_defect(ranks, **changes):
    return [replace(report, **changes) if report.rank in ranks else report for report in REPORTS]


def findings_of(reports, **config):
    return [
        (finding.check, finding.host, finding.fault)
        for finding in diagnose(reports, PreflightConfig(**config))
    ]


def test_equal_nodes_are_fit():
    assert (
        findings_of(REPORTS) == []
        and findings_of(REPORTS[:1]) == []
        and diagnose([], PreflightConfig()) == []
    )


@pytest.mark.parametrize("check", DEFECTS)
def test_defective_node_is_at_fault(check):
    fault = "none" if check == "clock" else "node"
    assert findings_of(with_defect({2, 3}, **DEFECTS[check])) == [(check, "b", fault)]


@pytest.mark.parametrize("check", ["input", "run folder", "disk", "devices"])
def test_defect_of_all_nodes_is_the_fault_of_the_run(check):
    assert findings_of(with_defect(range(6), **DEFECTS[check])) == [
        (check, host, "run") for host in "abc"
    ]


def test_one_of_two_nodes_without_devices_is_at_fault():
    """The same for a device that does not answer, and so has no name that could differ."""
    for check, defect in (("devices", {}), ("arithmetic", {"device_problem": "RuntimeError"})):
        two = [
            report
            for report in with_defect({2, 3}, device=None, memory_gib=None, **defect)
            if report.host != "c"
        ]
        assert findings_of(two) == [(check, "b", "node")]
    assert findings_of(with_defect(range(6), device=None, memory_gib=None)) == [], (
        "on CPUs there are none"
    )


@pytest.mark.parametrize("check", ["code", "versions", "device", "memory", "clock"])
def test_property_that_all_nodes_share_is_no_difference(check):
    assert findings_of(with_defect(range(6), **DEFECTS[check])) == []


def test_broken_device_is_the_fault_of_its_node_even_on_all():
    assert findings_of(with_defect(range(6), device_problem="nan")) == [
        ("arithmetic", host, "node") for host in "abc"
    ]


@pytest.mark.parametrize("check", ["code", "versions", "device"])
def test_difference_between_two_nodes_is_the_fault_of_the_run(check):
    two = [report for report in with_defect({2, 3}, **DEFECTS[check]) if report.host != "c"]
    assert findings_of(two) == [(check, "a", "run"), (check, "b", "run")]


def test_one_defective_rank_makes_its_node_unfit():
    (finding,) = diagnose(with_defect({5}, device_problem="3 wrong numbers"), PreflightConfig())
    assert (finding.host, finding.ranks) == ("c", [5])
    assert (
        str(finding)
        == "c (rank 5): arithmetic: found 3 wrong numbers, wanted the right product: have the "
        "node repaired"
    )


def test_shard_that_no_rank_can_read_is_no_fault_of_a_node():
    """Every second rank reads `s1`: where one of them can, the nodes of the others are at fault."""
    assert findings_of(with_defect({1, 3, 5}, shard_problem="gone")) == [
        ("data", host, "none") for host in "abc"
    ]
    assert findings_of(with_defect({1, 5}, shard_problem="gone")) == [
        ("data", "a", "node"),
        ("data", "c", "node"),
    ]


def test_clock_is_compared_with_the_median_not_with_rank_0():
    """The clock of ranks 0 and 1 is late, so all other clocks are early relative to rank 0."""
    wrong = with_defect({2, 3, 4, 5}, clock_s=60.0)
    assert findings_of(wrong) == [("clock", "a", "none")] and findings_of(wrong, strict=True) == [
        ("clock", "a", "node")
    ]
    assert findings_of(with_defect({2, 3}, clock_s=5.5, clock_accuracy_s=1.0)) == [], (
        "as accurate as the comparison was"
    )
    assert findings_of(wrong, max_clock_skew_s=100.0) == []


def test_min_free_gib_replaces_the_size_of_the_checkpoints():
    assert findings_of(REPORTS, min_free_gib=200.0) == [("disk", host, "run") for host in "abc"]
    assert findings_of(with_defect({2, 3}, free_gib=3.0), min_free_gib=0.0) == []


def bandwidths(**speeds):
    return [NodeBandwidth(host, [rank], speed) for rank, (host, speed) in enumerate(speeds.items())]


@pytest.mark.parametrize(
    ("speeds", "config", "slow"),
    [
        ({"a": 1000.0, "b": 200.0, "c": 900.0}, {}, [("b", "none")]),
        ({"a": 1000.0, "b": 200.0, "c": 900.0}, {"strict": True}, [("b", "node")]),
        ({"a": 1000.0, "b": 300.0, "c": 900.0}, {}, []),
        ({"a": 1000.0, "b": 300.0, "c": 900.0}, {"slow_node_factor": 2.0}, [("b", "none")]),
        (
            {"a": 1000.0, "b": 300.0},
            {"min_bandwidth_mib_per_s": 500.0, "strict": True},
            [("b", "node")],
        ),
        (
            {"a": 90.0, "b": 80.0},
            {"min_bandwidth_mib_per_s": 500.0, "strict": True},
            [("a", "none"), ("b", "none")],
        ),
    ],
)
def test_slow_nodes_are_found(speeds, config, slow):
    """The last case: where all nodes are slow, none is at fault and training begins."""
    assert [
        (finding.host, finding.fault)
        for finding in diagnose_bandwidth(bandwidths(**speeds), PreflightConfig(**config))
    ] == slow
    assert diagnose_bandwidth([], PreflightConfig(**config)) == []


def test_defects_are_found_by_comparison():
    """A defective node by itself has nothing to differ from; only its broken device is found."""
    for check, defect in DEFECTS.items():
        alone = [report for report in with_defect({2, 3}, **defect) if report.host == "b"]
        assert ("node" in {fault for _, _, fault in findings_of(alone)}) == (
            check == "arithmetic"
        ), check
