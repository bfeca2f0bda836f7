"""GPT-2 rebuilt in plain PyTorch, one idea per file.

Letters, everywhere in this repository:
    B batch   T tokens in this call   S tokens seen so far, these included
    H heads   D head size   C = H * D width   L layers
    V vocabulary   P longest context   R LoRA rank   W sliding window

Read in this order: config, tokenizer, mask, attention, cache, model, weights, sampler, generate,
quant, lora, adapters, data, train, metrics, trace, engine.

Beside the steps: files (where a model is and how it is written), __main__ (the command line).
"""

from minigpt.cache import ContextOverflow
from minigpt.config import GPTConfig
from minigpt.files import WeightsError
from minigpt.generate import generate, stream
from minigpt.model import GPT
from minigpt.tokenizer import Tokenizer

__all__ = [
    "GPT",
    "ContextOverflow",
    "GPTConfig",
    "Tokenizer",
    "WeightsError",
    "generate",
    "stream",
]
