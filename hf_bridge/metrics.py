"""Step 15 through well-kept libraries: the model's own loss, torch, scikit-learn, rouge-score.

The loss that a transformers model returns is computed in float32, even for a float64 model.
rouge-score's words are ASCII letters and digits: without a tokenizer of ours "canción" would be
"canci" and "n". scikit-learn warns where a class was never predicted, unless told what to say.

Before: train.py.  After: trace.py.  Twin: minigpt/metrics.py.  Proof: tests/test_metrics.py.
"""

import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bridge.model import GPT
from hf_bridge.optimize import count_tokens, summed_loss

WORDS = re.compile(r"[^\W_]+")


class Scores(NamedTuple):
    """Precision, recall and their harmonic mean, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


@torch.inference_mode()
def evaluate(model: GPT, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Loss and perplexity over batches, every token weighing the same; errors as in minigpt."""
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
    mean = losses / tokens
    perplexity = math.exp(mean) if mean < 709 else math.inf
    return {"loss": mean, "perplexity": perplexity, "tokens": tokens}


def perplexity(
    model: GPT, ids: Tensor, *, max_length: int | None = None, stride: int | None = None
) -> float:
    """Perplexity of one text of any length by a moving window, as the library's guide shows it.

    The guide averages the windows' means, which weighs their tokens unequally; with a stride as
    long as the window it never predicts a window's first token.
    """
    windowed = windows(model, ids, max_length=max_length, stride=stride)
    return evaluate(model, windowed)["perplexity"]


def windows(
    model: GPT, ids: Tensor, *, max_length: int | None = None, stride: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """The batches of `perplexity`: (1, N) -> windows, labelled where no earlier one has counted."""
    P = model.config.n_positions
    max_length = P if max_length is None else max_length
    stride = max(1, max_length // 2) if stride is None else stride
    if not 2 <= max_length <= P:
        raise ValueError(f"max_length must be in [2, {P}], up to the context, got {max_length}")
    if not 1 <= stride < max_length:
        raise ValueError(f"stride must be in [1, max_length), got {stride} of {max_length}")
    if ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids must be one row of at least 2 tokens, (1, N), got {tuple(ids.shape)}"
        )
    previous = 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : labels.shape[1] - (end - previous)] = -100
        yield {"input_ids": ids[:, begin:end], "labels": labels}
        previous = end
        if end == ids.shape[1]:
            return


def distinct(rows: Iterable[Sequence[Hashable]], n: int) -> float:
    """The share of n-grams that are different, by scikit-learn's counter of n-grams."""
    from sklearn.feature_extraction.text import CountVectorizer

    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rows = [row for row in rows if len(row) >= n]
    if not rows:
        return 0.0
    counter = CountVectorizer(analyzer=lambda row: list(zip(*(row[i:] for i in range(n)))))
    counts = counter.fit_transform(rows)
    return counts.shape[1] / int(counts.sum())


def kl_divergence(logits: Tensor, others: Tensor) -> float:
    """Mean over positions of KL(p || q) in nats, by torch's kl_div, which takes q first."""
    _check_same(logits, others)
    p, q = (x if x.dtype == torch.float64 else x.float() for x in (logits, others))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms.masked_fill(log_p == -math.inf, 0.0).sum(-1).mean().item()  # 0 log 0 is 0


def top1_agreement(logits: Tensor, others: Tensor) -> float:
    """The share of positions with the same maximum, as an accuracy; NaN is none."""
    from sklearn.metrics import accuracy_score

    _check_same(logits, others)
    unknown = (logits.isnan() | others.isnan()).any(-1)  # argmax takes NaN for the largest
    chosen = logits.argmax(-1).masked_fill(unknown, -1)
    return float(accuracy_score(others.argmax(-1).flatten(), chosen.flatten()))


def confusion_matrix(
    truth: Sequence[Hashable], predicted: Sequence[Hashable], *, labels: Sequence[Hashable]
) -> Tensor:
    """How often a truth (row) was predicted as what (column): (K, K) counts."""
    from sklearn import metrics

    if len(truth) != len(predicted):
        raise ValueError(
            f"truth and predicted must be of one length, got {len(truth)} and {len(predicted)}"
        )
    # The library leaves out what has an unknown label, and does not count it.
    if unknown := {*truth, *predicted} - set(labels):
        raise ValueError(f"labels must hold every class, got none for {min(map(repr, unknown))}")
    return torch.from_numpy(metrics.confusion_matrix(truth, predicted, labels=list(labels)))


def class_scores(matrix: Tensor) -> list[Scores]:
    """Scores of each class of a (K, K) confusion matrix."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        *_pairs(matrix), labels=range(len(matrix)), zero_division=0
    )
    return [Scores(*map(float, scores)) for scores in zip(precision, recall, f1)]


def macro_f1(matrix: Tensor) -> float:
    """The mean of the classes' F1."""
    from sklearn.metrics import f1_score

    truth, predicted = _pairs(matrix)
    classes = range(len(matrix))
    return float(f1_score(truth, predicted, labels=classes, average="macro", zero_division=0))


def rouge_l(prediction: str, reference: str) -> Scores:
    """ROUGE-L by rouge-score, with words of letters and digits of any alphabet."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], tokenizer=_Words()).score(reference, prediction)["rougeL"]
    return Scores(float(score.precision), float(score.recall), float(score.fmeasure))


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


def _pairs(matrix: Tensor) -> tuple[list[int], list[int]]:
    """The list of (truth, predicted) that a confusion matrix counts."""
    cells = matrix.nonzero()  # (cells, 2)
    times = matrix[tuple(cells.T)]
    truth, predicted = cells.repeat_interleave(times, dim=0).T.tolist()
    return truth, predicted


def _check_same(logits: Tensor, others: Tensor) -> None:
    if logits.shape != others.shape:
        raise ValueError(
            f"both logits must have one shape, got {tuple(logits.shape)} and {tuple(others.shape)}"
        )
