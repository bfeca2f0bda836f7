"""Step 8 through transformers: its LogitsProcessors, in the order in which generate calls them.

    RepetitionPenalty -> Temperature -> TopK -> TopP -> MinP -> softmax -> multinomial

generate takes top_p = 1.5 for "off" and refuses a temperature of 0 or of int 2; here both are
errors or both are numbers. It draws from the global generator only, and of scores that are NaN the
likeliest word is token 0.

Before: weights.py.  After: generate.py.  Twin: minigpt/sampler.py.  Proof: tests/test_sampler.py.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampler:
    """How to draw; each option is off at its default. Raises ValueError for one out of range."""

    temperature: float = 1.0
    top_k: int = 0
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

    def _warpers(self) -> LogitsProcessorList:
        """Every processor after the penalty; at temperature 0 only the check."""
        chosen = LogitsProcessorList()
        if self.temperature not in (0, 1):
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.temperature and self.top_p < 1:
            chosen.append(TopPLogitsWarper(float(self.top_p)))
        if self.temperature and self.min_p:
            chosen.append(MinPLogitsWarper(float(self.min_p)))
        chosen.append(_Finite())
        return chosen

    def process(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The logits after every step before the draw: (B, V) -> (B, V) float32."""
        logits = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            everything = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
            penalty = RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))
            logits = torch.where(seen, penalty(everything, logits), logits)
        return self._warpers()(None, logits)

    def sample(
        self,
        logits: Tensor,
        seen: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw one id per row: (B, V) -> (B,). FloatingPointError for scores that allow no draw."""
        scores = self.process(logits, seen)
        if self.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)


class _Finite(LogitsProcessor):
    """Raise FloatingPointError where softmax and argmax would make something up."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise FloatingPointError(
                "the scores are not finite: the model's weights hold NaN or infinity, "
                "their dtype overflows (load it in float32), "
                "or the temperature is too near 0 (0 takes the most likely word)"
            )
        return scores
