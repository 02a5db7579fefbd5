"""The scale of fp16 losses: lifts gradients that float16 would round to zero; it is taken out again
in float32, before clipping.

As in arXiv 1710.03740, section 3.2, with the constants of `torch.amp.GradScaler`.  It lives on the
host, where the gradient norm is read anyway, and is the same on every rank.  Without fp16 it is 1
and stays so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

FIRST, SMALLEST, GROWTH_EVERY_UPDATES = 2.0**16, 1.0, 2000


@dataclass
class LossScale:
    value: float = 1.0
    dynamic: bool = False
    good_updates: int = 0
    """Since the scale was changed."""

    @classmethod
    def fp16(cls) -> LossScale:
        return cls(FIRST, dynamic=True)

    def update(self, *, finite: bool) -> bool:
        """After an update was applied, or refused because its gradient was not finite; True when
        the scale was lowered.
        """
        if not self.dynamic:
            return False
        if not finite:
            self.value, self.good_updates, before = max(SMALLEST, self.value / 2), 0, self.value
            return self.value < before
        self.good_updates += 1
        if self.good_updates == GROWTH_EVERY_UPDATES:
            self.value, self.good_updates = self.value * 2, 0
        return False

    def state(self) -> dict[str, float]:
        return asdict(self)

    def load_state(self, state: dict[str, float]) -> None:
        """Of a run in the same precision; another precision keeps its own scale."""
        if self.dynamic and state["dynamic"]:
            self.value, self.good_updates = state["value"], int(state["good_updates"])
