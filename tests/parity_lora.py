"""Checks of LoRA against peft, and of adapters: used by the tests, and by the teeth on broken code.

Each check loads the models of a Base anew and fails by AssertionError. A and B are drawn wide: with
B = 0, as LoRA starts, nothing would be proved.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parity import Pair, assert_close, new_pair, small_config
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from minigpt import GPT, adapters, lora

TRAINED = 1e-8  # after 20 steps, each of which enlarges what rounding changed
EVERYWHERE = ("c_attn", "c_proj", "c_fc")


@dataclass
class Base:
    """A checkpoint without dropout of its own; both sides of it, fresh at every call."""

    folder: Path

    def pair(self, dtype: torch.dtype = torch.float64) -> Pair:
        """Ours and transformers', in eval mode."""
        theirs = GPT2LMHeadModel.from_pretrained(self.folder, dtype=dtype)
        return Pair(GPT.from_pretrained(self.folder, dtype=dtype), theirs.eval(), self.folder)


def new_base(folder: Path, **changes: Any) -> Base:
    """Save one."""
    config = small_config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **changes)
    return Base(new_pair(folder, config).folder)


def peft_of(model: GPT2LMHeadModel, **settings: Any) -> PeftModel:
    """The adapter that lora.adapt makes of these settings, by peft."""
    settings = {"rank": 8, "alpha": 16, "targets": ("c_attn",), **settings}
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=list(settings["targets"]),
            lora_dropout=settings.get("dropout", 0.0),
            use_rslora=settings.get("rslora", False),
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
    )
    return adapted.train(False)  # peft's new adapters are in train mode whatever the model is in


