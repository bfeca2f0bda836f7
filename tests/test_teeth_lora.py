"""The checks of LoRA and adapters bite: each classic mistake, made on purpose, is caught by one.

A mistake changes a function of minigpt for the length of a test.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_lora import (
    Base,
    check_adapters,
    check_files,
    check_merge,
    check_outputs,
    check_seed,
    check_training,
    new_base,
)
from torch import Tensor, nn

from minigpt import adapters, lora, low_rank, peft_files
from minigpt.adapters import Adapter
from minigpt.low_rank import LoRAConfig, LoRALinear, LowRank

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower in two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return new_base(tmp_path_factory.mktemp("base"))


def alpha_not_divided_by_the_rank(patch: Patch) -> None:
    patch.setattr(LoRAConfig, "scale", property(lambda self: self.alpha))


def rank_stabilized_scale_without_the_root(patch: Patch) -> None:
    patch.setattr(LoRAConfig, "scale", property(lambda self: self.alpha / self.rank))


def root_in_every_scale(patch: Patch) -> None:
    patch.setattr(LoRAConfig, "scale", property(lambda self: self.alpha / math.sqrt(self.rank)))


def scale_applied_twice(patch: Patch) -> None:
    forward = LowRank.forward
    patch.setattr(LowRank, "forward", lambda self, x: forward(self, x) * self.config.scale)


def delta_transposed(patch: Patch) -> None:
    delta = LowRank.delta
    patch.setattr(LowRank, "delta", lambda self: delta(self).T)


def delta_not_scaled(patch: Patch) -> None:
    patch.setattr(LowRank, "delta", lambda self: self.full_B() @ self.lora_A)


def merged_twice(patch: Patch) -> None:
    delta = LowRank.delta
    patch.setattr(LowRank, "delta", lambda self: 2 * delta(self))


def bias_lost_in_merging(patch: Patch) -> None:
    merged = LoRALinear.merged

    def without_bias(self: LoRALinear) -> nn.Module:
        layer = merged(self)
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
        return layer

    patch.setattr(LoRALinear, "merged", without_bias)


def dropout_at_inference(patch: Patch) -> None:
    def forward(self: LowRank, x: Tensor) -> Tensor:
        x = F.dropout(x, self.config.dropout, training=True)
        return F.linear(F.linear(x, self.lora_A), self.full_B()) * self.config.scale

    patch.setattr(LowRank, "forward", forward)


def dropout_on_the_sum(patch: Patch) -> None:
    def forward(self: LowRank, x: Tensor) -> Tensor:
        out = F.linear(F.linear(x, self.lora_A), self.full_B()) * self.config.scale
        return F.dropout(out, self.config.dropout, self.training)

    patch.setattr(LowRank, "forward", forward)


def a_and_b_swapped(patch: Patch) -> None:
    def forward(self: LowRank, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_B), self.lora_A) * self.config.scale

    patch.setattr(LowRank, "forward", forward)


def a_and_b_swapped_in_the_file(patch: Patch) -> None:
    write = peft_files.write

    def swapped(folder: Path, settings: Any, tensors: dict[str, Tensor], name: str | None) -> None:
        other = {"A": "B", "B": "A"}
        write(folder, settings, {key[:-1] + other[key[-1]]: t for key, t in tensors.items()}, name)

    patch.setattr(peft_files, "write", swapped)


def keys_taken_for_queries(patch: Patch) -> None:
    patch.setattr(low_rank, "THIRDS", "kqv")


def thirds_interleaved(patch: Patch) -> None:
    def rows_of(out_features: int, qkv: str) -> Tensor | None:
        rows = torch.arange(out_features)
        return rows[sum((rows % 3 == "qkv".index(letter)) for letter in qkv).bool()]

    patch.setattr(lora, "rows_of", rows_of)


def choice_of_q_k_and_v_ignored(patch: Patch) -> None:
    def full_B(self: LowRank) -> Tensor:
        return self.lora_B.repeat(3, 1)[: self.out_features]

    patch.setattr(LowRank, "full_B", full_B)


def base_still_trains(patch: Patch) -> None:
    attach = lora._attach

    def unfrozen(*arguments: Any) -> dict[str, LowRank]:
        added = attach(*arguments)
        arguments[0].requires_grad_(True)
        return added

    patch.setattr(lora, "_attach", unfrozen)


def a_is_frozen(patch: Patch) -> None:
    add = LoRALinear.add

    def frozen(self: LoRALinear, *arguments: Any, **settings: Any) -> LowRank:
        adapter = add(self, *arguments, **settings)
        adapter.lora_A.requires_grad_(False)
        return adapter

    patch.setattr(LoRALinear, "add", frozen)


def kaiming_with_the_gain_of_relu(patch: Patch) -> None:
    patch.setattr(low_rank, "math", SimpleNamespace(sqrt=lambda x: 0.0, inf=math.inf))


def a_drawn_once(patch: Patch) -> None:
    init = LowRank.__init__

    def once(self: LowRank, *sizes: Any, rows: Tensor | None, generator: torch.Generator) -> None:
        before = generator.get_state()
        init(self, *sizes, rows=rows, generator=generator)
        generator.set_state(before)
        nn.init.kaiming_uniform_(self.lora_A.data, a=math.sqrt(5), generator=generator)

    patch.setattr(LowRank, "__init__", once)


def prefix_left_out_of_the_file(patch: Patch) -> None:
    patch.setattr(peft_files, "PREFIX", "transformer.")


def rank_stabilization_left_out_of_the_file(patch: Patch) -> None:
    names = {ours: theirs for ours, theirs in peft_files.NAMES.items() if ours != "rslora"}
    patch.setattr(peft_files, "NAMES", names)


def file_without_the_scale(patch: Patch) -> None:
    write = peft_files.write

    def without(folder: Path, settings: Any, tensors: dict[str, Tensor], name: str | None) -> None:
        write(folder, {**settings, "alpha": settings["rank"]}, tensors, name)

    patch.setattr(peft_files, "write", without)


def adapter_without_its_own_sum(patch: Patch) -> None:
    forward = Adapter.forward
    patch.setattr(Adapter, "forward", lambda self, x: forward(self, x) - x)


def adapter_with_exact_gelu(patch: Patch) -> None:
    patch.setattr(adapters, "F", SimpleNamespace(gelu=lambda x, approximate: F.gelu(x)))


def adapter_after_the_mlp_only(patch: Patch) -> None:
    first = iter([True, False] * 100)
    forward = Adapter.forward
    patch.setattr(Adapter, "forward", lambda self, x: x if next(first) else forward(self, x))


Check = Callable[..., None]
ONE_SQUARE = {"targets": ("attn.c_proj",), "rank": 48}  # where no shape betrays a transposition
MISTAKES: list[tuple[Callable[[Patch], None], Check]] = [
    (alpha_not_divided_by_the_rank, check_outputs),
    (rank_stabilized_scale_without_the_root, partial(check_outputs, rslora=True)),
    (root_in_every_scale, check_outputs),
    (scale_applied_twice, check_outputs),
    (delta_transposed, partial(check_merge, **ONE_SQUARE)),
    (delta_not_scaled, check_merge),
    (merged_twice, check_merge),
    (bias_lost_in_merging, check_merge),
    (dropout_at_inference, partial(check_outputs, dropout=0.5)),
    (dropout_on_the_sum, partial(check_training, steps=2, dropout=0.5)),
    (a_and_b_swapped, partial(check_outputs, **ONE_SQUARE)),
    (a_and_b_swapped_in_the_file, partial(check_files, **ONE_SQUARE)),
    (keys_taken_for_queries, partial(check_outputs, qkv="qv")),
    (thirds_interleaved, partial(check_outputs, qkv="qv")),
    (choice_of_q_k_and_v_ignored, partial(check_outputs, qkv="q")),
    (base_still_trains, partial(check_training, steps=2)),
    (a_is_frozen, partial(check_training, steps=2)),
    (kaiming_with_the_gain_of_relu, check_seed),
    (a_drawn_once, check_seed),
    (prefix_left_out_of_the_file, check_files),
    (rank_stabilization_left_out_of_the_file, partial(check_files, rslora=True)),
    (file_without_the_scale, check_files),
    (adapter_without_its_own_sum, check_adapters),
    (adapter_with_exact_gelu, check_adapters),
    (adapter_after_the_mlp_only, check_adapters),
]


@pytest.mark.parametrize(("mistake", "check"), MISTAKES, ids=[m.__name__ for m, _ in MISTAKES])
def test_the_mistake_is_caught(
    base: Base,
    tmp_path: Path,
    monkeypatch: Patch,
    mistake: Callable[[Patch], None],
    check: Check,
) -> None:
    files = (tmp_path,) if getattr(check, "func", check) is check_files else ()
    mistake(monkeypatch)
    with pytest.raises((AssertionError, UserWarning)):  # peft's warnings are errors in the checks
        check(base, *files)
