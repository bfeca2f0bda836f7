"""Step 12: bottleneck adapters, small layers that alone train.  (B, T, C) -> (B, T, C)

    adapter(y) = y + W_up gelu(W_down y + b_down) + b_up

y is what attention or the MLP is about to add to the residual stream: projected back to C, not yet
added. Houlsby et al. 2019, section 2.1. Both matrices start near zero, and a fresh adapter near the
identity. Unlike LoRA it cannot be merged into a weight.

Before: lora.py.  After: data.py.  Twin: hf_bridge/adapters.py.  Proof: tests/test_adapters.py.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minigpt import lora, peft_files
from minigpt.config import GPTConfig
from minigpt.files import WeightsError, read_json, save_tensors, write_json
from minigpt.model import GPT
from minigpt.peft_files import check, check_base, name_elsewhere

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck_model.safetensors"
BASE = "base_model_name_or_path"  # as peft calls it
POINTS = ("attn.resid_dropout", "mlp.dropout")  # the last thing that each half of a block does
STD = 0.01  # of the normal distribution, cut off at two of these


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is besides its weights; `layer_norms`: the model's norms belong to it too."""

    width: int = 64
    layer_norms: bool = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"width must be a whole number of at least 1, got {self.width!r}")


class Adapter(nn.Module):
    """The equation above, behind the dropout that it wraps: (B, T, C) -> (B, T, C).

    >>> adapter, y = Adapter(nn.Dropout(), 4, AdapterConfig(width=2)).eval(), torch.ones(1, 3, 4)
    >>> bool(((adapter(y) - y).abs() < 0.01).all())
    True
    """

    def __init__(
        self,
        dropout: nn.Module,
        n_embd: int,
        config: AdapterConfig,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.down = nn.utils.skip_init(nn.Linear, n_embd, config.width)
        self.up = nn.utils.skip_init(nn.Linear, config.width, n_embd)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, 0.0, STD, -2 * STD, 2 * STD, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(x)
        hidden = self.down(y.to(self.down.weight.dtype))  # (B, T, width)
        return (y + self.up(F.gelu(hidden, approximate="tanh"))).to(y.dtype)


def adapt(
    model: GPT,
    *,
    width: int = 64,
    layer_norms: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Freeze the model and put two adapters into each block: they train, and nothing else.

    With `layer_norms` the model's norms train too, as in the paper, and are saved with them.
    Raises ValueError for a width below 1, and for a model that has adapters.
    """
    config = AdapterConfig(width, layer_norms)
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has bottleneck adapters already")
    model.requires_grad_(False)
    dtype = torch.float64 if model.wte.weight.dtype == torch.float64 else torch.float32
    for block in model.h:
        for point in POINTS:
            dropout = block.get_submodule(point)
            adapter = Adapter(dropout, model.config.n_embd, config, generator=generator)
            block.set_submodule(point, adapter.to(model.device, dtype).train(model.training))
    for parameter in _own(model, config).values():
        parameter.requires_grad_(True)


def save(model: GPT, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapters, and the layer norms if they are theirs, as safetensors with a config.

    `base_model` is the name of the model that they are for, for whoever loads them.
    Raises ValueError for a model without adapters, or with weights that are NaN.
    """
    config = next((m.config for m in model.modules() if isinstance(m, Adapter)), None)
    if config is None:
        raise ValueError("the model has no bottleneck adapters: adapt it or load some first")
    tensors = {name: p.detach() for name, p in _own(model, config).items()}
    check(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, {**asdict(config), BASE: name_elsewhere(base_model)})


def load(
    model: GPT,
    folder: str | Path,
    *,
    trainable: bool = False,
    base_model: str | None = None,
) -> None:
    """Read what `save` wrote; the adapters train only if `trainable`.

    Raises WeightsError, the model being as before, unless the files hold just what this base needs.
    """
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise WeightsError(f"{path} is missing: {folder} holds no bottleneck adapters")
    try:
        settings = {BASE: None, **read_json(folder / CONFIG)}
        made_for = settings.pop(BASE)
        config = AdapterConfig(**settings)
        tensors = load_file(folder / WEIGHTS)
        with torch.device("meta"):  # names and shapes, no memory
            blank = GPT(model.config)
            adapt(blank, **asdict(config))
        check(tensors, {name: tuple(p.shape) for name, p in _own(blank, config).items()})
    except (SafetensorError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: {error}") from error
    check_base(folder / CONFIG, made_for, base_model)
    adapt(model, **asdict(config), generator=torch.Generator())
    with torch.no_grad():
        for name, parameter in _own(model, config).items():
            parameter.copy_(tensors[name]).requires_grad_(trainable)


def load_either(model: GPT, folder: str | Path, *, base_model: str | None = None) -> None:
    """Load bottleneck adapters or LoRA, whichever is there; errors as in load and lora.load."""
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        load(model, folder, base_model=base_model)
    elif any(folder.glob("adapter_*")):
        lora.load(model, folder, base_model=base_model)
    else:
        raise WeightsError(
            f"{folder} holds no adapter: {peft_files.CONFIG} or {CONFIG} must be there "
            "(finetune writes them into the directory best of its output)"
        )


class Row(NamedTuple):
    """A way to train a model: how many parameters train, of how many."""

    method: str
    trainable: int
    total: int


def parameter_table(
    config: GPTConfig,
    *,
    rank: int = 8,
    targets: Iterable[str] = ("c_attn",),
    width: int = 64,
) -> list[Row]:
    """What full fine-tuning, LoRA and adapters train, counted on models without memory.

    >>> for row in parameter_table(GPTConfig()):                # GPT-2 small
    ...     print(f"{row.method:<24}{row.trainable:>12,}{row.trainable / row.total:>9.2%}")
    full                     124,439,808  100.00%
    LoRA                         294,912    0.24%
    adapters                   2,379,264    1.88%
    adapters + layer norms     2,417,664    1.91%
    """
    rows = []
    with torch.device("meta"):
        for method in ("full", "LoRA", "adapters", "adapters + layer norms"):
            model = GPT(config)
            if method == "LoRA":
                lora.adapt(model, rank=rank, targets=targets)
            elif method != "full":
                adapt(model, width=width, layer_norms=method.endswith("norms"))
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            trainable = sum(size for size, trained in sizes if trained)
            rows.append(Row(method, trainable, sum(size for size, _ in sizes)))
    return rows


def _own(model: GPT, config: AdapterConfig) -> dict[str, nn.Parameter]:
    """The parameters that belong to the adapters, by the names under which they are saved."""
    marks = (*(f".{point}." for point in POINTS), *([".ln_"] if config.layer_norms else []))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(mark in f".{name}" for mark in marks)
    }
