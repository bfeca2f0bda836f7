"""Step 8: choose the next token.  (B, V) logits -> (B,) ids.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> softmax -> draw

The order is that of transformers; another order is another distribution.

Before: weights.py.  After: generate.py.  Twin: hf_bridge/sampler.py.  Proof: tests/test_sampler.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Make the tokens already seen less likely: positive logits divided, negative ones multiplied.

    `seen` is (B, V) boolean. Keskar et al. 2019, section 4.1, in the form that works for both
    signs.

    >>> penalize(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]]), 2.0)
    tensor([[ 1., -4.,  1.]])
    """
    penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the k most likely words (and any that tie with the last); the rest become -inf.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    tensor([[-inf, 3., 2.]])
    """
    least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of words whose probabilities reach top_p (Holtzman et al. 2020).

    The word that crosses top_p is kept. The sum runs upwards from the unlikely end, as in
    transformers: the other direction rounds differently and breaks ties the other way.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).softmax(-1)
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False  # the likeliest word stays, whatever top_p
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the words at least min_p times as likely as the likeliest one (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.5).softmax(-1)
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)


@dataclass(frozen=True)
class Sampler:
    """How to draw; each option is off at its default. Raises ValueError for one outside its range.

    >>> Sampler(temperature=0).sample(torch.tensor([[0.0, 9.0]]))
    tensor([1])
    >>> Sampler(top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p must be in (0, 1], got 1.5
    """

    temperature: float = 1.0  # 0: always the most likely word
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number of 0 or more, got {self.temperature}")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k must be a whole number of 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty}"
            )

    def process(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits after every step before the draw: (B, V) -> (B, V) float32.

        `seen` (B, V) marks the tokens that the penalty is for. Temperature 0 stops after the
        penalty, since only the maximum matters then.
        """
        logits = logits.float()  # as transformers does, whatever the model computes in
        if self.repetition_penalty != 1 and seen is not None:
            logits = penalize(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return logits
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:  # at 1 rounding could drop a word
            logits = keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = keep_min_p(logits, self.min_p)
        return logits

    def sample(
        self,
        logits: Tensor,
        seen: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one id per row: (B, V) -> (B,). FloatingPointError for scores that allow no draw."""
        scores = self.process(logits, seen)
        if not scores.amax(-1).isfinite().all():  # argmax would give token 0 for NaN, for ever
            raise FloatingPointError(
                "the scores are not finite: the model's weights hold NaN or infinity, "
                "their dtype overflows (load it in float32), "
                "or the temperature is too near 0 (0 takes the most likely word)"
            )
        if self.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)
