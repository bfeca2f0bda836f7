"""A deeper model that computes, to begin with, what the shallower one did.

    layers 0 1 2 3  ->  0 1 1' 2 2' 3

A copy stands behind its layer, but writes nothing: its two output projections are zero. They are
the first that training moves, and what the copy has to say is there already. A small model learns
fast and is soon full; grown, it goes on where it was (Chen et al. 2016, Net2Net).

Proof: tests/test_tutor.py.
"""

from dataclasses import replace

import torch

from minigpt import GPT


@torch.no_grad()
def grow(model: GPT, n_layer: int) -> GPT:
    """The same function in `n_layer` layers, the added ones in the middle.

    Raises ValueError for fewer layers than it has, or more than twice as many.
    """
    have = model.config.n_layer
    if not have <= n_layer <= 2 * have:
        raise ValueError(
            f"a model of {have} layers can have {have} to {2 * have} of them, got {n_layer}"
        )
    first = (2 * have - n_layer) // 2  # of those that get a copy
    sources = sorted([*range(have), *range(first, first + n_layer - have)])
    grown = GPT(replace(model.config, n_layer=n_layer)).to(model.wte.weight)
    outside = {k: v for k, v in model.state_dict().items() if not k.startswith("h.")}
    grown.load_state_dict(outside, strict=False)
    for layer, (block, source) in enumerate(zip(grown.h, sources, strict=True)):
        block.load_state_dict(model.h[source].state_dict())
        if source in sources[:layer]:
            for name, weight in block.named_parameters():
                if "c_proj" in name:
                    weight.zero_()
    return grown
