"""Beside step 14: torch's own Muon, and AdamW for what is no matrix, as one optimizer.

The Trainer knows one optimizer, and torch's Muon refuses what is no matrix. It computes the
orthogonal matrix in bfloat16, whatever the model is in: two or three digits of an update, which is
enough to learn by.

Twin: minigpt/muon.py.  Proof: tests/test_muon.py.
"""

from collections.abc import Sequence
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """torch's Muon for the first of two groups, which holds matrices, and AdamW for the second."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        **adamw: Any,
    ):
        matrices, others = groups
        self.parts = (
            torch.optim.Muon([matrices], lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([others], lr, **adamw),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> Any:
        """One update by each of the two."""
        muon, adamw = self.parts
        loss = muon.step(closure)
        adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the library's; the two go on with what was loaded."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The rates that a schedule sets here, and the moments that are saved, are the parts'."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
