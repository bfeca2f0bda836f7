"""The same steps through transformers: the same file names, the same calls.

    from minigpt import GPT, GPTConfig, Tokenizer, generate, stream
    from hf_bridge import GPT, GPTConfig, Tokenizer, generate, stream  # and all else still runs

Each file says what the library does and where it differs from minigpt's file of the same name; the
letters of the shapes are minigpt's. Nothing here imports minigpt, nor minigpt this.
"""

import logging

from hf_bridge.cache import ContextOverflow
from hf_bridge.config import GPTConfig
from hf_bridge.files import WeightsError
from hf_bridge.generate import generate, stream
from hf_bridge.model import GPT
from hf_bridge.tokenizer import Tokenizer

__all__ = [
    "GPT",
    "ContextOverflow",
    "GPTConfig",
    "Tokenizer",
    "WeightsError",
    "generate",
    "stream",
]

# It reports a missing optional kernel at every import, and each int8 product's cast to float16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
