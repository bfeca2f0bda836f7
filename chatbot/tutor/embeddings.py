"""Where the token embeddings start: as the sum of its words, a line already tells what it is about.

    line -> ids -> sum of their embeddings -> which of hundreds of subjects it has

That is fastText (Joulin et al. 2017), and learned in half a minute. A transformer that starts from
embeddings drawn by chance must find out by itself, in an hour, that "merge" and "adapter" speak of
LoRA: what it learns is all in the replies, and a rare word is seldom before one.
"""

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chatbot.tutor.corpus import Dialogues, lines_by_subject
from chatbot.tutor.pieces import Pieces
from chatbot.tutor.wording import relax
from minigpt import Tokenizer

LINES = 256  # a step
LEFT_OUT = 0.3  # of a line's tokens, so that no single one decides


def learn_embeddings(
    dialogues: Dialogues, tokenizer: Tokenizer, *, width: int, steps: int, seed: int
) -> Tensor:
    """Embeddings of all V tokens, of unit standard deviation: (V, width), the same for a seed."""
    from tqdm import tqdm

    subjects = lines_by_subject(dialogues)
    lines = [(n, line) for n, subject in enumerate(subjects) for line in subjects[subject]]
    random, pieces = Random(seed), Pieces(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    embeddings = nn.Parameter(torch.randn(len(tokenizer), width, generator=generator) * 0.02)
    head = nn.Parameter(torch.randn(len(subjects), width, generator=generator) * width**-0.5)
    optimizer = torch.optim.Adam([embeddings, head], lr=0.01)
    bar = tqdm(range(steps), desc="embeddings", disable=None)
    for step in bar:
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        part = random.choices(lines, k=LINES)
        rows = [_tokens(random, pieces, line) for _, line in part]
        starts = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)  # (LINES,)
        ids = torch.tensor([i for row in rows for i in row])
        weights = torch.tensor([len(row) ** -0.5 for row in rows for _ in row])
        sums = F.embedding_bag(ids, embeddings, starts, mode="sum", per_sample_weights=weights)
        loss = F.cross_entropy(sums @ head.T, torch.tensor([n for n, _ in part]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return embeddings.detach() / embeddings.detach().std()


def _tokens(random: Random, pieces: Pieces, line: str) -> list[int]:
    """A line's tokens as somebody types it, some of them left out, at least one kept."""
    text = relax(random, line, 0.4)
    ids = pieces.encode(random, text if random.random() < 0.7 else f" {text}")
    kept = [i for i in ids if random.random() >= LEFT_OUT]
    return kept or ids
