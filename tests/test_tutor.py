"""The tutor's data and its model: what it learned from, what it never saw, and what it is."""

import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from bench.held_out import DIALOGUES, FOLDER, Seen, read_cases, wordings, words_of
from bench.quality import GROUPS, unseen
from bench.quality import reply as greedy_reply
from chatbot.engines import TUTOR, open_engine
from chatbot.tutor import __main__ as training
from chatbot.tutor.corpus import (
    CHAT_TEMPLATE,
    FOLLOW_UPS,
    LANGUAGES,
    NEAR,
    SPECIAL_TOKENS,
    Conversations,
    Message,
    _State,
    read,
)
from chatbot.tutor.embeddings import learn_embeddings
from chatbot.tutor.grow import grow
from chatbot.tutor.hardest import hardest, row_losses
from chatbot.tutor.rows import (
    AGAIN,
    DECIDED,
    DECIDED_LATER,
    EXCHANGES,
    PHASES,
    Phase,
    Rows,
)
from chatbot.tutor.start import start_copying, start_embeddings
from chatbot.tutor.wording import echo, reword
from minigpt import GPT, GPTConfig, Tokenizer, quant
from minigpt.batches import IGNORED
from minigpt.train import TrainConfig, summed_loss

# Whoever changes a held-out file changes what the tutor's scores mean: not by accident.
HELD_OUT = {
    "follow_up": "a80b08fb1779ccfa2eec0c472bd4e0ed61f1cf629da3298f3cabde195b7231c1",
    "memory": "984e9abb7cbfed3e879b05988c0f59db7d48d13895a3a79df08b54a211fbc57e",
    "named": "6c15f04197610ba30540c41eec41438dc4bd23e9cccaf7028521f472aff882cc",
    "not_told": "35938a4460c41802c76293c03a2ba3edc3202bfd0f4a8b463316565e631e3ccf",
    "out_of_scope": "819ccf93d5144c1fa19463994b233d7aa9aac81ad99bddac367897fdf7875458",
    "style": "4915314b18a8dc58b65587b50025dedab39abcde210299c954eac29f99d3aeff",
    "unnamed": "befc7efa3d39ea68820515e9cf70fc21c272936913fcf7a41ecb7faf9e155221",
}
SECTIONS = ("terms", "answer", "short", "why", "example", "named", "unnamed")
FACT_SECTIONS = ("tell", "common_tell", "ack", "ask", "common_ask", "recall", "unknown", "values")

DATA = read()
TALK = Conversations(DATA)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.from_pretrained(TUTOR)


def lines() -> list[str]:
    """Every line of every training file."""
    files = sorted(DIALOGUES.rglob("*.txt"))
    return [line for path in files for line in path.read_text("utf-8").splitlines()]


# --- the dialogues ------------------------------------------------------------------------------


def test_every_topic_has_all_its_sections_in_both_languages() -> None:
    assert len(DATA.topics) >= 120
    for name, topic in DATA.topics.items():
        assert set(topic) >= {f"{language} {s}" for language in LANGUAGES for s in SECTIONS}, name
        for section, found in topic.items():
            assert found and all(line.strip() == line for line in found), (name, section)
            one = section.split()[1] in ("answer", *FOLLOW_UPS)
            assert len(found) == 1 if one else len(found) > 1 or "terms" in section, (name, section)


def test_every_fact_has_all_its_sections_and_what_tells_it_one_hole() -> None:
    for (name, fact), language in product(DATA.memory.items(), LANGUAGES):
        sections = {kind: fact[f"{language} {kind}"] for kind in FACT_SECTIONS}
        for kind in ("tell", "common_tell", "ack", "recall"):
            assert all(line.count("{value}") == 1 for line in sections[kind]), (name, kind)
        for kind in ("ask", "common_ask", "unknown", "values"):
            assert not any("{" in line for line in sections[kind]), (name, kind)
        for kind in ("common_tell", "common_ask"):  # few, or they would not be what most people say
            assert 10 <= len(set(sections[kind])) == len(sections[kind]) <= 30, (name, kind)
    assert sorted(fact for group in NEAR for fact in group) == sorted(DATA.memory)


def test_no_two_topics_have_the_same_answer() -> None:
    for language in LANGUAGES:
        answers = [tuple(words_of(t[f"{language} answer"][0])) for t in DATA.topics.values()]
        assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a\n[es answer]\nUna.\n\n[en answer]\nOne.\n", r"a\.txt:4 must be a new heading .* ''$"),
        ("# a\n[es answer] \nUna.\n", r"a\.txt:2 must be .* got '\[es answer\] '$"),
        ("# a\n[es answer]\nUna.\n[es answer]\nDos.\n", r"a\.txt:4 must be a new heading .*"),
        ("[es answer]\nUna.\n", r"a\.txt:1 must be a new heading"),
        ("# a\nUna.\n", r"a\.txt:2 must be a new heading"),
        ("# a\n[es answer]\nUna.\n# a\n", r"a\.txt:4 must be a new heading"),
        ("# a\n# b\n", r"a\.txt must have one heading, the topic's, and has 2"),
        ("", r"a\.txt must have one heading, the topic's, and has 0"),
    ],
)
def test_a_line_that_is_malformed_is_refused_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_the_same_seed_gives_the_same_conversation() -> None:
    for seed in range(20):
        one, other = (Conversations(read()).messages(Random(seed), turns=5) for _ in range(2))
        assert one == other
    talks = {json.dumps(TALK.messages(Random(seed), turns=2)) for seed in range(200)}
    assert len(talks) > 190


