"""Ranks that talk through a store, before there is a group or beside it: rank 0 hears all, and all
hear rank 0.
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
    """What is said is JSON, under a name that is used once."""

    def __init__(self, store: Store, world: World, host: str) -> None:
        """`host`: how this rank's node is called when the rank falls silent."""
        self.store, self.world, self.host = PrefixStore("preflight", store), world, host
        self._set(f"host/{world.rank}", host)

    def gather(self, name: str, mine: Any) -> list[Any]:
        """Communicates: on rank 0 what all ranks say, elsewhere nothing.  Raises PreflightError
        that names silent ones.
        """
        self._set(f"{name}/{self.world.rank}", mine)
        if self.world.rank:
            return []
        keys = [f"{name}/{rank}" for rank in range(self.world.world_size)]
        try:
            self.store.wait(keys, TIMEOUT)
        except DistStoreError:
            silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            hosts = {
                self._get(f"host/{rank}")
                if self.store.check([f"host/{rank}"])
                else "an unknown node"
                for rank in silent
            }
            raise PreflightError(
                f"preflight: nothing heard for {TIMEOUT} from ranks {silent} on "
                f"{', '.join(sorted(hosts))}: "
                "do they see the data and the run's folder?",
                status=1,
            ) from None
        return [self._get(key) for key in keys]

    def send(self, name: str, value: Any) -> None:
        """Rank 0's word, for whoever asks `told`; of other ranks nothing is heard."""
        if self.world.rank == 0:
            self._set(name, value)

    def recv(self, name: str) -> Any:
        """Communicates: waits for rank 0's word."""
        self.store.wait([name], 2 * TIMEOUT)
        return self._get(name)

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))