def adapted_pair(
    base: Base, dtype: torch.dtype = torch.float64, wide: bool = True, **settings: Any
) -> Pair:
    """Both sides adapted, with the same A and B; `wide` False leaves B at zero."""
    pair = base.pair(dtype)
    lora.adapt(pair.ours, **settings)
    pair.theirs = peft_of(pair.theirs, **settings)
    generator = torch.Generator().manual_seed(0)
    corrections = dict(low_ranks(pair.ours))
    layers = {n: m for n, m in pair.theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {f"transformer.{name}" for name in corrections} == set(layers)
    for name, ours in corrections.items():
        theirs = layers[f"transformer.{name}"]
        A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        with torch.no_grad():
            A.normal_(std=0.2, generator=generator)
            if wide:
                B.normal_(std=0.2, generator=generator)
            if name.endswith("c_attn"):
                thirds = zip("qkv", B.chunk(3))  # q, k and v, as transformers splits them
                for _, third in (t for t in thirds if t[0] not in settings.get("qkv", "qkv")):
                    third.zero_()
        ours.fill(A, B)
    return pair


def low_ranks(model: GPT) -> Iterator[tuple[str, nn.Module]]:
    """Every correction with its layer's name."""
    for name, module in model.named_modules():
        if isinstance(module, lora.LoRALinear):
            yield name, module.adapters["default"]


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The usual one: each position predicts the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@contextmanager
def no_warnings() -> Iterator[None]:
    """Every warning an error, but for one that peft itself provokes in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


@torch.no_grad()
def check_outputs(base: Base, **settings: Any) -> None:
    """The same logits, and not the base's."""
    pair = adapted_pair(base, **settings)
    ids = pair.ids(B=2)
    expected = pair.expected(ids)
    assert_close(pair.ours(ids), expected)
    lora.activate(pair.ours, None)
    assert (pair.ours(ids) - expected).abs().max() > 0.01


def check_seed(base: Base, **settings: Any) -> None:
    """The same seed draws the same A, bit for bit."""
    ours, theirs = base.pair(torch.float32).ours, base.pair(torch.float32).theirs
    lora.adapt(ours, generator=torch.Generator().manual_seed(3), **settings)
    torch.manual_seed(3)
    theirs = peft_of(theirs, **settings)
    expected = [p for name, p in theirs.named_parameters() if "lora_A" in name]
    got = [correction.lora_A for _, correction in low_ranks(ours)]
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def check_merge(base: Base, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
    """Merged weights are merge_and_unload's, bit for bit, and those of a plain model."""
    pair = adapted_pair(base, dtype, **settings)
    lora.merge(pair.ours)
    merged = pair.theirs.merge_and_unload().transformer.state_dict()
    ours = pair.ours.state_dict()
    assert ours.keys() == merged.keys()
    different = [name for name in merged if not torch.equal(ours[name], merged[name])]
    assert not different, f"not equal bit for bit: {different}"


def check_training(base: Base, steps: int = 20, dropout: float = 0.0, **settings: Any) -> None:
    """From the same start, AdamW leads both to the same A and B; with dropout, too."""
    pair = adapted_pair(base, wide=False, dropout=dropout, **settings)
    if settings.get("qkv", "qkv") != "qkv":
        raise ValueError("peft trains all of c_attn")
    ids = pair.ids(B=2)
    for model in (pair.ours.train(), pair.theirs.train()):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
        torch.manual_seed(1)
        for _ in range(steps):
            logits = model(ids) if model is pair.ours else model(ids, torch.ones_like(ids)).logits
            optimizer.zero_grad()
            loss_of(logits, ids).backward()
            optimizer.step()
    layers = dict(pair.theirs.base_model.model.named_modules())
    for name, ours in low_ranks(pair.ours):
        theirs = layers[f"transformer.{name}"]
        assert_close(ours.lora_A, theirs.lora_A["default"].weight, TRAINED)
        assert_close(ours.lora_B, theirs.lora_B["default"].weight, TRAINED)
        assert theirs.lora_B["default"].weight.abs().max() > 0.01, "nothing was learned"


@torch.no_grad()
def check_files(base: Base, folder: Path, **settings: Any) -> None:
    """What either side saves, the other loads: the same logits, and not a warning."""
    pair, fresh = adapted_pair(base, **settings), base.pair()
    ids = pair.ids(B=2)
    expected = pair.expected(ids)
    lora.save(pair.ours, folder / "ours", base_model="org/base")
    with no_warnings():
        theirs = PeftModel.from_pretrained(fresh.theirs, folder / "ours")
    assert_close(theirs(ids, torch.ones_like(ids)).logits, expected)
    pair.theirs.save_pretrained(folder / "theirs")
    lora.load(fresh.ours, folder / "theirs")
    assert_close(fresh.ours(ids), expected)


def wide_adapters(model: GPT, **settings: Any) -> list[adapters.Adapter]:
    """Bottleneck adapters that change much, in the order of the model."""
    adapters.adapt(model, **settings)
    found = [module for module in model.modules() if isinstance(module, adapters.Adapter)]
    generator = torch.Generator().manual_seed(0)
    for adapter in found:
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return found


@torch.no_grad()
def check_adapters(base: Base) -> None:
    """Adapters are the paper's equation at the outputs of transformers' attention and MLP."""
    pair = base.pair()
    ids = pair.ids(B=2)
    before = pair.expected(ids)
    found = iter(wide_adapters(pair.ours, width=5))

    def after(sublayer: nn.Module, adapter: adapters.Adapter) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            hidden = y @ adapter.down.weight.T + adapter.down.bias
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            gelu = 0.5 * hidden * (1 + torch.tanh(inner))
            y = y + gelu @ adapter.up.weight.T + adapter.up.bias
            return (y, *output[1:]) if isinstance(output, tuple) else y

        sublayer.register_forward_hook(hook)

    for block in pair.theirs.transformer.h:
        after(block.attn, next(found))
        after(block.mlp, next(found))
    expected = pair.expected(ids)
    assert (expected - before).abs().max() > 0.01
    assert_close(pair.ours(ids), expected)
