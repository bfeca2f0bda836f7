"""Beside step 14: Muon, an update that turns a matrix alike in all directions.

    m   = moving mean of the gradient g                        (momentum)
    u   = (1 - momentum) * g + momentum * m                    (Nesterov: a look ahead)
    U S V^T = u;   O = U V^T                                   (every singular value becomes 1)
    w  -= rate * (0.2 * sqrt(max(rows, columns)) * O + weight_decay * w)

The gradient of a matrix has a few large singular values and many small ones: other updates follow
the few, and what is rare in the data waits. The factor gives this one the size of AdamW's, so that
one rate suits both (Liu et al. 2025, section 2.2); the method is that of Jordan et al. 2024.
Embeddings, norms and biases map no space into another: AdamW learns those.

Twin: hf_bridge/muon.py.  Proof: tests/test_muon.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Repeated, x -> a*x + b*x^3 + c*x^5 takes every x in (0, 1] to about 1. With these the small ones
# grow fastest, and in return end anywhere between 0.7 and 1.2, which is near enough.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Muon(torch.optim.AdamW):
    """Muon for the first of two groups, which holds matrices, and AdamW for the second.

    Raises ValueError if the first holds something else.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, momentum: float = 0.95, **adamw: Any):
        matrices, _ = groups
        for p in matrices["params"]:
            if p.dim() != 2:
                raise ValueError(f"Muon turns matrices, got a parameter of {tuple(p.shape)}")
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the gradients of the matrices are gone after it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, _ = self.param_groups
        for p in matrices["params"]:
            if p.grad is not None:
                self._turn(p, p.grad, matrices["lr"], matrices["weight_decay"])
                p.grad = None  # nothing is left for AdamW
        super().step()
        return loss

    def _turn(self, p: Tensor, grad: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state["mean"] = torch.zeros_like(p)
        mean = state["mean"].lerp_(grad, 1 - self.momentum)
        ahead = grad.lerp(mean, self.momentum)
        p.mul_(1 - rate * weight_decay)
        p.sub_(orthogonalize(ahead), alpha=rate * 0.2 * math.sqrt(max(p.shape)))


def orthogonalize(matrix: Tensor) -> Tensor:
    """(R, C) = U S V^T -> about U V^T, without the decomposition (Newton and Schulz).

    a*X + b*(X X^T) X + c*(X X^T)^2 X has the singular vectors of X, and a*s + b*s^3 + c*s^5 for
    each of its singular values s.

    >>> orthogonalize(torch.diag(torch.tensor([3.0, 0.2]))).diag().round(decimals=1)
    tensor([0.7000, 1.1000])
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1 now
    for _ in range(ROUNDS):
        square = x @ x.mT  # (R, R), of the shorter side
        x = torch.addmm(x, torch.addmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
