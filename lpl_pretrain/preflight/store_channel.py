"""Messages between ranks through a torch.distributed Store, before there is a process group.

Rank 0 receives from all ranks, and all ranks receive from rank 0.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store

from lpl_pretrain.errors import PreflightError
from lpl_pretrain.runtime.world import World

TIMEOUT = timedelta(minutes=5)


class StoreChannel:
    """Messages are JSON, each under a name that is used once."""

    def __init__(self, store: Store, world: World, host: str) -> None:
        """`host`: name of this rank's node, for the error of other ranks when it is silent."""
        self.store = PrefixStore("preflight", store)
        self.world = world
        self.host = host
        self._set(f"host/{world.rank}", host)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Collective.  Every rank's value on rank 0, an empty list on the others.

        Raises PreflightError that names the ranks from which nothing came.
        """
        self._set(f"{name}/{self.world.rank}", value)
        if self.world.rank:
            return []
        keys = [f"{name}/{rank}" for rank in range(self.world.world_size)]
        try:
            self.store.wait(keys, TIMEOUT)
        except DistStoreError:
            silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            hosts = sorted({self._host_of(rank) for rank in silent})
            raise PreflightError(
                f"preflight: nothing received for {TIMEOUT} from ranks {silent} on "
                f"{', '.join(hosts)}: do they see the data and the run's folder?",
                status=1,
            ) from None
        return [self._get(key) for key in keys]

    def send(self, name: str, value: Any) -> None:
        """Send rank 0's value to every rank that calls `recv`; does nothing on other ranks."""
        if self.world.rank == 0:
            self._set(name, value)

    def recv(self, name: str) -> Any:
        """Collective.  Wait for the value that rank 0 sends under this name."""
        self.store.wait([name], 2 * TIMEOUT)
        return self._get(name)

    def _host_of(self, rank: int) -> str:
        key = f"host/{rank}"
        return self._get(key) if self.store.check([key]) else "an unknown node"

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))
