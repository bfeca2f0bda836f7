"""What a model takes: weights, keys and values, and a whole fresh process that continues a text.

Proof: tests/test_bench.py.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import hf_bridge
import minigpt
from bench.chart import Chart
from bench.environment import environment
from bench.report import Record, Table
from minigpt.files import resolve, weight_files

PROCESS = """
import importlib, sys
from bench.environment import peak_memory
side, folder, prompt_tokens, new_tokens = sys.argv[1:]
package = importlib.import_module(side)
import torch
model = package.GPT.from_pretrained(folder, dtype=torch.float32)
ids = torch.ones(1, int(prompt_tokens), dtype=torch.int64)
package.generate(model, ids, max_new_tokens=int(new_tokens), temperature=0)
print(peak_memory())
"""


PROMPT, NEW = 64, 32  # tokens that a process reads and writes, or half a shorter context of each


def measure(model: str | Path, *, sliding_window: int = 128) -> Record:
    """Bytes of the model in float32 on both sides, and the peak of processes that use it."""
    folder = resolve(model).resolve()
    table = Table("", ["MB", "minigpt", "transformers"])
    columns = []
    for package in (minigpt, hf_bridge):
        whole = package.GPT.from_pretrained(folder, dtype=torch.float32)
        window = package.GPT.from_pretrained(
            folder, dtype=torch.float32, sliding_window=sliding_window
        )
        weights = sum(p.nbytes for p in whole.parameters())
        prompt = min(PROMPT, whole.config.n_positions // 2)
        new = min(NEW, whole.config.n_positions // 2)
        peak = process(package.__name__, folder, prompt, new)
        columns.append([megabytes(n) for n in (weights, held(whole), held(window), peak)])
    P = whole.config.n_positions
    names = ["weights", f"cache, {P} tokens", f"cache, window of {sliding_window}", "whole process"]
    table.rows = [[name, *cells] for name, *cells in zip(names, *columns)]
    file = sum(path.stat().st_size for path in weight_files(folder))
    notes = [
        f"{model}, float32; its file has {file / 1e6:.1f} MB. The process, Python and libraries "
        f"included, reads {prompt} tokens and writes {new}.",
    ]
    sides = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns) if i}
    chart = Chart("Memory, MB", [row[0] for row in table.rows], sides, log=True)
    return Record("Memory", [table], notes, environment(), chart=chart)


@torch.inference_mode()
def held(model: Any) -> int:
    """Bytes of either side's cache through which the whole context has gone."""
    cache = model.new_cache()
    for T in (model.config.n_positions - 1, 1):  # prompt and a token: a ring is full and turns
        model.hidden(torch.zeros(1, T, dtype=torch.int64), cache=cache)
    return cache.nbytes


def process(side: str, folder: Path, prompt_tokens: int, new_tokens: int) -> int:
    """The most bytes that a fresh process held which loads the model and continues a text."""
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, side, folder, str(prompt_tokens), str(new_tokens)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    if run.returncode:
        said = run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"]
        raise OSError(f"the process for {side} failed: {said[-1]}")
    return int(run.stdout)


def megabytes(size: int) -> float:
    """Bytes -> MB, millions of bytes."""
    return round(size / 1e6, 3)
