"""Muon against the decomposition that it avoids, and against torch's in the Trainer."""

import dataclasses

import pytest
import torch
from test_train import CONFIG, EXACT, HF, batches, differences, new_model, weights
from torch import Tensor

import hf_bridge.train
from minigpt import lora, muon
from minigpt.muon import Muon, orthogonalize
from minigpt.train import train

MUON = dataclasses.replace(CONFIG, optim="muon")


def theirs(folder) -> tuple[list[dict], HF]:
    new_model().double().save_pretrained(folder)
    hf = HF.from_pretrained(folder)
    config = hf_bridge.train.TrainConfig(**dataclasses.asdict(MUON))
    return hf_bridge.train.train(hf, batches, config, progress=False), hf


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], HF]:
    """The Trainer with torch's Muon, which computes in bfloat16: here in float64 instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", Tensor.double)
        return theirs(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8), (1, 5)])
def test_an_update_turns_all_directions_alike(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    matrix[:, 0] *= 10
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.mT @ orthogonalize(matrix) @ right.mT  # diagonal, if it has the same directions
    sizes = turned.diag()
    assert (turned - sizes.diag()).abs().max() < 1e-9
    assert sizes.min() > 0.65
    assert sizes.max() < 1.25


def test_no_gradient_is_no_update():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_thirty_steps_have_the_losses_of_torchs_muon_in_the_trainer(exact):
    model = new_model().double()
    records = train(model, batches, MUON, progress=False)
    assert differences(records, exact[0]) <= EXACT
    assert (model.wte.weight - exact[1].hf.transformer.wte.weight).abs().max() <= EXACT
    assert records[-1]["loss"] < records[0]["loss"]


def test_bfloat16_costs_the_bridge_little(exact, tmp_path):
    records, _ = theirs(tmp_path)
    assert 0 < differences(records, exact[0]) < 1e-3


def plain_mean(self, p, grad, rate, weight_decay):
    """As Muon's, without the look ahead."""
    mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(grad, 1 - self.momentum)
    p.mul_(1 - rate * weight_decay)
    p.sub_(orthogonalize(mean), alpha=rate * 0.2 * max(p.shape) ** 0.5)


MISTAKES = {
    "no look ahead": (Muon, "_turn", plain_mean),
    "a round less": (muon, "ROUNDS", 4),
    "another polynomial": (muon, "C", 2.0),
    "the gradient as it is": (muon, "orthogonalize", lambda matrix: matrix / matrix.norm()),
    "AdamW": (Muon, "step", torch.optim.AdamW.step),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_with_torchs_muon_notices(mistake, exact, monkeypatch):
    monkeypatch.setattr(*MISTAKES[mistake])
    records = train(new_model().double(), batches, MUON, progress=False)
    assert differences(records, exact[0]) > 1000 * EXACT


def test_lora_learns_by_muon_and_nothing_else_moves():
    model = new_model()
    before = weights(model)
    lora.adapt(model, rank=2)
    records = train(model, lambda i: batches(i % 2), MUON, progress=False)
    assert records[-1]["loss"] < records[0]["loss"]
    kept = [p.detach().flatten() for p in model.parameters() if not p.requires_grad]
    assert torch.equal(torch.cat(kept).sort().values, before.sort().values)


def test_only_matrices_are_turned():
    bias = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Muon turns matrices, got a parameter of \(3,\)"):
        Muon([{"params": [bias]}, {"params": []}])
