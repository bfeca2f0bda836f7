"""The tutor's training data: conversations without end, drawn from the dialogues.

    dialogues/*.txt -> Dialogues -> Conversations -> messages

Every conversation is a function of its random generator alone, so a run can stop and continue, and
two runs are equal. A wording is hardly ever shown twice in the same dress: wording.py varies it, a
greeting may stand before it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypedDict

from chatbot.tutor.wording import (
    casing,
    contract,
    echo,
    invent_name,
    mumble,
    relax,
    reword,
    thin,
    without_accents,
    words_of,
)

LANGUAGES = ("es", "en")
SHARES = (0.45, 0.55)  # of them: in English fewer new wordings are understood
FOLDER = Path(__file__).parent / "dialogues"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
FOLLOW_UPS = ("why", "example", "short")
PLAIN = 4  # words of a short wording
OUT_OF_SCOPE = {"es": 1.1, "en": 3.0}  # its weight: in English more is taken for a topic
ASIDE = 0.06  # of the messages have a remark beside them
ASIDE_TOLD = 0.3  # of those that tell a fact
ECHO = 0.25  # of the questions about the user hold words of what they ask for
COMMON = 0.3  # of what is told or asked about the user is said as most people say it
TWO = 0.2  # of the messages that tell something tell two facts
JOINS = {"es": (" y ", " y ", ", ", ". "), "en": (" and ", " and ", ", ", ". ")}
ANSWERED = 0.4  # of the tutor's own questions ("What is your name?") are answered next
NEAR = (  # facts whose values or words are alike: one is easily taken for another
    ("name", "friend_name", "sibling_name", "pet_name"),
    ("favorite_color", "favorite_food", "favorite_book", "sport"),
    ("city", "country"),
    ("job", "study_subject"),
    ("age", "birthday"),
    ("computer",),
)

Sections = dict[str, list[str]]  # "es answer" -> its lines


class Message(TypedDict):
    """What is said, and by whom; `learned` if it is what the tutor should learn to say."""

    role: str
    content: str
    learned: bool


@dataclass(frozen=True)
class Dialogues:
    """What the files say: heading -> section -> lines, a dictionary for each file."""

    topics: dict[str, Sections]
    carriers: Sections
    openers: Sections
    small_talk: dict[str, Sections]
    memory: dict[str, Sections]
    unknown: Sections
    follow_ups: dict[str, Sections]
    styles: dict[str, Sections]
    repeat: Sections
    alike: Sections


def read(folder: Path = FOLDER) -> Dialogues:
    """Read a directory of dialogues; ValueError with file and line for what is malformed."""
    topics = {}
    for path in sorted((folder / "topics").glob("*.txt")):
        headings = read_file(path)
        if len(headings) != 1:
            raise ValueError(f"{path} must have one heading, the topic's, and has {len(headings)}")
        (topics[path.stem],) = headings.values()
    files = {path.stem: read_file(path) for path in folder.glob("*.txt")}
    return Dialogues(
        topics=topics,
        carriers=files["carriers"]["carriers"],
        openers=files["openers"]["openers"],
        small_talk=files["small_talk"],
        memory=files["memory"],
        unknown=files["unknown"]["unknown"],
        follow_ups=files["follow_ups"],
        styles=files["styles"],
        repeat=files["repeat"]["repeat"],
        alike=files["alike"]["alike"],
    )


def read_file(path: Path) -> dict[str, Sections]:
    """`# heading`, then `[es section]` lines, then one item per line."""
    headings: dict[str, Sections] = {}
    sections: Sections = {}
    lines: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        section = re.fullmatch(r"\[((?:es|en) \w+)\]", line)
        if line.startswith("# ") and line[2:] not in headings:
            headings[line[2:]] = sections = {}
        elif section and headings and section[1] not in sections:
            sections[section[1]] = lines = []
        elif line.strip() and not line.startswith(("#", "[")) and sections:
            lines.append(line)
        else:
            raise ValueError(
                f"{path}:{number} must be a new heading (# name), a new section below one "
                f"([es kind]), or an item below a section, got {line!r}"
            )
    return headings


class Conversations:
    """Draws conversations in the proportions that the tutor should learn.

    >>> talk = Conversations(read())
    >>> [message["role"] for message in talk.messages(Random(3), turns=1)][-2:]
    ['user', 'assistant']
    """

    def __init__(self, dialogues: Dialogues):
        self.dialogues = dialogues
        self.topics = list(dialogues.topics)
        self.plain = {  # what everybody asks first: "What is {term}?"
            language: plain(dialogues.carriers[f"{language} named"]) for language in LANGUAGES
        }
        self.alike = {
            language: others_of(dialogues.alike[f"{language} words"]) for language in LANGUAGES
        }
        self.telling_memory = {
            language: telling_words(
                {
                    fact: [
                        line
                        for kind in ("tell", "ask", "common_tell", "common_ask")
                        for line in section[f"{language} {kind}"]
                    ]
                    for fact, section in dialogues.memory.items()
                }
            )
            for language in LANGUAGES
        }

    def messages(self, random: Random, turns: int) -> list[Message]:
        """One conversation of so many turns, after a system prompt in some of them."""
        stream = self.conversation(random)
        messages: list[Message] = []
        while sum(message["role"] == "assistant" for message in messages) < turns:
            messages.append(next(stream))
        return messages

    def conversation(
        self,
        random: Random,
        *,
        personal: float = 0.35,
        styled: float = 0.3,
        topics: float = 1.0,
        misheard: float = 0.0,
    ) -> Iterator[Message]:
        """The messages of one conversation, which never ends.

        Parts of all conversations are `personal`, about the user more than about topics, and
        `styled` by a system prompt. Topics are asked about `topics` times as often as a tutor needs
        that knows them. A part of what the user tells is `misheard`: the reply is wrong, and not to
        be learned, but who is asked later should say what the user said.
        """
        state = _State(language=random.choices(LANGUAGES, SHARES)[0], topics=topics)
        style = self._style(random) if random.random() >= 1 - styled else None
        if style is not None:
            prompts = self.dialogues.styles[style][f"{state.language} system"]
            prompt = thin(random, random.choice(prompts))
            yield Message(role="system", content=relax(random, prompt, 0.3), learned=False)
        about_user = random.random() < personal
        while True:
            if random.random() < 0.04:
                state.language = random.choices(LANGUAGES, SHARES)[0]
            user, reply = self._turn(random, state, style or "plain", about_user)
            wrong = len(state.told) == 1 and random.random() < misheard
            if wrong:
                user, reply = self._misheard(random, state, state.told[0], user)
            state.said.update(dict.fromkeys(state.told, user))
            state.last = user
            yield Message(role="user", content=user, learned=False)
            yield Message(role="assistant", content=reply, learned=not wrong)

    def _style(self, random: Random) -> str:
        return random.choice(["pirate", "brief", "formal", "child", "plain"])

    def _turn(self, random: Random, state: "_State", style: str, personal: bool) -> tuple[str, str]:
        """The user's message and the right reply; the state remembers what it was about."""
        wanted, state.wanted, state.told = state.wanted, None, ()
        if wanted is not None and random.random() < ANSWERED:
            state.topic = None
            return self._answer(random, state, wanted)
        weights = {  # who speaks of himself first tells something, and asks for it then
            self._topic: state.topics * (3.0 if not personal else 1.2),
            self._unknown: OUT_OF_SCOPE[state.language] * (5.0 if not personal else 1.3),
            self._small_talk: 0.3 if not personal else 0.4,
            self._repeat: 0.15 if not personal else 0.5,
            self._tell: 0.7 if not personal else (2.5 if state.facts else 6.0),
            self._ask: 0.3 if not personal else (4.0 if state.facts else 2.0),
            self._follow_up: 0.03 if not state.topic else (7.0 if not personal else 5.0),
        }
        kind = random.choices(list(weights), list(weights.values()))[0]
        if kind not in (self._topic, self._follow_up):
            state.topic = None
        return kind(random, state, style)

    def _topic(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        state.topic = random.choice(self.topics)
        topic, language = self.dialogues.topics[state.topic], state.language
        terms = topic[f"{language} terms"]
        kept = frozenset(word for term in terms for word in words_of(term))

        def wording() -> str:
            way = random.random()
            if way < 0.15:  # a term that others contain is learned by being asked for alone
                frame = random.choice(self.plain[language])
            elif way < 0.35:
                frame = thin(random, random.choice(self.dialogues.carriers[f"{language} named"]))
            else:
                kind = "named" if way < 0.52 else "unnamed"
                return thin(random, random.choice(topic[f"{language} {kind}"]), kept)
            term = terms[0] if random.random() < 0.4 else random.choice(terms)
            return contract(frame.replace("{term}", casing(random, term)))

        user = wording()
        if random.random() < 0.15:  # asked twice, in two ways
            user = f"{user}{random.choice([' ', '. ', ', ', '? '])}{wording()}"
        pattern = self.dialogues.styles[style][f"{language} pattern"][0]
        texts = {kind: topic[f"{language} {kind}"][0] for kind in ("answer", "short", "example")}
        return self._dress(random, user, language), pattern.format(**texts)

    def _follow_up(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        kind, language = random.choice(FOLLOW_UPS), state.language
        section = self.dialogues.follow_ups[kind]
        user = self._dress(
            random, thin(random, random.choice(section[f"{language} user"])), language
        )
        if state.topic is None:
            return user, section[f"{language} nothing"][0]
        return user, self.dialogues.topics[state.topic][f"{language} {kind}"][0]

    def _unknown(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        language, unknown = state.language, self.dialogues.unknown
        if random.random() < 0.45:  # the frames of real questions, about something else
            carriers = self.dialogues.carriers
            frames = random.choice(["negative", "named"])
            thing = random.choice(carriers[f"{language} things"])
            frame = random.choice(carriers[f"{language} {frames}"])
            frame = thin(random, frame)
            user = re.sub(r"\{(term|thing)\}", lambda _: casing(random, thing), frame)
        else:
            line = random.choice(unknown[f"{language} user"])
            user = thin(random, reword(random, line, self.alike[language]))
        return self._dress(random, user, language), unknown[f"{language} reply"][0]

    def _small_talk(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        intent = self.dialogues.small_talk[random.choice(list(self.dialogues.small_talk))]
        user = random.choice(intent[f"{state.language} user"])
        return relax(random, user, 0.5), intent[f"{state.language} reply"][0]

    def _repeat(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        """Words that mean nothing, or the last ones: nowhere is copying learned so directly."""
        frames, language = self.dialogues.repeat, state.language
        if state.last and random.random() < 0.2:
            user = self._dress(random, random.choice(frames[f"{language} again"]), language)
            return user, self._quote(language, state.last)
        things = self.dialogues.carriers[f"{language} things"]
        text = " ".join(
            invent_name(random) if random.random() < 0.6 else random.choice(things)
            for _ in range(random.randint(1, 4))
        )
        if random.random() < 0.5:
            text = text.lower()
        frame = relax(random, random.choice(frames[f"{language} user"]), 0.4)
        return frame.replace("{text}", text), frames[f"{language} reply"][0].replace("{text}", text)

    def _tell(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        fact = self._fact(random)
        if random.random() < TWO:
            return self._tell_two(random, state, fact)
        value = self._told(random, state, fact)
        frame = self._about_user(random, fact, state.language, "tell")
        return frame.replace("{value}", value), self._fill(state.language, fact, "ack", value)

    def _tell_two(self, random: Random, state: "_State", first: str) -> tuple[str, str]:
        """Two facts as most people tell them: "I'm Ana and I live in Lima"; the reply has both."""
        language, memory = state.language, self.dialogues.memory
        facts = first, random.choice([fact for fact in memory if fact != first])
        values = [self._told(random, state, fact) for fact in facts]
        one, other = (random.choice(memory[fact][f"{language} common_tell"]) for fact in facts)
        join = random.choice(JOINS[language])
        if join != ". " and not other.startswith("I"):
            other = other[0].lower() + other[1:]
        frame = f"{one.rstrip('.')}{join}{other.replace('{value}', '{other}')}"
        user = self._dress(random, frame, language)  # which changes nothing in a hole
        user = user.replace("{value}", values[0]).replace("{other}", values[1])
        replies = [
            self._fill(language, fact, "ack", value)
            for fact, value in zip(facts, values, strict=True)
        ]
        return user, " ".join(replies)

    def _answer(self, random: Random, state: "_State", fact: str) -> tuple[str, str]:
        """What the tutor has just asked for: mostly nothing but the value."""
        value = self._told(random, state, fact)
        frame = "{value}" + random.choice(["", "", "", ".", "!"])
        if random.random() < 0.4:
            frame = self._about_user(random, fact, state.language, "tell")
        return frame.replace("{value}", value), self._fill(state.language, fact, "ack", value)

    def _told(self, random: Random, state: "_State", fact: str) -> str:
        """Draw a value for a fact; the state notes that this message tells it."""
        values = self.dialogues.memory[fact][f"{state.language} values"]
        named = fact == "name" or fact.endswith("_name")
        invent = (named or fact in ("city", "computer")) and random.random() < 0.5
        value = invent_name(random) if invent else random.choice(values)
        if named and random.random() < 0.1:  # Mary Ellen is not Mary
            value = f"{value} {random.choice(values)}"
        if random.random() < 0.25:
            value = value.lower()
        state.facts[fact] = value
        state.misheard.discard(fact)
        state.told += (fact,)
        return value

    def _misheard(self, random: Random, state: "_State", told: str, user: str) -> tuple[str, str]:
        """What the user said, and what a tutor may say that took it for something else.

        It will take odd wordings so. If all replies that it ever read were right, it would believe
        its own, and not know what the user said before them. Half of these messages lose words, and
        are hardly to be understood: who is asked later must find the likely one, and quotes it.
        """
        language, value, way = state.language, state.facts[told], random.random()
        if random.random() < 0.5:
            user = mumble(random, user, value)
        state.misheard.add(told)
        if way < 0.35:
            return user, self.dialogues.unknown[f"{language} reply"][0]
        if way < 0.45:
            state.topic = random.choice(self.topics)
            return user, self.dialogues.topics[state.topic][f"{language} answer"][0]
        fact = self._fact(random)
        if way < 0.5:
            return user, self.dialogues.memory[fact][f"{language} unknown"][0]
        if way > 0.85:
            fact = told
        if fact == told or random.random() < 0.4:  # another word, or a part of this one
            words = [word.strip(".,;:!?¡¿()") for word in user.split()]
            others = [word for word in words if word and word not in value]
            part = value[: random.randint(1, max(1, len(value) - 1))]
            value = random.choice(others) if others and random.random() < 0.8 else part
        return user, self._fill(language, fact, "ack", value)

    def _ask(self, random: Random, state: "_State", style: str) -> tuple[str, str]:
        fact = self._asked_for(random, list(state.facts))
        section, language = self.dialogues.memory[fact], state.language
        user = self._about_user(random, fact, language, "ask")
        if random.random() < ECHO:  # if nobody said these words before, it was not told
            other = random.choice(section[f"{language} tell"])
            said, value = state.said.get(fact, other), state.facts.get(fact, "{value}")
            user = echo(random, user, said, value)
        if fact in state.misheard:  # the user's words, whatever they mean: nothing is made up
            return user, self._quote(language, state.said[fact])
        if fact in state.facts:
            return user, self._fill(language, fact, "recall", state.facts[fact])
        state.wanted = fact
        return user, section[f"{language} unknown"][0]

    def _asked_for(self, random: Random, told: Sequence[str]) -> str:
        """Mostly a fact that was told; else any, or one near to what was told."""
        if not told or random.random() < 0.1:
            return self._fact(random)
        fact = random.choice(told)
        if random.random() < 0.83:
            return fact
        return random.choice(next(group for group in NEAR if fact in group))

    def _about_user(self, random: Random, fact: str, language: str, kind: str) -> str:
        """A fact's line, to tell it or to ask for it, in other words and dress."""
        line = self._memory(random, fact, language, kind)
        aside = ASIDE_TOLD if kind == "tell" else ASIDE
        return self._dress(random, reword(random, line, self.alike[language]), language, aside)

    def _memory(self, random: Random, fact: str, language: str, kind: str) -> str:
        """A line of a fact's section, or one of the few that most people would say.

        Others may lose words, but none that tells which fact it is.
        """
        section = self.dialogues.memory[fact]
        if random.random() < COMMON:
            return random.choice(section[f"{language} common_{kind}"])
        line = random.choice(section[f"{language} {kind}"])
        return thin(random, line, self.telling_memory[language][fact])

    def _fact(self, random: Random) -> str:
        return "name" if random.random() < 0.33 else random.choice(list(self.dialogues.memory))

    def _quote(self, language: str, text: str) -> str:
        return self.dialogues.repeat[f"{language} said"][0].replace("{text}", text)

    def _fill(self, language: str, fact: str, kind: str, value: str) -> str:
        """What the tutor says about a fact, with its value."""
        return self.dialogues.memory[fact][f"{language} {kind}"][0].replace("{value}", value)

    def _dress(self, random: Random, text: str, language: str, aside: float = ASIDE) -> str:
        """A wording as somebody else would have typed it, `aside` of them beside a remark."""
        openers = self.dialogues.openers
        if random.random() < aside:
            parts = [text.rstrip("."), random.choice(openers[f"{language} aside"])]
            if random.random() < 0.3:
                parts.reverse()
            join = random.choice([" ", ", ", ", ", ". ", ". "]) if parts[0][-1].isalnum() else " "
            text = join.join(parts)
        if random.random() < 0.25:
            before = random.choice(openers[f"{language} before"])
            text = f"{before} {text[0].lower() + text[1:] if random.random() < 0.7 else text}"
        if random.random() < 0.15:
            after = random.choice(openers[f"{language} after"])
            join = random.choice([" ", ", ", ". "]) if text[-1].isalnum() else " "
            text = f"{text}{join}{after}"
        return relax(random, text, 0.4)


@dataclass
class _State:
    language: str
    topic: str | None = None
    topics: float = 1.0  # how many times as often they are asked about
    told: tuple[str, ...] = ()  # the facts that the last message told
    wanted: str | None = None  # the fact that the tutor has just asked for
    facts: dict[str, str] = field(default_factory=dict)
    last: str | None = None  # what the user said before
    said: dict[str, str] = field(default_factory=dict)  # fact -> the user's words
    misheard: set[str] = field(default_factory=set)  # facts that the reply did not understand


def plain(lines: Sequence[str]) -> list[str]:
    """The short ones."""
    return [line for line in lines if len(line.split()) <= PLAIN]


def others_of(groups: Sequence[str]) -> dict[str, list[str]]:
    """Word -> the others of its line.

    >>> others_of(["dog cat parrot"])["cat"]
    ['dog', 'parrot']
    """
    return {
        word.lower(): [other for other in group.split() if other != word]
        for group in groups
        for word in group.split()
    }


def telling_words(lines: dict[str, list[str]]) -> dict[str, frozenset[str]]:
    """The words of each subject's lines that tell it: who says one most likely speaks of it.

    >>> telling_words({"city": ["I live in Rome", "I live here"], "age": ["I am 7", "I am 8"]})
    {'city': frozenset({'live'}), 'age': frozenset({'am'})}
    """
    rates: dict[str, dict[str, float]] = defaultdict(dict)
    for subject, those in lines.items():
        for word, count in Counter(word for line in those for word in {*words_of(line)}).items():
            if count > 1:  # a word said once may be of the decoration
                rates[word][subject] = count / len(those)
    return {
        subject: frozenset(
            word for word, rate in rates.items() if rate.get(subject, 0) > 0.6 * sum(rate.values())
        )
        for subject in lines
    }


def lines_by_subject(dialogues: Dialogues) -> dict[str, list[str]]:
    """What the user and the system say, by what it is about: "en topic lora" -> its lines."""
    subjects: dict[str, list[str]] = {}
    for language in LANGUAGES:
        for name, topic in dialogues.topics.items():
            terms = topic[f"{language} terms"] * 10  # there are few, and each must tell its topic
            wordings = [*topic[f"{language} named"], *topic[f"{language} unnamed"]]
            subjects[f"{language} topic {name}"] = wordings + terms
        subjects[f"{language} unknown"] = [
            *dialogues.unknown[f"{language} user"],
            *dialogues.carriers[f"{language} things"],
        ]
        for group in (dialogues.small_talk, dialogues.follow_ups):
            for name, section in group.items():
                subjects[f"{language} {name}"] = section[f"{language} user"]
        for name, section in dialogues.memory.items():
            for kind in ("tell", "ask"):
                lines = [*section[f"{language} {kind}"], *section[f"{language} common_{kind}"]]
                lines = [line.replace("{value}", "") for line in lines]
                subjects[f"{language} {kind} {name}"] = lines
        for name, section in dialogues.styles.items():
            subjects[f"{language} style {name}"] = section.get(f"{language} system", [])
    return {subject: lines for subject, lines in subjects.items() if lines}


def texts(dialogues: Dialogues) -> Iterator[str]:
    """Every written line, for learning the tokenizer; replies weigh more: the model writes them."""
    groups: Sequence[dict[str, Sections]] = (
        dialogues.topics,
        dialogues.small_talk,
        dialogues.memory,
        dialogues.follow_ups,
        dialogues.styles,
    )
    sections = [section for group in groups for section in group.values()]
    for section in [*sections, dialogues.carriers, dialogues.unknown, dialogues.openers]:
        for name, lines in section.items():
            weight = 4 if name.split()[1] in ("answer", "short", "why", "example", "reply") else 1
            for line in lines * weight:
                yield line
                yield without_accents(line).lower()
