"""Tokens per second of minigpt and of transformers' own generate, in one interleaved run.

    prefill   prompt tokens / seconds to the first new token
    decode    new tokens after the first / seconds for them
    roofline  decode's reading of the weights, per second, as a part of what the memory can deliver

Proof: tests/test_bench.py.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from bench.chart import Chart
from bench.environment import environment
from bench.report import Record, Table
from chatbot.engines import TUTOR
from hf_bridge import GPT as HF
from minigpt import GPT, GPTConfig, stream
from minigpt.config import from_dict
from minigpt.files import read_json, resolve

PROMPT, LONG_PROMPT = 64, 512
# Logits this near may change places: float32 moves those of GPT-2, near 100, by up to 1e-4.
MARGIN = 1e-3


@dataclass
class Runs:
    """What one engine did in all its runs, and whether it wrote what transformers wrote."""

    name: str
    generate: Callable[[Tensor, int], tuple[list[int], list[float]]]
    agreed: bool = True
    first: list[float] = field(default_factory=list)  # seconds to the first token of PROMPT
    decode: list[float] = field(default_factory=list)  # tokens per second after it
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens
    prefill: list[float] = field(default_factory=list)  # tokens per second of LONG_PROMPT


def measure(
    model: str | None, *, config: Path | None = None, new_tokens: int = 128, runs: int = 5
) -> Record:
    """Compare on a model, or on random weights of a config.json's shape, or GPT-2 small's.

    Raises ValueError if there is too little to measure, or no room for it in the context.
    """
    if new_tokens < 3 or runs < 1:
        raise ValueError(f"at least 3 new tokens and 1 run, got {new_tokens} and {runs}")
    if model and config:
        raise ValueError("give a model or the shape of a random one, not both")
    with TemporaryDirectory() as temporary:
        folder = resolve(model) if model else random_model(Path(temporary), config)
        ours = GPT.from_pretrained(folder, dtype=torch.float32)
        theirs = HF.from_pretrained(folder, dtype=torch.float32).hf
    theirs.generation_config = GenerationConfig()  # no end token, no advice: all that is asked
    generator = torch.Generator().manual_seed(0)
    V, P = ours.config.vocab_size, ours.config.n_positions
    prompt = torch.randint(V, (1, PROMPT), generator=generator)
    long_prompt = torch.randint(V, (1, min(LONG_PROMPT, P - 1)), generator=generator)
    engines = [
        Runs("minigpt float32", lambda ids, n: run_minigpt(ours, ids, n)),
        Runs("transformers generate float32", lambda ids, n: run_hf(theirs, ids, n)),
    ]
    for number in tqdm(range(runs + 1), unit="round", disable=None):  # the first one warms up
        written = []
        for engine in engines:
            tokens, times = engine.generate(prompt, new_tokens)
            long_tokens, (start, end) = engine.generate(long_prompt, 1)
            written.append((tokens, long_tokens))
            if number:
                engine.first.append(times[1] - times[0])
                engine.decode.append((len(tokens) - 1) / (times[-1] - times[1]))
                engine.gaps += [b - a for a, b in pairwise(times[1:])]
                engine.prefill.append(long_prompt.shape[1] / (end - start))
        for engine, (tokens, long_tokens) in zip(engines, written):
            right, long_right = written[-1]
            engine.agreed &= agree(theirs, prompt, tokens, right)
            engine.agreed &= agree(theirs, long_prompt, long_tokens, long_right)
    return report(engines, ours.config, long_prompt.shape[1], new_tokens)


def report(engines: list[Runs], config: GPTConfig, long: int, new_tokens: int) -> Record:
    """The table; an engine whose tokens differ from those of the last one, HF, gets no speed."""
    bandwidth, weights, hf = read_bandwidth(), 4 * matrix_weights(config), engines[-1]
    columns = ["engine", "decode tokens/s", "spread", "x HF", "of the roofline"]
    columns += ["time per token, p50 / p95 ms", f"first token of {PROMPT}, ms"]
    table = Table("", [*columns, f"prefill {long} tokens/s", "spread", "x HF", "n"])
    for engine in engines:
        if not engine.agreed:
            nothing = ["–"] * (len(table.columns) - 2)
            table.rows.append([engine.name, "other tokens than HF: no speed", *nothing])
            continue
        decode, prefill = median(engine.decode), median(engine.prefill)
        gaps = quantiles([1000 * gap for gap in engine.gaps], n=20, method="inclusive")
        table.rows.append(
            [
                engine.name,
                decode,
                spread(engine.decode),
                decode / median(hf.decode),
                f"{100 * decode * weights / bandwidth:.0f} %",
                f"{gaps[9]:.1f} / {gaps[18]:.1f}",
                1000 * median(engine.first),
                prefill,
                spread(engine.prefill),
                prefill / median(hf.prefill),
                len(engine.decode),
            ]
        )
    notes = [
        f"{PROMPT} tokens, then {new_tokens} new ones; decode leaves the first of these out. "
        f"Medians of runs that take turns after a warm-up, and the least and the greatest.",
        f"Memory delivers {bandwidth / 1e9:.1f} GB/s, and each token reads {weights / 1e6:.3g} MB "
        "of weights.",
        f"Start to first token of `python -m chatbot -p`: {start_to_first_token()}.",
    ]
    chart = Chart(
        "Speed, batch 1, greedy: times that of transformers",
        ["decode", f"prefill {long}"],
        {
            e.name: [median(e.decode) / median(hf.decode), median(e.prefill) / median(hf.prefill)]
            for e in engines
            if e.agreed
        },
    )
    return Record("Speed, batch 1, greedy", [table], notes, environment(), chart=chart)


def spread(numbers: list[float]) -> str:
    """The least and the greatest."""
    return f"{min(numbers):.1f}–{max(numbers):.1f}"


def random_model(folder: Path, config: Path | None) -> Path:
    """Random weights of a config.json's shape, or of GPT-2 small's."""
    shape = GPTConfig() if config is None else from_dict(read_json(config))
    GPT(shape, generator=torch.Generator().manual_seed(0)).save_pretrained(folder)
    return folder


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
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist(), [start, *clock.times[1:]]


@torch.inference_mode()
def agree(model: torch.nn.Module, ids: Tensor, ours: list[int], theirs: list[int]) -> bool:
    """Whether both chose the same tokens, up to a place where HF held both for equally likely."""
    if len(ours) != len(theirs):
        return False
    for step, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            past = torch.cat([ids, torch.tensor([theirs[:step]], dtype=ids.dtype)], dim=1)
            logits = model(past, attention_mask=torch.ones_like(past)).logits[0, -1]
            return abs(logits[a] - logits[b]).item() <= MARGIN
    return True


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


def start_to_first_token() -> str:
    """How long the chat's program takes from its start to its first output, or why that is open."""
    if not (TUTOR / "model.safetensors").is_file():
        return f"not measured, {TUTOR.name} holds no model"
    command = [sys.executable, "-m", "chatbot", "-p", "hola", "--max-new-tokens", "20"]
    pipe, root = subprocess.PIPE, TUTOR.parent.parent
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe) as chat:
        assert chat.stdout
        first = chat.stdout.read(1)
        seconds = time.perf_counter() - start
        _, said = chat.communicate()
    if not first:
        return f"not measured, the chat said {said.decode(errors='replace').strip()!r}"
    return f"{seconds:.2f} s"
