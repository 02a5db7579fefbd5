"""Loss scaling for fp16: lifts gradients that float16 would round to zero.

As in arXiv 1710.03740, section 3.2, with the constants of `torch.amp.GradScaler`.  The scale is
divided out again in float32, before clipping.  It is kept on the host, where the gradient norm is
read anyway, and is the same on every rank.  Without fp16 it is 1 and stays so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
GROWTH_INTERVAL_STEPS = 2000


@dataclass
class LossScale:
    value: float = 1.0
    dynamic: bool = False
    good_updates: int = 0
    """Updates with a finite gradient since the scale last changed."""

    @classmethod
    def fp16(cls) -> LossScale:
        return cls(INITIAL_SCALE, dynamic=True)

    def update(self, *, finite: bool) -> bool:
        """Adapts the scale to whether the gradient of an update was `finite`; call after each one.

        Returns whether the scale was lowered.
        """
        if not self.dynamic:
            return False
        if not finite:
            previous = self.value
            self.value = max(MIN_SCALE, previous / 2)
            self.good_updates = 0
            return self.value < previous
        self.good_updates += 1
        if self.good_updates == GROWTH_INTERVAL_STEPS:
            self.value *= 2
            self.good_updates = 0
        return False

    def state(self) -> dict[str, float]:
        return asdict(self)

    def load_state(self, state: dict[str, float]) -> None:
        """Restores the scale of a run in fp16; a run in another precision keeps its own."""
        if self.dynamic and state["dynamic"]:
            self.value = state["value"]
            self.good_updates = int(state["good_updates"])
