"""Beside the steps: a trace as a table and as pictures, to the letter as in minigpt/picture.py."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hf_bridge.tokenizer import Tokenizer

COLUMNS = ("mean", "std", "min", "max")
FONT = "DejaVu Sans Mono"  # comes with matplotlib
PITCH = 0.115  # inches from one word to the next
LONGEST = 16  # letters of a word


def table(seen: Mapping[str, Tensor]) -> str:
    """A line per tensor: its name, its shape, and how its finite values are spread.

    >>> print(table({"h.0.attn.scores": Tensor([[1.0, -math.inf], [2.0, 3.0]])}))
    name             shape       mean       std       min       max
    h.0.attn.scores  2 x 2          2         1         1         3
    """
    shapes = {name: " x ".join(map(str, tensor.shape)) for name, tensor in seen.items()}
    left = max(len("name"), *map(len, shapes))
    middle = max(len("shape"), *map(len, shapes.values())) + 1
    lines = [f"{'name':<{left}}  {'shape':<{middle}}" + "".join(f"{c:>10}" for c in COLUMNS)]
    for name, tensor in seen.items():
        values = tensor[tensor.isfinite()].double()
        numbers = [math.nan] * 4
        if values.numel():
            spread = values.std(correction=min(1, values.numel() - 1))
            numbers = [n.item() for n in (values.mean(), spread, values.min(), values.max())]
        cells = "".join(f"{number:>10.4g}" for number in numbers)
        lines.append(f"{name:<{left}}  {shapes[name]:<{middle}}{cells}")
    return "\n".join(lines)


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text, with spaces and line ends made visible; part of a character as #id."""
    texts = [tokenizer.decode([token]) for token in ids]
    marks = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
    return [f"#{i}" if "\ufffd" in t else t.translate(marks) for i, t in zip(ids, texts)]


def draw(pattern: Tensor, words: Sequence[str], path: str | Path, *, title: str = "") -> None:
    """Draw the heads' patterns, (H, T, T), as a PNG: each row is a token, dark where it looks.

    Gray is what has no weight at all, as what it cannot see. The scale is of square roots: a long
    text shares its weight among many tokens, and would else look pale.

    Raises ValueError unless there is a word for each token and the file is to be a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    H, T = pattern.shape[:2]
    path = Path(path)
    if len(words) != T:
        raise ValueError(f"there must be a word for each of {T} tokens, got {len(words)}")
    if path.suffix.lower() != ".png" or path.is_dir():
        raise ValueError(f"the picture must be a file that ends in .png, got {str(path)!r}")
    across = math.ceil(math.sqrt(H))
    down = math.ceil(H / across)
    side = min(max(2.8, 0.19 * T), max(2.8, 14 / across))  # inches of one head
    figure = Figure(figsize=(across * side + 1.6, down * side + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    weights = pattern.double().masked_fill(pattern == 0, math.nan).cpu().numpy()
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    shown = range(0, T, math.ceil(T * PITCH / side))
    texts = _legible([words[t] for t in shown])
    style = {"fontsize": 7, "color": "0.25", "family": FONT, "parse_math": False}
    scale = PowerNorm(0.5, vmin=0, vmax=1)
    for head, axes in enumerate(grid.flat):
        if head >= H:
            axes.remove()
            continue
        image = axes.imshow(weights[head], cmap="Blues", norm=scale, interpolation="nearest")
        axes.set_facecolor("0.93")
        axes.set_title(f"head {head}", fontsize=9, color="0.3", pad=4)
        axes.set_xticks(shown, texts, rotation=90, **style)
        axes.set_yticks(shown, texts, **style)
        axes.tick_params(length=0, labelbottom=head + across >= H)
        axes.spines[:].set(color="0.8", linewidth=0.6)
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.supylabel("the token that looks", fontsize=9, color="0.3")
    figure.supxlabel("the token it looks at", fontsize=9, color="0.3")
    bar = figure.colorbar(
        image,
        ax=list(grid.flat[:H]),
        shrink=0.5,
        aspect=30,
        pad=0.02,
        ticks=[0, 0.01, 0.1, 0.25, 0.5, 1],
    )
    bar.ax.set_yticklabels([f"{t:.0%}" for t in bar.get_ticks()])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, labelcolor="0.25")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=150)
    os.replace(part, path)


def _legible(words: Sequence[str]) -> list[str]:
    """Short enough to stand beside a head, and of letters that the font has: others as U+65E5."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(FONT)).get_charmap()
    whole = ["".join(c if ord(c) in known else f"U+{ord(c):04X}" for c in word) for word in words]
    return [word if len(word) <= LONGEST else word[: LONGEST - 1] + "…" for word in whole]