def test_a_conversation_alternates_and_leaves_no_hole() -> None:
    for seed in range(300):
        messages = TALK.messages(Random(seed), turns=4)
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            del roles[0]
        assert roles == ["user", "assistant"] * 4
        for message in messages:
            assert message["content"].strip()
            assert not re.search(r"\{\w+\}", message["content"]), message


def test_replies_are_written_texts_and_both_languages_are_spoken() -> None:
    written = {" ".join(words_of(line)) for line in lines()}
    replies = [
        message["content"]
        for seed in range(300)
        for message in TALK.messages(Random(seed), turns=4)
        if message["role"] == "assistant"
    ]
    known = [reply for reply in replies if " ".join(words_of(reply)) in written]
    assert len(known) > len(replies) / 2  # the others hold a name, or a manner
    for language in LANGUAGES:
        answers = {topic[f"{language} answer"][0] for topic in DATA.topics.values()}
        assert len(answers.intersection(replies)) > 20


def ack_pattern(*facts: str) -> re.Pattern[str]:
    """Matches what is said when one of these facts is told, its value in a group."""
    return re.compile(
        "|".join(
            re.escape(line).replace(r"\{value\}", "(.+?)")
            for language in LANGUAGES
            for fact in facts
            for line in DATA.memory[fact][f"{language} ack"]
        )
    )


ACK = ack_pattern(*DATA.memory).pattern
ACKS = re.compile(f"(?:{ACK})(?: (?:{ACK}))?")


def values_told(reply: str) -> list[str]:
    """The values in a reply to what was told, one or two of them; none in any other reply."""
    match = ACKS.fullmatch(reply)
    return [value for value in match.groups() if value] if match else []


def quoted(reply: str) -> str | None:
    """The user's words that a reply says again, or None."""
    for language in LANGUAGES:
        first, last = DATA.repeat[f"{language} said"][0].split("{text}")
        if reply.startswith(first):
            return reply.removeprefix(first).removesuffix(last)
    return None


def test_a_value_that_is_told_stands_in_the_message_whole() -> None:
    dressed = two = 0
    before = tuple(DATA.openers["es before"] + DATA.openers["en before"])
    for seed in range(600):
        messages = TALK.messages(Random(seed), turns=4)
        for user, reply in pairwise(messages):
            values = values_told(reply["content"])
            assert all(value in user["content"] for value in values), user
            dressed += bool(values) and user["content"].startswith(before)
            two += len(values) == 2
    assert dressed > 20 and two > 20


def test_what_the_tutor_asks_for_is_often_told_next_and_then_mostly_in_a_word() -> None:
    """In "What is your name?", "Ana": alone, the second could be anything."""
    asked = answered = bare = 0
    for seed in range(300):
        stream = TALK.conversation(Random(seed), personal=1.0, styled=0.0)
        talk = [next(stream)["content"] for _ in range(16)]
        for question, user, reply in zip(talk[1::2], talk[2::2], talk[3::2], strict=False):
            facts = [
                fact
                for fact, language in product(DATA.memory, LANGUAGES)
                if question in DATA.memory[fact][f"{language} unknown"]
            ]
            asked += bool(facts)
            if facts and (told := ack_pattern(*facts).fullmatch(reply)):
                answered += 1
                bare += user.rstrip(".!") == next(filter(None, told.groups())).rstrip(".!")
    assert asked > 80 and 0.3 < answered / asked < 0.6 and 0.3 < bare / answered < 0.7


def test_a_part_of_what_is_told_has_a_remark_beside_it() -> None:
    remarks = [
        " ".join(words_of(line))
        for language in LANGUAGES
        for line in DATA.openers[f"{language} aside"]
    ]
    beside = [
        any(remark in " ".join(words_of(user["content"])) for remark in remarks)
        for seed in range(400)
        for user, reply in pairwise(TALK.messages(Random(seed), turns=4))
        if len(values_told(reply["content"])) == 1
    ]
    assert 0.15 < sum(beside) / len(beside) < 0.4


def test_a_memory_line_loses_words_but_none_that_tells_its_fact() -> None:
    lost = 0
    for fact, language, kind in product(DATA.memory, LANGUAGES, ("tell", "ask")):
        section = DATA.memory[fact]
        shown = section[f"{language} {kind}"] + section[f"{language} common_{kind}"]
        written = {line: words_of(line) for line in shown}
        whole = {" ".join(sorted(words)) for words in written.values()}
        telling = TALK.telling_memory[language][fact]
        assert telling
        told = {frozenset(telling.intersection(words)) for words in written.values()}
        for seed in range(40):
            line = TALK._memory(Random(seed), fact, language, kind)
            assert ("{value}" in line) == (kind == "tell")
            assert telling.intersection(words_of(line)) in told, line
            lost += " ".join(sorted(words_of(line))) not in whole
    assert lost > 300


