"""Tokens per second of minigpt and of transformers' own generate, in one interleaved run.

    prefill   prompt tokens / seconds to the first new token
    decode    new tokens after the first / seconds for them
    roofline  decode's reading of the weights, per second, as a part of what the memory can deliver

Proof: tests/test_bench.py.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.report import Record, Table, environment
from minigpt import GPT, GPTConfig, stream

# Where the two likeliest tokens are nearer than float32 resolves, either may be chosen.
MARGIN = 1e-3


@dataclass
class Runs:
    """What one engine did in all its runs: seconds at which each token came, and the tokens."""

    name: str
    generate: Callable[[Tensor, int], tuple[list[int], list[float]]]
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    long_prefill: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def measure(model: str | None, *, new_tokens: int = 128, runs: int = 5) -> Record:
    """Compare on a model, or on GPT-2 small's shape with random weights."""
    with TemporaryDirectory() as temporary:
        folder = Path(model) if model else random_model(Path(temporary))
        ours, theirs = GPT.from_pretrained(folder, dtype=torch.float32), load_hf(folder)
    config = ours.config
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (1, 64), generator=generator)
    room = config.n_positions - 1
    long_prompt = torch.randint(config.vocab_size, (1, min(512, room)), generator=generator)
    engines = [
        Runs("minigpt float32", lambda ids, n: run_minigpt(ours, ids, n)),
        Runs("transformers generate float32", lambda ids, n: run_hf(theirs, ids, n)),
    ]
    for number in range(runs + 1):  # the first round warms up
        for engine in engines:
            tokens, times = engine.generate(prompt, new_tokens)
            _, (start, first) = engine.generate(long_prompt, 1)
            engine.tokens = tokens
            if number:
                engine.prefill.append(prompt.shape[1] / (times[1] - times[0]))
                engine.decode.append((len(tokens) - 1) / (times[-1] - times[1]))
                engine.gaps += [b - a for a, b in pairwise(times[1:])]
                engine.long_prefill.append(long_prompt.shape[1] / (first - start))
    return report(engines, config, agree(theirs, prompt, *(e.tokens for e in engines)), runs)


def report(engines: list[Runs], config: GPTConfig, agreed: bool, runs: int) -> Record:
    """The table; an engine whose tokens differ from HF's gets no speed."""
    bandwidth = read_bandwidth()
    weights = 4 * matrix_weights(config)
    hf = engines[-1]
    columns = ["engine", "decode tokens/s", "spread", "x HF", "of the roofline", "TPOT p50 / p95"]
    columns += ["first token of 64, ms", "prefill 512 tokens/s", "x HF", "n"]
    table = Table("", columns)
    for engine in engines:
        if not agreed and engine is not hf:
            table.rows.append([engine.name, "other tokens than HF: no speed"] + ["–"] * 8)
            continue
        decode, prefill = map(statistics.median, (engine.decode, engine.long_prefill))
        p50, *_, p95 = statistics.quantiles(engine.gaps, n=20)[9:]
        table.rows.append(
            [
                engine.name,
                decode,
                f"{min(engine.decode):.1f}–{max(engine.decode):.1f}",
                decode / statistics.median(hf.decode),
                f"{100 * decode * weights / bandwidth:.0f} %",
                f"{1000 * p50:.1f} / {1000 * p95:.1f} ms",
                1000 * 64 / statistics.median(engine.prefill),
                prefill,
                prefill / statistics.median(hf.long_prefill),
                runs,
            ]
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    notes = [
        f"Read bandwidth {bandwidth / 1e9:.1f} GB/s; {weights / 1e6:.0f} MB of weights read per "
        f"token; peak memory of the whole run {peak:.0f} MB.",
        f"Start to first token, `python -m chatbot -p`: {start_to_first_token():.2f} s.",
    ]
    return Record("Speed, batch 1, greedy", [table], notes, environment())


def random_model(folder: Path) -> Path:
    """GPT-2 small's configuration with random weights."""
    GPT(GPTConfig(), generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


def load_hf(folder: Path) -> torch.nn.Module:
    """The same weights in transformers."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def run_minigpt(model: GPT, ids: Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
    """The tokens, and the time at the start and after each."""
    tokens, times = [], [time.perf_counter()]
    for token in stream(model, ids, max_new_tokens=new_tokens, temperature=0):
        tokens.append(token)
        times.append(time.perf_counter())
    return tokens, times


def run_hf(model: torch.nn.Module, ids: Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
    """The same through generate, whose streamer is called with the prompt and then each token."""

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    start = time.perf_counter()
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist(), [start, *clock.times[1:]]


@torch.inference_mode()
def agree(model: torch.nn.Module, ids: Tensor, ours: list[int], theirs: list[int]) -> bool:
    """Whether both chose the same tokens, up to a place where HF's two best were a tie."""
    for step, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            past = torch.cat([ids, torch.tensor([theirs[:step]], dtype=ids.dtype)], dim=1)
            logits = model(past, attention_mask=torch.ones_like(past)).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            return best - second <= MARGIN
    return len(ours) == len(theirs)


def matrix_weights(config: GPTConfig) -> int:
    """Weights read for one token: every matrix, and the head."""
    C, F = config.n_embd, config.inner_size
    return config.n_layer * (4 * C * C + 2 * C * F) + config.vocab_size * C


def read_bandwidth() -> float:
    """Bytes per second that all threads read from memory together: the best of a few sums."""
    numbers = torch.ones(64 << 20)  # 256 MB, more than any cache

    def seconds() -> float:
        start = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - start

    return numbers.nbytes / min(seconds() for _ in range(7))


def start_to_first_token() -> float:
    """Seconds from starting the chat's program to its first output."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "chatbot", "-p", "hola", "--max-new-tokens", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as chat:
        assert chat.stdout is not None
        first = chat.stdout.read(1)
        seconds = time.perf_counter() - start
        chat.stdout.read()
    return seconds if first else float("nan")
