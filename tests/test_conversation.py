"""The chat without a terminal: what fits, what leaves, what is kept."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest

from chatbot import storage
from chatbot.conversation import Conversation
from chatbot.engines import generation_config, open_engine
from chatbot.reply import StopFilter, Turn
from chatbot.settings import Settings, from_generation_config, parse
from chatbot.texts import TEXTS, ChatError


class Letters:
    """A decoder of one letter a token."""

    def feed(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


@dataclass
class Scripted:
    """An engine whose tokens are letters and whose replies are written down beforehand."""

    replies: list[str]
    context_length: int = 60
    name: str = "scripted"
    stop: tuple[str, ...] = ()
    reused: int = 0
    prompts: list[str] = field(default_factory=list)
    steps: int = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def stream_decoder(self) -> Letters:
        return Letters()

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:")

    def stream(self, ids: Sequence[int], *, max_new_tokens: int, **_: object) -> Iterator[int]:
        self.prompts.append(self.decode(ids))
        for letter in self.replies.pop(0)[:max_new_tokens]:
            self.steps += 1
            yield ord(letter)


def talk(engine: Scripted, *, system: str = "", max_new_tokens: int = 10) -> Conversation:
    return Conversation(engine, Settings(max_new_tokens=max_new_tokens), system=system)


def test_each_turn_is_rendered_after_those_before() -> None:
    engine = Scripted(["one", "two"])
    conversation = talk(engine, system="S")
    assert "".join(conversation.reply("hi")) == "one"
    assert "".join(conversation.reply("again")) == "two"
    assert engine.prompts == ["s:S;u:hi;a:", "s:S;u:hi;a:one;u:again;a:"]


def test_whole_turns_leave_and_the_system_prompt_stays() -> None:
    engine = Scripted(["x" * 8] * 6)
    conversation = talk(engine, system="rule")
    left = []
    for number in range(6):
        reply = conversation.reply(f"message {number}")
        left.append(reply.left)
        list(reply)
        assert engine.prompts[-1].startswith("s:rule;u:message ")
        assert len(engine.prompts[-1]) + conversation.room <= engine.context_length
    assert sum(left) == conversation.first > 0
    assert len(conversation.turns) == 6


def test_a_message_that_cannot_fit_changes_nothing() -> None:
    engine = Scripted(["ok"])
    conversation = talk(engine)
    list(conversation.reply("hi"))
    with pytest.raises(ChatError, match="the message has 99 tokens, but 45 fit: shorten it"):
        conversation.reply("x" * 99)
    assert [turn.user for turn in conversation.turns] == ["hi"]


def test_a_system_prompt_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ChatError, match="the system prompt has 99 tokens, but"):
        talk(Scripted([]), system="x" * 99)


def test_an_interrupted_reply_keeps_what_came_and_stops_the_model() -> None:
    engine = Scripted(["abcdefgh"])
    reply = talk(engine).reply("hi")
    pieces = list(islice(reply, 3))
    reply.close()
    assert pieces == ["a", "b", "c"]
    assert reply.turn.assistant == "abc"
    assert reply.end == "interrupted"
    assert engine.steps == 3


@pytest.mark.parametrize(
    ("text", "limit", "end", "shown"),
    [
        ("hello", 10, "stop", "hello"),
        ("hello", 3, "length", "hel"),
        (" Hi\nUser: me", 20, "stop", "Hi"),
        ("a\nUse it", 20, "stop", "a\nUse it"),
    ],
)
def test_a_reply_ends_where_it_should(text: str, limit: int, end: str, shown: str) -> None:
    engine = Scripted([text], context_length=200, stop=("\nUser:",))
    reply = talk(engine, max_new_tokens=limit).reply("hi")
    assert "".join(reply) == reply.turn.assistant == shown
    assert reply.end == end


def test_a_stop_text_is_found_however_it_is_cut() -> None:
    text = "yes\nUser: no"
    for cut in range(1, len(text)):
        stops = StopFilter(["\nUser:"])
        shown = stops.feed(text[:cut])
        if not stops.found:
            shown += stops.feed(text[cut:])
        assert (shown, stops.found) == ("yes", True)


def test_undo_and_regenerate() -> None:
    engine = Scripted(["one", "two", "three"])
    conversation = talk(engine)
    list(conversation.reply("a"))
    list(conversation.regenerate())
    assert [(t.user, t.assistant) for t in conversation.turns] == [("a", "two")]
    assert conversation.undo().user == "a"
    with pytest.raises(ChatError, match="there is no turn yet"):
        conversation.regenerate()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ValueError])
def test_a_reply_that_cannot_be_replaced_stays(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    conversation = talk(Scripted(["one"]))
    list(conversation.reply("a"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Scripted, "render", fail)
    with pytest.raises(error):
        conversation.regenerate()
    assert conversation.turns == [Turn("a", "one")]


@pytest.mark.parametrize(
    ("text", "message"),
    [("  ", "the message is empty"), ("a\udcffb", r"not valid UTF-8 \(at character 1\)")],
)
def test_what_is_no_message_is_refused(text: str, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        talk(Scripted([])).reply(text)


def test_the_costs_add_up_to_the_prompt() -> None:
    engine = Scripted(["abc", "de"], context_length=500)
    conversation = talk(engine, system="S")
    for text in ("hello", "you"):
        list(conversation.reply(text))
    whole = engine.render([*conversation.messages(), {"role": "user", "content": ""}])
    frame = engine.render([{"role": "user", "content": ""}])
    assert sum(conversation.costs()) == len(whole) - len(frame)


def test_as_many_late_turns_stay_as_fit() -> None:
    turns = [Turn("u" * size, "a") for size in (1, 5, 2, 8, 1, 1, 3)]
    firsts = set()
    for context_length in range(30, 100):
        engine = Scripted([], context_length)
        conversation = talk(engine, max_new_tokens=2)
        conversation.restart(system="S", turns=turns)
        prompts = [
            engine.render([*conversation.messages(first), {"role": "user", "content": "hi"}])
            for first in range(len(turns) + 1)
        ]
        fitting = [len(prompt) <= context_length - conversation.room for prompt in prompts]
        first = fitting.index(True)
        assert conversation.fit("hi") == (prompts[first], first)
        firsts.add(first)
    assert len(firsts) == len(turns)


@pytest.mark.parametrize("work", [lambda conversation: conversation.fit("hi"), Conversation.costs])
def test_a_conversation_twice_as_long_is_about_twice_the_work(
    work: Callable[[Conversation], object],
) -> None:
    def rendered(turns: int) -> int:
        messages = []

        class Counting(Scripted):
            def render(self, given: Sequence[dict[str, str]]) -> list[int]:
                messages.extend(given)
                return super().render(given)

        conversation = talk(Counting([]))
        conversation.restart(system="", turns=[Turn("u", "a")] * turns)
        work(conversation)
        return len(messages)

    assert rendered(400) < 3 * rendered(200)


def test_a_saved_conversation_goes_on(tmp_path: Path) -> None:
    conversation = talk(Scripted(["ñandú"]), system="S")
    list(conversation.reply("¿qué?"))
    storage.save(conversation, tmp_path / "c.json")
    other = talk(Scripted([]))
    assert storage.load(other, tmp_path / "c.json") == 1
    assert (other.system, other.turns) == ("S", [Turn("¿qué?", "ñandú")])
    storage.export(conversation, tmp_path / "c.md", "es", "tutor")
    page = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "**Tú**: ¿qué?" in page
    assert "**tutor**: ñandú" in page


@pytest.mark.parametrize("content", [b"# minigpt\n", b"", b"\xff\n"])
def test_only_an_exported_page_is_replaced_by_another(tmp_path: Path, content: bytes) -> None:
    conversation = talk(Scripted(["one", "two"]))
    path = tmp_path / "c.md"
    list(conversation.reply("a"))
    storage.export(conversation, path, "es", "tutor")
    list(conversation.reply("b"))
    storage.export(conversation, path, "en", "another")
    assert "**another**: two" in path.read_text(encoding="utf-8")
    path.write_bytes(content)
    with pytest.raises(ChatError, match="exists and is no exported conversation: choose another"):
        storage.export(conversation, path, "es", "tutor")
    with pytest.raises(ChatError, match="exists and is no exported"):
        storage.export(conversation, tmp_path, "es", "tutor")
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["# minigpt\n", "", "{}"])
def test_only_a_saved_conversation_is_replaced_by_another(tmp_path: Path, content: str) -> None:
    conversation = talk(Scripted(["one"]))
    path = tmp_path / "c.json"
    storage.save(conversation, path)
    list(conversation.reply("a"))
    storage.save(conversation, path)
    assert storage.load(conversation, path) == 1
    path.write_text(content)
    with pytest.raises(
        ChatError, match="exists and cannot be read as a saved conversation: choose"
    ):
        storage.save(conversation, path)
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"system": 1, "turns": []}',
        '{"turns": [{}]}',
        r'{"system": "\ud800", "turns": []}',
        r'{"system": "", "turns": [{"user": "a", "assistant": "\ud800"}]}',
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path: Path, content: str) -> None:
    conversation = talk(Scripted(["one"]))
    list(conversation.reply("a"))
    path = tmp_path / "c.json"
    path.write_text(content)
    if "1" in content:
        path.write_text('{"system": 1, "turns": [{"user": "a", "assistant": "b"}]}')
    with pytest.raises(ChatError, match="is not a saved conversation"):
        storage.load(conversation, path)
    assert len(conversation.turns) == 1
    with pytest.raises(ChatError, match="No such file"):
        storage.load(conversation, tmp_path / "none.json")
    with pytest.raises(ChatError, match="No such file"):
        storage.save(conversation, tmp_path / "none" / "c.json")


def test_settings_follow_the_makers_advice() -> None:
    assert from_generation_config({"do_sample": False}).temperature == 0
    advised = from_generation_config({"do_sample": True, "temperature": 0.6, "top_k": 20})
    assert (advised.temperature, advised.top_k, advised.top_p) == (0.6, 20, 1.0)
    assert from_generation_config({}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "-1", "temperature must be a number of 0 or more, got -1"),
        ("temperature", "nan", "temperature must be a number of 0 or more, got nan"),
        ("top_p", "0", r"top_p must be in \(0, 1\], got 0"),
        ("top_p", "1.5", r"top_p must be in \(0, 1\], got 1.5"),
        ("min_p", "2", r"min_p must be in \[0, 1\], got 2"),
        ("top_k", "x", r"top_k must be a whole number of 0 \(off\) or more, got x"),
        ("repetition_penalty", "0", "repetition_penalty must be a number above 0, got 0"),
        ("max_new_tokens", "0", "max_new_tokens must be a whole number of at least 1, got 0"),
        ("seed", "-3", r"seed must be a whole number from 0 to 2\*\*63 - 1, or off, got -3"),
    ],
)
def test_a_value_outside_its_range_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        parse(name, text)


def test_a_seed_may_be_off() -> None:
    assert parse("seed", "off") is None
    assert parse("seed", "0") == 0


def test_both_languages_speak_of_the_same_values() -> None:
    for key, (english, spanish) in TEXTS.items():
        assert set(re.findall(r"\{(\w+)\}", english)) == set(re.findall(r"\{(\w+)\}", spanish)), key
        assert english, key
        assert spanish, key


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not valid JSON"):
        generation_config(tmp_path)


def test_a_real_engine_keeps_its_cache_between_turns(chat_model: Path) -> None:
    engine = open_engine("minigpt", chat_model)
    conversation = Conversation(engine, Settings(temperature=0, max_new_tokens=6))
    list(conversation.reply("hola"))
    second = conversation.reply("¿qué?")
    list(second)
    assert 0 < second.reused < second.prompt_tokens


def test_an_engine_that_there_is_not_is_refused(chat_model: Path) -> None:
    with pytest.raises(ValueError, match="engine must be minigpt or hf, got 'x'"):
        open_engine("x", chat_model)