def test_what_was_misheard_is_not_learned_and_is_quoted_when_asked() -> None:
    """The replies to what the user tells are all wrong; those to the questions after it, right."""
    wrong = quotes = 0
    for seed in range(300):
        stream = TALK.conversation(Random(seed), personal=1.0, misheard=1.0)
        messages = [next(stream) for _ in range(17)]
        said = []
        for message in messages:
            if message["role"] == "user":
                said.append(message["content"])
            elif message["learned"]:
                assert len(values_told(message["content"])) != 1  # who tells two facts is heard
                if (words := quoted(message["content"])) is not None:
                    assert words in said
                    quotes += 1
            else:
                wrong += message["role"] == "assistant"
    assert wrong > 300 and quotes > 300
    heard = [TALK.messages(Random(seed), turns=8) for seed in range(100)]
    assert all(m["learned"] == (m["role"] == "assistant") for talk in heard for m in talk)


def test_of_two_misheard_messages_the_one_that_told_it_is_quoted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"name": "Ana hey", "city": "Lima and you"}
    state = _State("en", facts={"name": "Ana", "city": "Lima"}, said=said, misheard={*said})
    for fact, seed in product(said, range(5)):
        monkeypatch.setattr(TALK, "_asked_for", lambda random, told, fact=fact: fact)
        assert quoted(TALK._ask(Random(seed), state, "plain")[1]) == said[fact]
    state.misheard.clear()
    assert quoted(TALK._ask(Random(0), state, "plain")[1]) is None


def test_the_message_before_is_quoted_whole_and_nothing_else_where_all_is_understood() -> None:
    quotes = 0
    for seed in range(2000):
        talk = [m for m in TALK.messages(Random(seed), turns=6) if m["role"] != "system"]
        said, replies = ([m["content"] for m in talk[i::2]] for i in (0, 1))
        assert quoted(replies[0]) is None
        for before, reply in zip(said, replies[1:], strict=False):
            if (words := quoted(reply)) is not None:
                assert words == before
                quotes += 1
    assert quotes > 20


def test_an_echo_is_of_what_was_said_but_not_the_fact() -> None:
    """Whoever asks in the words in which it was told is understood by them; the fact is no hint."""
    random, places = Random(0), set()
    for _ in range(200):
        text = echo(random, "who am I", "the whole street calls me Ana Paz, ask them", "Ana Paz")
        again = re.sub(r"\b(who|am|I)\b", "", text).split()
        assert 1 <= len(again) <= 4 and len(text.split()) == 3 + len(again)
        assert " ".join(again) in "the whole street calls me" or set(again) <= {",", "ask", "them"}
        places.add(text.split().index(again[0]))
    assert places == {0, 1, 2, 3}
    assert echo(random, "who am I", "Ana", "Ana") == "who am I"


def test_no_token_of_what_was_misheard_is_a_label(trained: Tokenizer) -> None:
    reply = Message(role="assistant", content="Te llamas Ana.", learned=False)
    source = Rows(TALK, trained, seed=0)
    ids, labels = source._encode(Random(0), reply, None)
    assert "Te llamas Ana." in trained.decode(ids)
    assert set(labels) == {IGNORED} and len(labels) == len(ids)
    ids, labels = source._encode(Random(0), {**reply, "learned": True}, None)
    assert labels == [IGNORED, *ids[1:]]


def test_a_word_is_like_those_of_one_group_only() -> None:
    """Or what stands for what would hang on the order of the groups."""
    groups = [DATA.alike[f"{language} words"] for language in LANGUAGES]
    words = [words_of(word) for lines in groups for line in lines for word in line.split()]
    assert all(len(word) == 1 for word in words)
    assert len({word[0] for word in words}) == len(words) > 500


def test_invented_names_vary() -> None:
    """A name that is copied in a reply can only be copied: there are too many to know them."""
    said = ack_pattern("name")
    names, told = set(), 0
    for seed in range(1500):
        for message in TALK.messages(Random(seed), turns=3):
            if message["role"] == "assistant" and (m := said.fullmatch(message["content"])):
                told += 1
                names.add(next(filter(None, m.groups())))
    assert told > 100
    assert len({name.casefold() for name in names}) > told / 2
    for spelling in (r"[áéíóúñ]", "-", "'", " ", r"^[a-zñ]+$", r"^\w{2,3}$", r"[^aeiou\W]{4}"):
        assert len([name for name in names if re.search(spelling, name)]) > 2, spelling


