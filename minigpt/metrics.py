"""Step 15: how good a model is, in numbers.

    perplexity    exp of the mean of -log p(token)           how many words it hesitates between
    distinct-n    different n-grams / n-grams                 does it repeat itself (Li et al. 2016)
    KL, top-1     sum of p log(p / q), same first choice      is one model still the other
    P, R, F1      of a class: found that are right, right that are found, their harmonic mean
    ROUGE-L       the same, of a longest common subsequence   is a text like another (Lin 2004)

Before: train.py.  After: trace.py.  Twin: hf_bridge/metrics.py.  Proof: tests/test_metrics.py.
"""

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.batches import IGNORED
from minigpt.model import GPT
from minigpt.optimize import count_tokens, summed_loss

WORDS = re.compile(r"[^\W_]+")


class Scores(NamedTuple):
    """Precision, recall and their harmonic mean, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


@torch.inference_mode()
def evaluate(model: GPT, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Loss and perplexity over batches, every token weighing the same, whatever its batch.

    Raises ValueError if no token counts, FloatingPointError if a loss is no number.
    """
    losses, tokens = 0.0, 0
    for i, batch in enumerate(batches):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        loss = summed_loss(model, batch).item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of batch {i} is {loss}: the weights have grown too large, "
                "train again with a lower learning rate"
            )
        losses += loss
        tokens += count_tokens(batch)
    if not tokens:
        raise ValueError("there is no token to predict in these batches")
    return {"loss": losses / tokens, "perplexity": _exp(losses / tokens), "tokens": tokens}


def perplexity(
    model: GPT, ids: Tensor, *, max_length: int | None = None, stride: int | None = None
) -> float:
    """Perplexity of one text of any length: (1, N) -> a number.

    A window of `max_length` tokens (default: the context) moves by `stride` (default: half of
    it), and each token is counted once, in the first window that holds it. So a token has at
    least max_length - stride tokens before it; a long stride is fast, and too pessimistic.
    """
    windowed = windows(model, ids, max_length=max_length, stride=stride)
    return evaluate(model, windowed)["perplexity"]


def windows(
    model: GPT, ids: Tensor, *, max_length: int | None = None, stride: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The batches of `perplexity`: (1, N) -> windows, labelled where no earlier one has counted."""
    P, N = model.config.n_positions, ids.shape[1]
    max_length = P if max_length is None else max_length
    stride = max(1, max_length // 2) if stride is None else stride
    if not 2 <= max_length <= P:
        raise ValueError(f"max_length must be in [2, {P}], up to the context, got {max_length}")
    if not 1 <= stride < max_length:
        raise ValueError(f"stride must be in [1, max_length), got {stride} of {max_length}")
    if ids.shape[0] != 1 or N < 2:
        raise ValueError(
            f"ids must be one row of at least 2 tokens, (1, N), got {tuple(ids.shape)}"
        )
    done = 0  # tokens that an earlier window has counted
    for start in range(0, N, stride):
        window = ids[:, start : start + max_length]
        labels = window.clone()
        labels[:, : done - start] = IGNORED
        yield {"input_ids": window, "labels": labels}
        done = start + window.shape[1]
        if done == N:
            return


def distinct(rows: Iterable[Sequence[Hashable]], n: int) -> float:
    """The share of n-grams, over all rows together, that are different; 0 if there are none.

    >>> distinct([["the", "cat", "the", "cat"]], 1), distinct([["the", "cat", "the", "cat"]], 2)
    (0.5, 0.6666666666666666)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def kl_divergence(logits: Tensor, others: Tensor) -> float:
    """Mean over positions of KL(p || q) in nats, p and q being softmax of (…, V) logits.

    >>> half, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> kl_divergence(half, half), round(kl_divergence(half, sure), 4)
    (0.0, 0.5108)
    """
    _check_same(logits, others)
    log_p, log_q = (_wide(x).log_softmax(-1) for x in (logits, others))
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 log 0 is 0
    return terms.sum(-1).mean().item()


def top1_agreement(logits: Tensor, others: Tensor) -> float:
    """The share of positions at which both (…, V) logits have the same maximum; NaN is none.

    >>> a, b = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 9], [0, 2]])
    >>> top1_agreement(a, b)
    0.5
    """
    _check_same(logits, others)
    unknown = (logits.isnan() | others.isnan()).any(-1)  # argmax takes NaN for the largest
    same = logits.argmax(-1) == others.argmax(-1)
    return (same & ~unknown).double().mean().item()


def confusion_matrix(
    truth: Sequence[Hashable], predicted: Sequence[Hashable], *, labels: Sequence[Hashable]
) -> Tensor:
    """How often a truth (row) was predicted as what (column): (K, K) counts.

    >>> confusion_matrix(["a", "a", "b"], ["a", "b", "b"], labels=["a", "b"]).tolist()
    [[1, 1], [0, 1]]
    """
    if len(truth) != len(predicted):
        raise ValueError(
            f"truth and predicted must be of one length, got {len(truth)} and {len(predicted)}"
        )
    place = {label: i for i, label in enumerate(labels)}
    if unknown := {*truth, *predicted} - place.keys():
        raise ValueError(f"labels must hold every class, got none for {min(map(repr, unknown))}")
    matrix = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for true, guess in zip(truth, predicted):
        matrix[place[true], place[guess]] += 1
    return matrix


def class_scores(matrix: Tensor) -> list[Scores]:
    """Scores of each class of a (K, K) confusion matrix; 0 where nothing was found or to be found.

    >>> class_scores(torch.tensor([[1, 1], [0, 1]]))[0]
    Scores(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    right = matrix.diagonal().tolist()
    found, true = matrix.sum(0).tolist(), matrix.sum(1).tolist()
    return [_scores(*counts) for counts in zip(right, found, true)]


def macro_f1(matrix: Tensor) -> float:
    """The mean of the classes' F1: each class weighs the same, however rare.

    >>> round(macro_f1(torch.tensor([[1, 1], [0, 1]])), 4)
    0.6667
    """
    scores = class_scores(matrix)
    return sum(score.f1 for score in scores) / len(scores)


def rouge_l(prediction: str, reference: str) -> Scores:
    """ROUGE-L of two texts, of the words they share in the same order.

    Words are runs of letters and digits in lower case. The usual package knows ASCII letters only
    and would cut "canción" in two.

    >>> rouge_l("The cat is on the mat.", "the cat sat on the mat").recall
    0.8333333333333334
    """
    words, true = (WORDS.findall(text.lower()) for text in (prediction, reference))
    return _scores(_common(words, true), len(words), len(true))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def _scores(right: float, found: float, true: float) -> Scores:
    precision = right / found if found else 0.0
    recall = right / true if true else 0.0
    both = precision + recall
    return Scores(precision, recall, 2 * precision * recall / both if both else 0.0)


def _exp(loss: float) -> float:
    """exp, and infinity where a float has no larger number."""
    return math.exp(loss) if loss < 709 else math.inf


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_same(logits: Tensor, others: Tensor) -> None:
    if logits.shape != others.shape:
        raise ValueError(
            f"both logits must have one shape, got {tuple(logits.shape)} and {tuple(others.shape)}"
        )
