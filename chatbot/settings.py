"""How replies are drawn: the names that everybody uses, their ranges, and where defaults come from.

    flags  before  the model's generation_config.json  before  the defaults below

Proof: tests/test_conversation.py, tests/test_chatbot_cli.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from chatbot.texts import ChatError

# name: (kind, what it accepts, the text that says so)
RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (float, lambda x: math.isfinite(x) and x >= 0, "rule_from_zero"),
    "top_k": (int, lambda x: x >= 0, "rule_count_or_off"),
    "top_p": (float, lambda x: 0 < x <= 1, "rule_above_zero_to_one"),
    "min_p": (float, lambda x: 0 <= x <= 1, "rule_zero_to_one"),
    "repetition_penalty": (float, lambda x: math.isfinite(x) and x > 0, "rule_above_zero"),
    "max_new_tokens": (int, lambda x: x >= 1, "rule_count"),
    "seed": (int, lambda x: 0 <= x < 2**63, "rule_seed"),
    "sliding_window": (int, lambda x: x >= 1, "rule_count"),
    "attention_sinks": (int, lambda x: x >= 0, "rule_count_or_off"),
}


@dataclass(frozen=True)
class Settings:
    """What engine.stream is told; names and meanings as in transformers' GenerationConfig."""

    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None  # None: another reply each time

    @property
    def repeatable(self) -> bool:
        """Whether the same prompt gives the same reply again."""
        return self.temperature == 0 or self.seed is not None

    def set(self, name: str, value: Any) -> "Settings":
        """A copy in which one setting is another."""
        return replace(self, **{name: value})


NAMES = tuple(field.name for field in fields(Settings))


def parse(name: str, text: str) -> Any:
    """A setting as a person writes it -> its value; ChatError if it is outside its range.

    A seed may be "off".

    >>> parse("top_p", "0.9")
    0.9
    >>> parse("top_p", "1.5")
    Traceback (most recent call last):
    chatbot.texts.ChatError: top_p must be in (0, 1], got 1.5
    """
    kind, accepts, rule = RULES[name]
    if name == "seed" and text == "off":
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise ChatError(rule, name=name, got=text)
    return value


def from_generation_config(published: Mapping[str, Any]) -> Settings:
    """The settings that a generation_config.json advises; what it leaves open keeps our default.

    It says `do_sample` to choose between greedy (temperature 0) and drawing from the whole
    distribution. Raises ChatError for a value outside its range.

    >>> from_generation_config({"do_sample": False, "max_new_tokens": 99}).temperature
    0
    >>> from_generation_config({"do_sample": True, "top_k": 20}).top_p
    1.0
    """
    settings = Settings()
    if published.get("do_sample") is True:
        settings = replace(settings, temperature=1.0, top_p=1.0)
    for name in NAMES:
        value = published.get(name)
        if value is not None and name != "seed":
            kind = RULES[name][0]
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            settings = settings.set(name, parse(name, str(value) if number else repr(value)))
    return settings.set("temperature", 0) if published.get("do_sample") is False else settings
