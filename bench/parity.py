"""Do both sides compute the same? Every tensor of one forward, in three precisions.

    difference of a tensor  =  max |minigpt - transformers| / max(1, max |transformers|)

Both load the same files and see the same random tokens (step 16, trace). float64 is the proof:
there a mistake stands far above rounding. The others show what rounding does to the same model.

Proof: tests/test_bench.py.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import hf_bridge
import minigpt
from bench.chart import Chart
from bench.environment import environment, sha256
from bench.report import Record, Table
from hf_bridge.trace import trace as trace_hf
from minigpt.files import read_json, resolve, weight_files
from minigpt.trace import trace

TOLERANCES = {
    "float64": 1e-9,  # rounding stays below 1e-11 even in wild weights, classic mistakes do not
    "float32": 1e-4,  # sums in another order, in 24 bits, through 12 layers: 1e-6 is usual
    "bfloat16": 0.05,  # a step is 2^-8, and the bias is added before or after rounding: 0.02
}
INT8 = {  # layers that round their input to 127 steps turn the least difference into a step
    "float64": 1e-3,
    "float32": 1e-3,
    "bfloat16": 0.2,  # where inputs differ from the first GELU on: 0.06 in the tutor's four blocks
}
LENGTH = 64  # tokens in a row; two rows


def measure(model: str | Path, *, dtypes: Sequence[str] = tuple(TOLERANCES)) -> Record:
    """Trace the model on both sides; `passed` if every tensor agrees within its tolerance.

    Raises ValueError for a dtype without a tolerance, or a model that either side cannot read.
    """
    for dtype in dtypes:
        if dtype not in TOLERANCES:
            raise ValueError(f"dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    folder = resolve(model)
    config = minigpt.config.read(folder)
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(LENGTH, config.n_positions))
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    verdicts = Table("", ["dtype", "largest difference", "in", "tolerance", "verdict"])
    columns: dict[str, dict[str, float]] = {}
    shapes: dict[str, str] = {}
    for dtype in dtypes:
        ours, theirs = both(folder, getattr(torch, dtype), ids)
        shapes |= {name: " x ".join(map(str, tensor.shape)) for name, tensor in theirs.items()}
        columns[dtype] = found = differences(ours, theirs)
        worst = max(found, key=lambda name: found[name])
        allowed = tolerance(folder, dtype)
        verdict = "equal" if found[worst] <= allowed else "DIFFERS"
        verdicts.rows.append([dtype, shown(found[worst]), worst, allowed, verdict])
    passed = all(row[-1] == "equal" for row in verdicts.rows)
    every = Table("Every tensor", ["name", "shape", *dtypes])
    for name in columns[dtypes[0]]:
        cells = [shown(columns[dtype][name]) for dtype in dtypes]
        every.rows.append([name, shapes.get(name, "missing"), *cells])
    notes = [
        f"{model}, {shape[0]} rows of {shape[1]} random tokens. Differences are parts of the "
        "tensor's largest value, or of 1 if that is smaller.",
        *(f"SHA-256 of {path.name}: `{sha256(path)}`" for path in weight_files(folder)),
        "Verdict: " + ("the two agree." if passed else "**the two differ.**"),
    ]
    lines = {
        dtype: [
            found if math.isfinite(found) and found else None for found in columns[dtype].values()
        ]
        for dtype in dtypes
    }
    names = list(columns[dtypes[0]])
    chart = Chart("Difference to transformers (no point: none)", names, lines, log=True)
    title = "Parity with transformers"
    return Record(title, [verdicts, every], notes, environment(), passed, chart)


def tolerance(folder: Path, dtype: str) -> float:
    """The largest difference that is still rounding, for a model in these files."""
    quantization = read_json(folder / "config.json").get("quantization_config", {})
    return max(TOLERANCES[dtype], INT8[dtype] if quantization.get("load_in_8bit") else 0)


def both(
    folder: Path, dtype: torch.dtype, ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two traces; each model is gone when the next is loaded."""
    ours = trace(minigpt.GPT.from_pretrained(folder, dtype=dtype), ids)
    return ours, trace_hf(hf_bridge.GPT.from_pretrained(folder, dtype=dtype), ids)


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """The difference of each tensor; infinite where one side lacks it, hides more, or has a NaN.

    >>> differences({"q": torch.tensor([1.0, 8.0])}, {"q": torch.tensor([3.0, 8.0])})
    {'q': 0.25}
    """
    return {name: _difference(ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}


def shown(difference: float) -> float | str:
    """A number as JSON can hold it."""
    return difference if math.isfinite(difference) else "no number"


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return math.inf
    hidden = a.isneginf()  # in the scores, what the mask hides
    if not torch.equal(hidden, b.isneginf()):
        return math.inf
    a, b = (tensor.double().masked_fill(hidden, 0) for tensor in (a, b))
    difference = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
    return difference if math.isfinite(difference) else math.inf