# --- what was held out --------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_held_out_cases_are_frozen(group: str) -> None:
    content = (FOLDER / f"{group}.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == HELD_OUT[group]


@pytest.mark.parametrize("group", GROUPS)
def test_held_out_cases_are_well_formed(group: str) -> None:
    cases = read_cases(group)
    assert len(cases) >= 100
    assert len({c["id"] for c in cases}) == len(cases)
    for language in LANGUAGES:
        assert sum(c["language"] == language for c in cases) * 2 == len(cases)
    for c in cases:
        roles = [m["role"] for m in c["messages"]]
        assert roles[-1] == "user", c["id"]
        assert ("system" in roles) == (group == "style"), c["id"]
        for m in c["messages"]:
            assert m["content"] is None if m["role"] == "assistant" else m["content"], c["id"]
        if group == "memory":
            assert c["expect"] and all(c["expect"]), c["id"]
        elif group == "not_told":
            assert c["kind"] in DATA.memory, c["id"]
        elif group != "out_of_scope":
            assert c["topic"] in DATA.topics, c["id"]
        if group == "style":
            assert c["style"] in DATA.styles, c["id"]
        if group == "follow_up":
            assert c["kind"] in FOLLOW_UPS, c["id"]


def test_no_wording_that_counts_is_in_a_training_file() -> None:
    training = Seen.read()
    cases, _ = unseen(GROUPS)
    for case in cases:
        assert not training.any_of(case), case["id"]
    told = {" ".join(words_of(line)) for line in lines()}  # the same without the class
    for case in cases:
        for text in wordings(case):
            assert " ".join(words_of(text)) not in told, case["id"]


def test_enough_cases_count_in_every_group_and_language() -> None:
    cases, notes = unseen(GROUPS)
    assert len(cases) >= 200
    for group in GROUPS:
        for language in LANGUAGES:
            count = sum((c["group"], c["language"]) == (group, language) for c in cases)
            assert count >= 20, (group, language)
    left_out = sum(len(read_cases(group)) for group in GROUPS) - len(cases)
    assert sum(map(int, re.findall(r"(\d+) of", " ".join(notes)))) == left_out


def test_no_question_about_a_topic_was_shown() -> None:
    training = Seen.read()
    for group in ("named", "unnamed"):
        assert not [c["id"] for c in read_cases(group) if training.any_of(c)]


def test_a_wording_that_was_shown_is_noticed_in_any_dress(tmp_path: Path) -> None:
    (tmp_path / "topics").mkdir()
    (tmp_path / "topics" / "a.txt").write_text("# a\n[es named]\n¿Dónde está la atención?\n")
    (tmp_path / "b.txt").write_text("[es x]\nExplica {term}\nSoy {value}.\nLa caché KV\n{value}\n")
    (tmp_path / "openers.txt").write_text(
        "# openers\n[es before]\nBuenas,\n[es after]\nmil gracias\n[es aside]\nllueve\n"
        "[en before]\nHi,\n[en after]\nthx\n[en aside]\nit rains\n"
    )
    (tmp_path / "alike.txt").write_text("# alike\n[es words]\natención máscara\n[en words]\na b\n")
    (tmp_path / "memory.txt").write_text(
        "# a\n[es common_tell]\nMe llamo {value}\nVivo en {value}\n[en common_tell]\nI am {value}\n"
    )
    seen = Seen.read(tmp_path)
    plain = ("DONDE ESTA LA ATENCION", "explica la cache kv!", "Soy Zimar", "soy Ana Paz")
    dressed = (
        "buenas, soy Ana Paz",
        "explica la cache kv, ¡mil gracias!",
        "Hi, soy Zimar (thx)",
        "Soy Zimar. Llueve",
    )
    alike = ("¿Dónde está la máscara?", "hi, donde esta la mascara")
    two = ("Me llamo Ana y vivo en Lima", "Buenas, vivo en La Caché KV. Me llamo Zimar Paz")
    for text in (*plain, *dressed, *alike, *two):
        assert seen.holds(text), text
    unlike = ("¿Dónde está?", "explica la poesía", "Soy quien te lo pregunta", "a", "Zimar")
    for text in (*unlike, "Hola, ¿dónde está la atención?", "Soy Ana y explica la caché KV"):
        assert not seen.holds(text), text


def test_what_is_reworded_counts_as_shown() -> None:
    seen, changed = Seen.read(), 0
    for seed, (fact, language) in enumerate(product(DATA.memory, LANGUAGES)):
        random = Random(seed)
        for line in random.sample(DATA.memory[fact][f"{language} ask"], 40):
            other = reword(random, line, TALK.alike[language])
            changed += other != line
            assert seen.holds(other), (line, other)
    assert changed > 100


# --- rows of tokens -----------------------------------------------------------------------------


def test_the_tokenizer_gives_back_every_line(trained: Tokenizer) -> None:
    for line in lines():
        assert trained.decode(trained.encode(line)) == line


def rows(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Some rows of ids and labels, of every phase of the training."""
    source = Rows(TALK, tokenizer, seed=0)
    batches = [
        source.batch(step) for step in (0, 1, 2, 3, 2500, 5000, 5001, 6000, 9000, 9001, 9002, 9003)
    ]
    return [pair for ids, labels in batches for pair in list(zip(ids, labels, strict=True))[:24]]


def messages_of(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """A row's messages as (role, tokens with the end, if they have one); the last may be cut."""
    names = {number: name.strip("<|>") for name, number in tokenizer.special_tokens.items()}
    starts = [i for i, token in enumerate(ids) if token in names and names[token] != "endoftext"]
    ends = [*starts[1:], len(ids)]
    return [(names[ids[i]], ids[i + 1 : end]) for i, end in zip(starts, ends, strict=True)]


def test_only_replies_are_learned_and_all_but_the_misheard(trained: Tokenizer) -> None:
    assistant, learned, left = trained.special_tokens["<|assistant|>"], 0, 0
    for ids, labels in rows(trained):
        start = 0
        for role, tokens in messages_of(trained, ids):
            told = labels[start + 1 : start + 1 + len(tokens)]
            assert labels[start] == IGNORED  # the mark itself is given
            if role != "assistant" or not any(label != IGNORED for label in told):
                assert set(told) <= {IGNORED}
                left += role == "assistant" and bool(tokens)
            else:
                assert ids[start] == assistant
                end = told.index(IGNORED) if IGNORED in told else len(told)
                assert told[:end] == tokens[:end]
                assert set(tokens[end:]) <= {trained.eos_token_id}  # padding
                learned += 1
            start += 1 + len(tokens)
        assert start == len(ids) == len(labels)
    assert 0 < left < learned / 4


def test_a_row_is_a_conversation_by_the_chat_template(trained: Tokenizer) -> None:
    engine = open_engine("minigpt", TUTOR)
    eos = trained.eos_token_id
    compared = 0
    for ids, _ in rows(trained):
        parts = messages_of(trained, ids)[:-1]
        if any(tokens[-1] != eos for _, tokens in parts):
            continue  # a reply was broken off
        messages = [{"role": r, "content": trained.decode(tokens[:-1])} for r, tokens in parts]
        whole = ids[: sum(1 + len(tokens) for _, tokens in parts)]
        # Users' words may be cut into other tokens than usual; their text stays the same.
        assert trained.decode(engine.render(messages)) == trained.decode(whole) + "<|assistant|>"
        compared += len(messages)
    assert compared > 100


def test_a_reply_that_was_broken_off_begins_a_written_one(trained: Tokenizer) -> None:
    eos = trained.eos_token_id
    styles = [DATA.styles[style] for style in DATA.styles]
    written = {
        tuple(trained.encode(pattern.format(**texts))[:DECIDED])
        for language in LANGUAGES
        for pattern in [
            "{why}",
            "{example}",
            "{short}",
            *(style[f"{language} pattern"][0] for style in styles),
        ]
        for topic in DATA.topics.values()
        for texts in [
            {kind: topic[f"{language} {kind}"][0] for kind in ("answer", "short", "why", "example")}
        ]
    }
    written |= {
        tuple(trained.encode(reply)[:DECIDED])
        for group in (DATA.small_talk, DATA.memory, DATA.follow_ups, {"unknown": DATA.unknown})
        for section in group.values()
        for language in LANGUAGES
        for kind in ("reply", "unknown", "nothing")
        for reply in section.get(f"{language} {kind}", [])
    }
    said_again = tuple(  # a long name or message makes these long
        section[f"{language} {kind}"][0].split("{")[0]
        for section, kind in [*((s, "ack") for s in DATA.memory.values()), (DATA.repeat, "said")]
        for language in LANGUAGES
    )
    seen = 0
    for ids, _ in rows(trained):
        before = ""
        for role, tokens in messages_of(trained, ids)[:-1]:
            text = trained.decode(tokens)
            if role == "assistant" and tokens[-1] != eos:
                assert len(tokens) in (DECIDED, DECIDED_LATER)
                begins = tuple(tokens[:DECIDED]) in written or text.startswith(said_again)
                assert begins or text in before, text  # what it was to repeat
                seen += 1
            before = text
    assert seen > 30


def test_a_question_alone_is_a_row_with_one_reply(trained: Tokenizer) -> None:
    source = Rows(TALK, trained, seed=0)
    widths = {width for width, *_ in EXCHANGES}
    seen = set()
    for step in range(16):
        ids, labels = source.batch(step)
        for row, learned in zip(ids, labels, strict=True):
            roles = [role for role, _ in messages_of(trained, row)]
            if len(row) in widths:
                assert roles in (["user", "assistant"], ["system", "user", "assistant"])
                assert any(label != -100 for label in learned)
        seen.add(len(ids[0]))
    assert widths < seen  # all of them, and conversations


def test_embeddings_start_as_a_bag_of_words_that_tells_topics_apart(trained: Tokenizer) -> None:
    """Learned from half of each topic's wordings, they tell the other half apart."""
    topics = dict(list(DATA.topics.items())[:12])
    half = {
        name: {section: lines[::2] for section, lines in topic.items()}
        for name, topic in topics.items()
    }
    nothing: dict[str, list[str]] = {
        f"{language} {name}": [] for language in LANGUAGES for name in ("user", "things")
    }
    others = {"small_talk": {}, "memory": {}, "follow_ups": {}, "styles": {}}
    few = replace(DATA, topics=half, unknown=nothing, carriers=nothing, **others)
    embeddings = learn_embeddings(few, trained, width=64, steps=100, seed=0)
    assert embeddings.shape == (len(trained), 64)
    assert embeddings.std().item() == pytest.approx(1.0)
    again = learn_embeddings(few, trained, width=64, steps=100, seed=0)
    assert torch.equal(embeddings, again)

    def right(vectors: torch.Tensor) -> float:
        """The part of the other half whose sum is nearest to its own topic's mean."""

        def place(lines: list[str]) -> torch.Tensor:
            return F.normalize(torch.stack([vectors[trained.encode(x)].sum(0) for x in lines]))

        means = [place(topic["en unnamed"]).mean(0) for topic in half.values()]
        hits = [
            (place(topic["en unnamed"][1::2]) @ F.normalize(torch.stack(means)).T).argmax(1) == n
            for n, topic in enumerate(topics.values())
        ]
        return torch.cat(hits).float().mean().item()

    by_chance = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    assert right(embeddings) > 2 * right(by_chance)


def test_the_heads_that_start_the_copying_find_what_came_after_the_same_token() -> None:
    """Of 20 tokens drawn by chance and then said again, before any training."""
    options = training.parser().parse_args([])
    model = training.new_model(Tokenizer.from_pretrained(TUTOR), options).eval()
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(300, 4000, (8, 20), generator=generator)
    ids = torch.cat([some, some], dim=1)

    def median_rank() -> float:
        """How many tokens are likelier than the right one, where it has been said before."""
        with torch.inference_mode():
            logits = model(ids)[:, 20:-1]
        right = logits.gather(2, ids[:, 21:, None])
        return (logits > right).sum(dim=2).float().median().item()

    vectors = torch.randn(4096, 192, generator=generator)
    start_embeddings(model, vectors)
    assert torch.equal(model.wte.weight[:, :64], torch.zeros(4096, 64))
    by_chance = median_rank()
    start_copying(model, generator)
    assert median_rank() < 200 < 1000 < by_chance


def test_a_step_always_has_the_same_batch(trained: Tokenizer) -> None:
    batches = [Rows(Conversations(read()), trained, seed=3).batch(7) for _ in range(2)]
    assert batches[0] == batches[1]
    assert Rows(TALK, trained, seed=4).batch(7) != batches[0]
    assert Rows(TALK, trained, seed=3).batch(8) != batches[0]
    ids, labels = batches[0]
    assert len({len(row) for row in [*ids, *labels]}) == 1 and len(ids) == len(labels)


def test_the_rows_that_are_learned_are_the_hardest_of_those_drawn() -> None:
    config = GPTConfig(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).double().eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (24, 16), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, IGNORED)
    labels[5] = IGNORED  # has nothing to learn
    both = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        losses = [
            summed_loss(model, {"input_ids": ids[[i]], "labels": labels[[i]]}).item()
            for i in range(len(ids))
        ]
    model.train()  # its dropout says nothing about a row
    for at_a_time in (5, 6, 24):
        measured = row_losses(model, both, at_a_time)
        torch.testing.assert_close(measured, torch.tensor(losses), rtol=1e-6, atol=0)
    best = sorted(sorted(range(24), key=lambda i: -losses[i])[:6])
    kept = hardest(model, both, 6)
    assert torch.equal(kept["input_ids"], ids[best])
    assert torch.equal(kept["labels"], labels[best])
    assert model.training


def test_who_knows_nothing_yet_is_asked_about_topics_most_of_all(trained: Tokenizer) -> None:
    pairs = product(DATA.topics.values(), LANGUAGES)
    answers = [topic[f"{language} answer"][0] for topic, language in pairs]
    beginnings = {tuple(trained.encode(answer)[:4]) for answer in answers}

    def share(phase: Phase) -> float:
        source, random = Rows(TALK, trained, seed=0), Random(0)
        replies = [
            [label for label in source.exchange(random, 48, phase)[1] if label != IGNORED]
            for _ in range(300)
        ]
        return sum(tuple(reply[:4]) in beginnings for reply in replies) / len(replies)

    assert share(PHASES[0]) > 0.45 > 2 * share(replace(PHASES[0], topics=1.0))


def test_who_goes_on_draws_more_rows_than_he_learns(trained: Tokenizer) -> None:
    source = Rows(TALK, trained, seed=0, steps=100, phases=AGAIN)
    kinds = set()
    for step in range(12):
        ids, labels, kept = source.candidates(step)
        alone = len(ids[0]) in {width for width, *_ in EXCHANGES}
        assert len(labels) == len(ids) == kept * (4 if alone else 2)
        assert source.batch(step) == (ids[:kept], labels[:kept])
        kinds.add(alone)
    assert kinds == {True, False}
    ids, _, kept = Rows(TALK, trained, seed=0).candidates(0)  # nothing is known yet
    assert len(ids) == kept


# --- the training -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["", f"--start {TUTOR}"], ids=["from nothing", "going on"])
def test_a_tutor_that_broke_off_ends_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: str
) -> None:
    """Three steps of `make tutor`, and the same with a checkpoint after two of them."""
    often = lambda **given: TrainConfig(**{**given, "save_steps": 2})  # noqa: E731
    monkeypatch.setattr(training, "TrainConfig", often)
    batch = training.batch

    def breaking_off(model: GPT, source: Rows, step: int) -> dict[str, torch.Tensor]:
        if step == 2:
            raise OSError("the power is gone")
        return batch(model, source, step)

    def weights(name: str) -> bytes:
        runs, output = tmp_path / f"{name}_runs", tmp_path / name
        flags = f"{start} --steps 3 --device cpu --runs {runs} --output {output}"
        assert training.main(flags.split()) == 0
        assert not list(runs.glob("checkpoint-*"))  # the next run is a new one
        return (output / "model.safetensors").read_bytes()

    straight = weights("straight")
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(training, "batch", breaking_off)
        weights("broken")
    assert "tutor: the power is gone" in capsys.readouterr().err
    assert not (tmp_path / "broken").exists()
    assert weights("broken") == straight
    assert "going on from" in capsys.readouterr().out
    assert (tmp_path / "broken" / "loss.png").is_file()
    assert open_engine("minigpt", tmp_path / "broken").render([{"role": "user", "content": "Hola"}])


