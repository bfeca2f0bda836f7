"""Step 12 without a library: bottleneck adapters inside GPT2LMHeadModel.

peft has none, and AdapterHub's `adapters` asks for transformers 4. But GPT2Attention and GPT2MLP
each end in a dropout module, as the halves of minigpt's block do: adapters come in at the same
points, under the same names, and either side's files load in the other.

Before: lora.py.  After: data.py.  Twin: minigpt/adapters.py.  Proof: tests/test_adapters.py.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_bridge import lora, peft_files
from hf_bridge.config import GPTConfig
from hf_bridge.files import WeightsError, read_json, writing
from hf_bridge.model import GPT
from hf_bridge.peft_files import check, check_base, name_elsewhere

CONFIG, WEIGHTS = "bottleneck_config.json", "bottleneck_model.safetensors"
BASE = "base_model_name_or_path"  # as peft calls it
POINTS = ("attn.resid_dropout", "mlp.dropout")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is besides its weights; `layer_norms`: the model's norms belong to it too."""

    width: int = 64
    layer_norms: bool = False

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise ValueError(f"width must be a whole number of at least 1, got {self.width!r}")


class Adapter(nn.Module):
    """y + up(gelu(down(y))), where y is what the wrapped dropout gives: (B, T, C) -> (B, T, C)."""

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
        self.dropout, self.act = dropout, ACT2FN["gelu_new"]
        self.down = nn.utils.skip_init(nn.Linear, n_embd, config.width)
        self.up = nn.utils.skip_init(nn.Linear, config.width, n_embd)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, 0.0, 0.01, -0.02, 0.02, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(x)
        correction = self.up(self.act(self.down(y.to(self.down.weight.dtype))))
        return (y + correction).to(y.dtype)


def adapt(
    model: GPT,
    *,
    width: int = 64,
    layer_norms: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Freeze the model and put two adapters into each block: they train, and nothing else.

    The same generator gives the same weights as in minigpt.
    """
    config = AdapterConfig(width, layer_norms)
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has bottleneck adapters already")
    model.hf.requires_grad_(False)
    wte = model.hf.transformer.wte.weight
    dtype = torch.float64 if wte.dtype == torch.float64 else torch.float32
    for block in model.hf.transformer.h:
        for point in POINTS:
            dropout = block.get_submodule(point)
            adapter = Adapter(dropout, model.config.n_embd, config, generator=generator)
            block.set_submodule(point, adapter.to(wte.device, dtype).train(model.training))
    for parameter in _own(model, config).values():
        parameter.requires_grad_(True)


def save(model: GPT, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapters, and the layer norms if they are theirs, as safetensors with a config."""
    config = next((m.config for m in model.modules() if isinstance(m, Adapter)), None)
    if config is None:
        raise ValueError("the model has no bottleneck adapters: adapt it or load some first")
    tensors = {name: p.detach().contiguous() for name, p in _own(model, config).items()}
    check(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    settings = json.dumps(
        {**asdict(config), BASE: name_elsewhere(base_model)}, indent=2, ensure_ascii=False
    )
    with writing(Path(folder)) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(settings + "\n", "utf-8")


def load(
    model: GPT,
    folder: str | Path,
    *,
    trainable: bool = False,
    base_model: str | None = None,
) -> None:
    """Read what `save` wrote; the adapters train only if `trainable`. Errors as in minigpt."""
    folder = Path(folder)
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise WeightsError(f"{path} is missing: {folder} holds no bottleneck adapters")
    try:
        settings = {BASE: None, **read_json(folder / CONFIG)}
        made_for = settings.pop(BASE)
        config = AdapterConfig(**settings)
        tensors = load_file(folder / WEIGHTS)
        with torch.device("meta"):
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
    """What full fine-tuning, LoRA and adapters train, counted on models without memory."""
    rows = []
    with torch.device("meta"):
        for method in ("full", "LoRA", "adapters", "adapters + layer norms"):
            model = GPT(config)
            if method == "LoRA":
                lora.adapt(model, rank=rank, targets=targets)
            elif method != "full":
                adapt(model, width=width, layer_norms=method.endswith("norms"))
            parameters = list(model.parameters())
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            rows.append(Row(method, trainable, sum(p.numel() for p in parameters)))
    return rows


def _own(model: GPT, config: AdapterConfig) -> dict[str, nn.Parameter]:
    """The parameters that belong to the adapters, by the names under which they are saved."""
    marks = (*(f".{point}." for point in POINTS), *([".ln_"] if config.layer_norms else []))
    return {
        name: parameter
        for name, parameter in model.hf.transformer.named_parameters()
        if any(mark in f".{name}" for mark in marks)
    }
