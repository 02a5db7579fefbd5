"""Which node is at fault, check by check, without a process group: six ranks on three nodes, and
what is changed on some.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lpl_pretrain.config.preflight import PreflightConfig
from lpl_pretrain.preflight.diagnose import NodeBandwidth, diagnose, diagnose_bandwidth
from lpl_pretrain.preflight.node_report import NodeReport

NODES = ("a", "a", "b", "b", "c", "c")
FACTS = [
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
TROUBLES = {
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


def changed(ranks, **changes):
    return [replace(found, **changes) if found.rank in ranks else found for found in FACTS]


def found_in(facts, **config):
    return [
        (finding.check, finding.host, finding.fault)
        for finding in diagnose(facts, PreflightConfig(**config))
    ]


def test_nodes_that_are_alike_are_fit():
    assert (
        found_in(FACTS) == []
        and found_in(FACTS[:1]) == []
        and diagnose([], PreflightConfig()) == []
    )


@pytest.mark.parametrize("check", TROUBLES)
def test_a_node_at_fault_is_named(check):
    fault = "none" if check == "clock" else "node"
    assert found_in(changed({2, 3}, **TROUBLES[check])) == [(check, "b", fault)]


@pytest.mark.parametrize("check", ["input", "run folder", "disk", "devices"])
def test_what_no_node_can_do_is_the_runs_fault(check):
    assert found_in(changed(range(6), **TROUBLES[check])) == [
        (check, host, "run") for host in "abc"
    ]


def test_two_nodes_are_enough_where_one_has_no_accelerators():
    """Or one that does not answer: nothing is said about its name then."""
    for check, trouble in (("devices", {}), ("arithmetic", {"device_problem": "RuntimeError"})):
        two = [
            found
            for found in changed({2, 3}, device=None, memory_gib=None, **trouble)
            if found.host != "c"
        ]
        assert found_in(two) == [(check, "b", "node")]
    assert found_in(changed(range(6), device=None, memory_gib=None)) == [], "on CPUs there are none"


@pytest.mark.parametrize("check", ["code", "versions", "device", "memory", "clock"])
def test_nothing_is_odd_where_all_have_it(check):
    assert found_in(changed(range(6), **TROUBLES[check])) == []


def test_a_broken_device_is_its_nodes_fault_even_on_all():
    assert found_in(changed(range(6), device_problem="nan")) == [
        ("arithmetic", host, "node") for host in "abc"
    ]


@pytest.mark.parametrize("check", ["code", "versions", "device"])
def test_of_two_nodes_that_differ_neither_is_at_fault(check):
    two = [found for found in changed({2, 3}, **TROUBLES[check]) if found.host != "c"]
    assert found_in(two) == [(check, "a", "run"), (check, "b", "run")]


def test_one_rank_makes_its_node_unfit():
    (finding,) = diagnose(changed({5}, device_problem="3 wrong numbers"), PreflightConfig())
    assert (finding.host, finding.ranks) == ("c", [5])
    assert (
        str(finding)
        == "c (rank 5): arithmetic: found 3 wrong numbers, wanted the right product: have the "
        "node repaired"
    )


def test_a_shard_that_nobody_can_read_is_no_nodes_fault():
    """The second process of every node reads `s1`; where one of them can, the others' nodes are at
    fault.
    """
    assert found_in(changed({1, 3, 5}, shard_problem="gone")) == [
        ("data", host, "none") for host in "abc"
    ]
    assert found_in(changed({1, 5}, shard_problem="gone")) == [
        ("data", "a", "node"),
        ("data", "c", "node"),
    ]


def test_a_clock_is_wrong_against_the_median_not_against_rank_0():
    """Ranks 0 and 1 are those whose clock is late: the others seem early."""
    wrong = changed({2, 3, 4, 5}, clock_s=60.0)
    assert found_in(wrong) == [("clock", "a", "none")] and found_in(wrong, strict=True) == [
        ("clock", "a", "node")
    ]
    assert found_in(changed({2, 3}, clock_s=5.5, clock_accuracy_s=1.0)) == [], (
        "as accurate as the comparison was"
    )
    assert found_in(wrong, max_clock_skew_s=100.0) == []


def test_room_that_is_asked_for_goes_before_what_is_derived():
    assert found_in(FACTS, min_free_gib=200.0) == [("disk", host, "run") for host in "abc"]
    assert found_in(changed({2, 3}, free_gib=3.0), min_free_gib=0.0) == []


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
def test_slow_nodes(speeds, config, slow):
    """All of them slow: no node's fault, and no reason to stop."""
    assert [
        (found.host, found.fault)
        for found in diagnose_bandwidth(bandwidths(**speeds), PreflightConfig(**config))
    ] == slow
    assert diagnose_bandwidth([], PreflightConfig(**config)) == []


def test_has_teeth():
    """What the tests above rest on: facts of other nodes count, and every trouble is one."""
    for check, trouble in TROUBLES.items():
        alone = [found for found in changed({2, 3}, **trouble) if found.host == "b"]
        assert ("node" in {fault for _, _, fault in found_in(alone)}) == (check == "arithmetic"), (
            check
        )