@pytest.mark.parametrize(
    ("flags", "grown", "message"),
    [
        (["--seed", "1"], False, "seed is 0 there, 1 here"),
        (["--steps", "4"], False, "steps is 3 there, 4 here"),
        (["--layers", "6"], False, "layers is None there, 6 here"),
        (["--start", str(TUTOR)], False, "start is None there"),
        ([], True, "bytes of dialogues is"),
    ],
)
def test_a_run_that_broke_off_goes_on_only_as_it_began(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    grown: bool,
    message: str,
) -> None:
    """Or the weights would come from one run, and what the card says of them from another."""
    before = ["--steps", "3", "--runs", str(tmp_path), "--output", str(tmp_path / "out")]
    options = training.parser().parse_args(before)
    assert training.begun(options) is None
    (tmp_path / "options.json").write_text(json.dumps(training.asked(options)), "utf-8")
    (tmp_path / "checkpoint-2").mkdir()
    assert training.begun(options) == tmp_path / "checkpoint-2"
    if grown:
        monkeypatch.setattr(training.corpus, "FOLDER", tmp_path)
    assert training.main([*before, *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{tmp_path / 'options.json'} is of another run: {message}" in err
    assert err.endswith("; give the same, or another directory\n")
    assert (tmp_path / "checkpoint-2").is_dir()  # nothing is lost


@pytest.mark.slow
def test_a_training_goes_on_from_a_tutor(tmp_path: Path) -> None:
    layers = json.loads((TUTOR / "config.json").read_text())["n_layer"]
    flags = f"--start {TUTOR} --layers {layers + 1} --steps 1 --device cpu"
    flags += f" --runs {tmp_path / 'runs'}"
    assert training.main([*flags.split(), "--output", str(tmp_path / "more")]) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (TUTOR, tmp_path / "more")
    )
    assert len(after) == len(before) + 12  # a layer more
    name = "transformer.wte.weight"
    assert not torch.equal(before[name], after[name])
    torch.testing.assert_close(before[name], after[name], rtol=0, atol=3e-3)
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (TUTOR, tmp_path / "more")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--steps 0", "max_steps must be at least 1"), ("--seed -1", "seed must be")]
    + [("--start no/such/tutor", "no/such/tutor"), ("--layers 1", "must be at least 2")]
    + [("--output pyproject.toml", "is a file: give a directory")]
    + [("--runs pyproject.toml", "is a file: give a directory"), (f"--runs {TUTOR}", "a model")]
    + [(f"--start {TUTOR} --layers 99", "layers can have"), ("--layers 0", "at least 2")]
    + [("--device cuda", "torch finds no such GPU here, use cpu")]
    * (not torch.cuda.is_available()),
)
def test_what_is_wrong_with_a_training_is_said_in_one_line_before_it(
    capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    assert training.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("tutor: ") and message in err


@pytest.mark.parametrize("layers", [3, 4, 5, 6])
def test_a_grown_model_computes_the_same_and_learns_in_its_new_layers(layers: int) -> None:
    config = GPTConfig(vocab_size=50, n_positions=16, n_embd=8, n_layer=3, n_head=2)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        for weights in model.parameters():  # biases too
            weights.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    grown = grow(model, layers).eval()
    ids = torch.arange(16)[None]
    assert grown.config.n_layer == layers
    torch.testing.assert_close(grown(ids), model(ids), rtol=0, atol=1e-12)
    grown(ids).square().sum().backward()
    outputs = [block.mlp.c_proj.weight for block in grown.h]
    assert sum(not weight.any() for weight in outputs) == layers - 3
    assert all(weight.grad is not None and weight.grad.any() for weight in outputs)


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        (False, r"has the special tokens .*<\|assistant\|> and"),
        (True, "is quantized: give the tutor that it was made of"),
    ],
)
def test_a_model_that_cannot_go_on_is_refused_as_a_start(
    tmp_path: Path, quantized: bool, message: str
) -> None:
    tokenizer = training.train_tokenizer(["no roles"], vocab_size=260, special_tokens=("<|end|>",))
    tokenizer.save_pretrained(tmp_path)
    model = GPT(GPTConfig(vocab_size=260, n_positions=512, n_embd=64, n_layer=1, n_head=1))
    if quantized:
        quant.save(quant.quantize(model, progress=False), tmp_path)
    else:
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        training.read_tutor(str(tmp_path), None)


