"""Where the weights start: words that tell what they are about, and heads that copy.

    Zimar ... Zi -> mar        the head of layer 1 finds the token after the last "Zi"

To say a name again needs two heads, an "induction head" (Olsson et al. 2022): one in layer 0 looks
at the token before each token, and notes it in dimensions of its own; one in layer 1 looks for the
note that is equal to the token it stands at, and says the token that it finds there. Training finds
them too, but after thousands of steps, so here they are written into the weights, and training does
with them what it likes.

Proof: tests/test_tutor.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt import GPT
from minigpt.attention import Attention

TOKENS, WAVES = 0.08, 0.1  # how large embeddings of tokens and of positions are, in a dimension
SHARP = 4.0  # queries and keys of the head that looks at the token before
NOTE, NOTED = 0.15, 2.0  # how large its notes are, and how closely they are looked at
COPY = 0.1  # how loudly a head says what it looks at; louder, it drowns what a question is about


@torch.no_grad()
def start_embeddings(model: GPT, tokens: Tensor) -> None:
    """Give the first D dimensions to positions, the others to `tokens`, (V, C - D), of equal size.

    D is the size of a head. Positions are sinusoids (Vaswani et al. 2017, section 3.5): one step on
    is then the same rotation everywhere, which is what a head can look for.
    """
    width = head_size(model)
    model.wte.weight.zero_()
    model.wte.weight[:, width:] = TOKENS * tokens.shape[1] ** 0.5 * F.normalize(tokens)
    angles = torch.arange(model.config.n_positions)[:, None] * frequencies(model)  # (P, D / 2)
    model.wpe.weight.zero_()
    model.wpe.weight[:, :width] = WAVES * torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@torch.no_grad()
def start_copying(model: GPT, generator: torch.Generator) -> None:
    """Write an induction head into layers 0 and 1; a head of each later layer can copy too."""
    width, C = head_size(model), model.config.n_embd
    before, match, *others = (part for part in model.modules() if isinstance(part, Attention))
    for attention in (match, *others):
        _, _, values = attention.c_attn.weight.chunk(3, dim=1)  # views of the weight, (C, C)
        read = subspace(C, width, generator)
        values[:, :width] = read
        attention.c_proj.weight[:width] = COPY * read.T

    token, note = subspace(C, width, generator), subspace(C, width, generator)
    queries, keys, values = before.c_attn.weight.chunk(3, dim=1)
    queries[:, :width] = keys[:, :width] = 0
    queries[:width, :width] = SHARP * one_back(model)
    keys[:width, :width] = SHARP * torch.eye(width)
    values[:, :width] = token
    before.c_proj.weight[:width] = NOTE * note.T
    queries, keys, _ = match.c_attn.weight.chunk(3, dim=1)
    queries[:, :width] = NOTED * token
    keys[:, :width] = NOTED * note


def one_back(model: GPT) -> Tensor:
    """What makes position t's sinusoids those of t - 1: each pair turned back a step: (D, D)."""
    turn = torch.zeros(head_size(model), head_size(model))
    for pair, angle in enumerate(frequencies(model)):
        sine, cosine, i = angle.sin(), angle.cos(), 2 * pair
        turn[i : i + 2, i : i + 2] = torch.stack([cosine, sine, -sine, cosine]).view(2, 2)
    return turn


def head_size(model: GPT) -> int:
    """D, the dimensions of a head."""
    return model.config.n_embd // model.config.n_head


def frequencies(model: GPT) -> Tensor:
    """Of the sinusoids, in radians a position: from 1 down to nearly 1 / P: (D / 2,)."""
    pairs = head_size(model) // 2
    return torch.tensor(float(model.config.n_positions)) ** -(torch.arange(pairs) / pairs)


def subspace(C: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions at right angles to each other, and to those of the positions: (C, D)."""
    directions = torch.randn(C, width, generator=generator)
    directions[:width] = 0
    return torch.linalg.qr(directions).Q
