"""Step 17: what a chat drives. Messages in, token ids out; the cache is kept from turn to turn.

A turn's prompt is the last turn's prompt, its reply, and something new. The engine finds how much
of it the cache already holds and computes only the rest.

Before: trace.py.  After: nothing.  Twin: hf_bridge/engine.py.  Proof: tests/test_engine.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch

from minigpt import adapters
from minigpt.cache import Cache
from minigpt.generate import stream
from minigpt.model import GPT
from minigpt.tokenizer import StreamDecoder, Tokenizer

ROLES = {"system": "", "user": "User: ", "assistant": "Assistant: "}


class Engine:
    """One model, its tokenizer and one conversation's cache.

    `stop` are texts that end a reply besides the end token; `reused` says how many tokens of the
    last prompt the cache already held. Streams may overlap: the cache belongs to one at a time,
    another starts from an empty one.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str):
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer's {len(tokenizer)} tokens do not fit "
                f"the model's vocabulary of {model.config.vocab_size}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.context_length = model.config.n_positions
        self.stop: tuple[str, ...] = () if tokenizer.chat_template else ("\nUser:", "\nAssistant:")
        self.reused = 0
        self._cache: Cache | None = None
        self._ids: list[int] = []  # what was last streamed; the cache holds the first of these

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        sliding_window: int | None = None,
        attention_sinks: int = 0,
        adapter: str | Path | None = None,
    ) -> "Engine":
        """Load model and tokenizer; by default onto a GPU if there is one, else in float32.

        `adapter` is a directory with LoRA or bottleneck adapters, to load onto the model.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        model = GPT.from_pretrained(
            name_or_path,
            dtype=dtype,
            device=device,
            sliding_window=sliding_window,
            attention_sinks=attention_sinks,
        )
        if adapter is not None:
            adapters.load_either(model, adapter, base_model=str(name_or_path))
        return cls(model, Tokenizer.from_pretrained(name_or_path), str(name_or_path))

    def encode(self, text: str) -> list[int]:
        """Text -> ids; what looks like a special token in it stays text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder for one reply: feed(id) -> text, flush() -> the rest."""
        return StreamDecoder(self.tokenizer, skip_special_tokens=True)

    def render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages (role, content) -> ids of a prompt that ends where the assistant is to speak.

        By the model's own chat template, or as a plain transcript if it has none.
        """
        template = self.tokenizer.chat_template
        if template is None:
            return self.encode(transcript(messages))
        # A message must not become a special token, alone or with what the template puts beside it:
        # letters that begin or end one are exchanged for letters that no message holds (the first
        # are lone surrogates: no valid text holds them), and put back in the plain text afterwards.
        special = self.tokenizer.special_tokens
        edges = {ord(letter) for token in special for letter in (token[0], token[-1])}
        taken = set("".join(message["content"] for message in messages))
        free = (code for code in range(0xD800, 0x110000) if chr(code) not in taken)
        hidden = {edge: next(free) for edge in edges}
        shown = {code: edge for edge, code in hidden.items()}
        guarded = [{**m, "content": m["content"].translate(hidden)} for m in messages]
        text = render_template(template, guarded, eos_token=self.tokenizer.eos_token or "")
        ids: list[int] = []
        for piece in self.tokenizer.split_special(text):
            ids += [special[piece]] if piece in special else self.encode(piece.translate(shown))
        return ids

    def stream(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Continue ids token by token, up to but without the end token; closing it stops the model.

        The same seed gives the same reply; None draws a new one. Errors as in generate.stream.
        """
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number of 0 or more, below 2**63, got {seed}")
        generator = torch.Generator(self.model.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        prompt = torch.tensor([list(ids)], dtype=torch.int64, device=self.model.device)  # (1, T)
        self.model.check_ids(prompt)
        cache, self._cache = self._cache, None
        self.reused = 0
        if cache is not None:
            self.reused = _common_prefix(self._ids[: cache.length], ids[:-1])
        if cache is None or not cache.truncate(self.reused):
            cache, self.reused = self.model.new_cache(), 0
        try:
            tokens = stream(
                self.model,
                prompt,
                cache=cache,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                generator=generator,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        except ValueError:  # nothing was computed: the cache holds what it held
            self._cache = cache
            raise
        return self._give(tokens, cache, list(ids))

    def _give(self, tokens: Iterator[int], cache: Cache, ids: list[int]) -> Iterator[int]:
        with suppress(GeneratorExit):  # closed between two tokens: the cache is whole
            for token in tokens:
                ids.append(token)
                if token == self.tokenizer.eos_token_id:
                    break
                yield token
        self._cache, self._ids = cache, ids


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    r"""A conversation as plain text, for models that know no chat template.

    >>> transcript([{"role": "user", "content": "Hi"}])
    'User: Hi\nAssistant:'
    """
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {message['role']!r}")
    lines = [ROLES[message["role"]] + message["content"] for message in messages]
    return "\n".join([*lines, "Assistant:"])


def render_template(
    template: str, messages: Sequence[Mapping[str, str]], *, eos_token: str = ""
) -> str:
    """Fill in a Jinja chat template as transformers does: sandboxed, since it comes with the model.

    >>> render_template("{% for m in messages %}[{{ m.content }}]{% endfor %}", [{"content": "Hi"}])
    '[Hi]'
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
        return json.dumps(x, sort_keys=sort_keys, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    # {% generation %} marks what a training counts; in a prompt it is a scope like {% with %}.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})", r"\1with", template)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            eos_token=eos_token,
            bos_token=eos_token,
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"the model's chat template is no valid Jinja: {error}") from error
    except Exception as error:  # a template is a program, and fails like one
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