def test_a_training_says_in_the_card_where_the_weights_are_from(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text((TUTOR / "README.md").read_text("utf-8"), "utf-8")
    model = GPT(GPTConfig(vocab_size=4096, n_positions=512, n_embd=256, n_layer=2, n_head=4))

    def told(flags: str) -> str:
        training.tell_card(card, training.parser().parse_args(flags.split()), model)
        page = card.read_text("utf-8")
        assert "![loss per step](loss.png)" in page and "## How good it is" in page
        return page.partition("<!-- weights -->\n")[2].partition("<!-- /weights -->")[0]

    first = (
        "**These weights** (2 layers, 2.8 million parameters) are from one run of "
        "`python -m chatbot.tutor --start=C:\\1 --steps=7 --seed=8`.\n"
    )
    assert told(r"--start C:\1 --steps 7 --seed 8").replace("'", "") == first
    then = told(f"--start {tmp_path} --layers 2 --steps 9")  # the tutor of this very card goes on
    assert then.replace("'", "").startswith(first + "Then (2 layers")
    assert then.endswith("--layers=2 --steps=9 --seed=0`.\n")


# --- the model ----------------------------------------------------------------------------------


def test_the_file_is_small_and_in_float16() -> None:
    file = TUTOR / "model.safetensors"
    assert file.stat().st_size <= 12e6
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads((TUTOR / "config.json").read_text())["dtype"] == "float16"


def test_its_directory_is_what_the_corpus_says(trained: Tokenizer) -> None:
    assert trained.chat_template == CHAT_TEMPLATE
    assert set(trained.special_tokens) == set(SPECIAL_TOKENS)
    config = json.loads((TUTOR / "config.json").read_text())
    assert config["vocab_size"] == len(trained)
    assert config["eos_token_id"] == trained.eos_token_id


@pytest.mark.parametrize("prompt", ["¿Qué es la atención?", "What is LoRA?", "Hola, me llamo Ana."])
def test_both_sides_reply_the_same(prompt: str) -> None:
    """Ours, the bridge's engine, and transformers alone with its own chat template."""
    messages = [{"role": "user", "content": prompt}]
    replies = []
    for name in ("minigpt", "hf"):
        engine = open_engine(name, TUTOR)
        ids = engine.render(messages)
        options = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": None}
        replies.append(list(engine.stream(ids, max_new_tokens=40, temperature=0, **options)))
    tokenizer = AutoTokenizer.from_pretrained(TUTOR)
    model = GPT2LMHeadModel.from_pretrained(TUTOR, dtype=torch.float32)
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    assert given["input_ids"][0].tolist() == ids
    out = model.generate(**given, max_new_tokens=40, do_sample=False)
    alone = out[0, len(ids) :].tolist()
    if alone[-1] == tokenizer.eos_token_id:
        alone.pop()
    assert replies[0] == replies[1] == alone
    assert tokenizer.decode(alone).strip()


def test_right_after_a_name_the_tutor_hardly_makes_up_what_it_was_not_told() -> None:
    """After a name, asked for anything else, it says that it does not know it yet."""
    engine, said = open_engine("minigpt", TUTOR), []
    told = {"es": "hola, me llamo Nerea", "en": "hi, I'm Nora"}
    for language, fact in product(LANGUAGES, sorted(set(DATA.memory) - {"name"})):
        section = DATA.memory[fact]
        messages = [{"role": "user", "content": told[language]}]
        messages += [{"role": "assistant", "content": greedy_reply(engine, messages)}]
        asked = next(line for line in section[f"{language} ask"] if len(line.split()) <= 6)
        messages += [{"role": "user", "content": asked}]
        said.append(greedy_reply(engine, messages) == section[f"{language} unknown"][0])
    assert sum(said) > 0.9 * len(said)


def test_the_model_card_shows_its_quality() -> None:
    card = (TUTOR / "README.md").read_text("utf-8")
    assert 0 < card.index("<!-- quality -->") < card.index("<!-- /quality -->")
    topics = re.search(r"(\d+) topics", card)
    assert topics and int(topics[1]) == len(DATA.topics)
    written = re.search(r"about ([\d,]+) lines", card)
    items = [line for line in lines() if not line.startswith(("# ", "["))]
    assert written and abs(int(written[1].replace(",", "")) / len(items) - 1) < 0.01
    assert (TUTOR / "loss.png").is_file()
