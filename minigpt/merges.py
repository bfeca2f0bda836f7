"""Beside step 2: which pairs of symbols become tokens.

    again and again: the most frequent pair of neighbours becomes one new symbol

Sennrich et al. 2016, algorithm 1. What is counted are the words' pairs, each word once, times how
often it stands in the texts; after a merge only the words that hold the pair are counted anew.

Used by: tokenizer.py.  Proof: tests/test_tokenizer.py.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

Pair = tuple[str, str]


def learn(
    words: Mapping[str, int], vocab: Mapping[str, int], *, vocab_size: int, min_frequency: int = 2
) -> tuple[dict[str, int], list[Pair]]:
    """Words and how often they stand there -> the vocabulary, now larger, and the merges.

    `vocab` holds the ids of the words' letters. Of equally frequent pairs the one with the lower
    ids is taken, as in the tokenizers library, so that both learn the same. It ends with
    `vocab_size` tokens, or where no pair stands there `min_frequency` times.

    >>> learn({"low": 3, "lower": 1}, {"e": 0, "l": 1, "o": 2, "r": 3, "w": 4}, vocab_size=99)
    ({'e': 0, 'l': 1, 'o': 2, 'r': 3, 'w': 4, 'lo': 5, 'low': 6}, [('l', 'o'), ('lo', 'w')])
    """
    vocab = dict(vocab)
    frequency = list(words.values())
    parts = [list(word) for word in words]
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)  # the words in which a pair stands
    for i, word in enumerate(parts):
        for pair in pairwise(word):
            pairs[pair] += frequency[i]
            where[pair].add(i)

    # Most frequent first, then lowest ids. A count that has changed is pushed again in its turn.
    heap = [(-count, vocab[a], vocab[b], (a, b)) for (a, b), count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(vocab) < vocab_size:
        negative, a, b, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], a, b, pair))
            continue
        if -negative < max(min_frequency, 1):
            break
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
        changed: set[Pair] = set()
        for i in where.pop(pair):
            before, parts[i] = parts[i], join(parts[i], pair)
            for old in pairwise(before):
                pairs[old] -= frequency[i]
            for new in pairwise(parts[i]):
                pairs[new] += frequency[i]
                where[new].add(i)
                changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-pairs[new], vocab[new[0]], vocab[new[1]], new))
    return vocab, merges


def join(parts: Sequence[str], pair: Pair) -> list[str]:
    """Join every occurrence of the pair, from the left.

    >>> join(["a", "a", "a"], ("a", "a"))
    ['aa', 'a']
    """
    joined: list[str] = []
    i = 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined
