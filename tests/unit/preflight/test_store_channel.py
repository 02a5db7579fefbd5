"""Messages between ranks through a store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lpl_pretrain.errors import PreflightError
from lpl_pretrain.preflight import store_channel
from lpl_pretrain.preflight.store_channel import StoreChannel
from lpl_pretrain.runtime.world import World


def test_silent_ranks_are_named_with_their_nodes(monkeypatch):
    monkeypatch.setattr(store_channel, "TIMEOUT", timedelta(seconds=0.2))
    store = HashStore()
    ranks = [StoreChannel(store, World(rank, 0, 4), f"node{rank}") for rank in range(3)]
    assert ranks[1].gather("reports", 1) == []
    with pytest.raises(
        PreflightError, match=r"from ranks \[2, 3\] on an unknown node, node2: "
    ) as raised:
        ranks[0].gather("reports", 0)
    assert raised.value.status == 1, "a retry of the job may succeed"
    ranks[2].gather("more", 2)
    ranks[1].gather("more", 1)
    StoreChannel(store, World(3, 0, 4), "node3").gather("more", {"x": None})
    assert ranks[0].gather("more", 0) == [0, 1, 2, {"x": None}]
