"""How well the tutor answers wordings that it was never shown: python -m bench quality.

The cases are in tests/held_out; held_out.py says which of them count. A reply belongs to the topic
whose written text it shares most words with (F1 of the words), and is right only if that is the
expected topic and the texts agree well. Nothing is looked up for the model: it generates, greedily.

Proof: tests/test_bench.py.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.chart import Chart
from bench.environment import environment
from bench.held_out import Case, Seen, read_cases, words_of
from bench.report import Record, Table
from chatbot.engines import Engine
from chatbot.tutor.corpus import FOLLOW_UPS, LANGUAGES, Dialogues

GROUPS = {  # group -> the part of its cases that should be right
    "named": 0.85,
    "unnamed": 0.50,
    "memory": 0.90,
    "not_told": 0.80,  # what memory costs: a fact that no message told is not made up
    "out_of_scope": 0.88,
    "style": 0.80,
    "follow_up": 0.60,
}
IN_SCOPE_REFUSED = 0.08  # at most
AGREES = 0.6  # F1 of the words, from which a reply is the text and no mixture of several
MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Text:
    """Something the tutor may say: of which topic, and which of its kinds."""

    topic: str
    kind: str
    words: Counter[str]


class Judge:
    """Says of which topic a reply is, by the dialogues that the tutor learned from."""

    def __init__(self, dialogues: Dialogues):
        self.dialogues = dialogues
        self.texts = {language: list(self._texts(language)) for language in LANGUAGES}
        self.styled = {
            (style, language): list(self._styled(style, language))
            for style in dialogues.styles
            for language in LANGUAGES
        }

    def nearest(self, texts: Sequence[Text], reply: str) -> tuple[Text, float]:
        """The text that shares most words with the reply, and the F1 of their words."""
        words = bag(reply)
        return max(((text, f1(words, text.words)) for text in texts), key=lambda pair: pair[1])

    def is_refusal(self, case: Case, reply: str) -> bool:
        """Whether the reply says that it does not know."""
        text, score = self.nearest(self.texts[case["language"]], reply)
        return text.topic == "unknown" and score >= AGREES

    def is_quote(self, case: Case, reply: str) -> bool:
        """Whether the reply says the user's words again, instead of the fact in them."""
        said = self.dialogues.repeat[f"{case['language']} said"][0]
        return reply.startswith(said.split("{text}")[0])

    def is_right(self, case: Case, reply: str) -> bool:
        """Whether the reply is what its group asks for."""
        group, language = case["group"], case["language"]
        if group == "memory":
            return all(says(reply, word) for word in case["expect"])
        if group == "out_of_scope":
            return self.is_refusal(case, reply)
        if group == "not_told":
            unknown = self.dialogues.memory[case["kind"]][f"{language} unknown"][0]
            return bag(reply) == bag(unknown)  # a fact that is made up shares many of its words
        if group == "style":
            pattern = self.dialogues.styles[case["style"]][f"{language} pattern"][0]
            first, last = re.split(r"\{.*\}", pattern)
            marked = reply.startswith(first) and reply.endswith(last)
            text, score = self.nearest(self.styled[case["style"], language], reply)
            return marked and text.topic == case["topic"] and score >= AGREES
        text, score = self.nearest(self.texts[language], reply)
        kinds = {case["kind"]} if group == "follow_up" else {"answer", *FOLLOW_UPS}
        return text.topic == case["topic"] and text.kind in kinds and score >= AGREES

    def _texts(self, language: str) -> Iterable[Text]:
        for name, topic in self.dialogues.topics.items():
            for kind in ("answer", *FOLLOW_UPS):
                yield Text(name, kind, bag(topic[f"{language} {kind}"][0]))
        yield Text("unknown", "reply", bag(self.dialogues.unknown[f"{language} reply"][0]))
        for intent, sections in self.dialogues.small_talk.items():
            yield Text(intent, "small_talk", bag(sections[f"{language} reply"][0]))

    def _styled(self, style: str, language: str) -> Iterable[Text]:
        pattern = self.dialogues.styles[style][f"{language} pattern"][0]
        for name, topic in self.dialogues.topics.items():
            kinds = {kind: topic[f"{language} {kind}"][0] for kind in ("answer", *FOLLOW_UPS)}
            yield Text(name, style, bag(pattern.format(**kinds)))


def check_groups(groups: Iterable[str]) -> None:
    """ValueError for a group that there is not."""
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")


def converse(engine: Engine, case: Case) -> str:
    """Play a case through: the model speaks wherever no reply is written, and at the end."""
    messages: list[dict[str, str]] = []
    for message in case["messages"]:
        if message["content"] is None:
            messages.append({"role": "assistant", "content": reply(engine, messages)})
        else:
            messages.append(message)
    return reply(engine, messages)


def reply(engine: Engine, messages: Sequence[dict[str, str]]) -> str:
    """One greedy reply."""
    ids = engine.render(messages)
    room = max(1, engine.context_length - len(ids))
    tokens = engine.stream(
        ids,
        max_new_tokens=min(MAX_NEW_TOKENS, room),
        temperature=0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=None,
    )
    return engine.decode(list(tokens)).strip()


def measure(
    engine: Engine, judge: Judge, groups: Iterable[str], *, limit: int | None = None
) -> tuple[Record, list[str]]:
    """Every case of these groups, and the wrong ones as readable lines.

    `limit` cases of each group in each language, or all.
    """
    from tqdm import tqdm

    cases, notes = unseen(groups, limit)
    failures, right, refused = [], Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    quoted = 0
    total = Counter((case["group"], case["language"]) for case in cases)
    for case in tqdm(cases, unit="case", disable=None):
        key = case["group"], case["language"]
        said = converse(engine, case)
        good = judge.is_right(case, said)
        right[key] += good
        quoted += good and case["group"] == "memory" and judge.is_quote(case, said)
        refused[key] += case["group"] in ("named", "unnamed") and judge.is_refusal(case, said)
        if not good:
            asked = case["messages"][-1]["content"]
            failures.append(f"{case['id']} {case.get('topic', '')}: {asked} -> {said}")
    table = Table("", ["group", "language", "cases", "right", "95 % interval", "aim", "met"])
    for (group, language), count in total.items():
        part, aim = right[group, language] / count, GROUPS[group]
        row = [group, language, count, _share(right[group, language], count)]
        row.append(interval(right[group, language], count))
        table.rows.append([*row, f">= {_percent(aim)}", "yes" if part >= aim else "no"])
    for language in LANGUAGES:
        keys = [key for key in total if key[1] == language and key[0] in ("named", "unnamed")]
        if keys:
            count, wrong = sum(total[k] for k in keys), sum(refused[k] for k in keys)
            met = "yes" if wrong / count <= IN_SCOPE_REFUSED else "no"
            row = ["in scope, refused", language, count, _share(wrong, count)]
            aim_text = f"<= {_percent(IN_SCOPE_REFUSED)}"
            table.rows.append([*row, interval(wrong, count), aim_text, met])
    if quoted:
        notes.append(f"Right in memory, and the user's whole message instead of a fact: {quoted}.")
    title = "Quality on held-out wordings"
    chart = Chart(
        "Right, of 100 held-out cases",
        [f"{group} {language}" for group, language in total],
        {
            "right": [100 * right[key] / count for key, count in total.items()],
            "aim": [100 * GROUPS[group] for group, _ in total],
        },
    )
    return Record(title, [table], notes, environment(), chart=chart), failures


def unseen(groups: Iterable[str], limit: int | None = None) -> tuple[list[Case], list[str]]:
    """The cases that count, `limit` of each group and language, and a note on those left out."""
    seen, cases, left_out = Seen.read(), [], Counter[str]()
    for group in groups:
        for language in LANGUAGES:
            written = [case for case in read_cases(group) if case["language"] == language]
            counting = [case for case in written if not seen.any_of(case)]
            left_out[group] += len(written) - len(counting)
            cases += counting[:limit]
    found = ", ".join(f"{count} of {group}" for group, count in left_out.items() if count)
    if not found:
        return cases, []
    return cases, [f"Left out, since a wording of theirs is in the dialogues too: {found}."]


def bag(text: str) -> Counter[str]:
    """The words of a text, without case and accents, and how often each occurs.

    >>> sorted(bag("La atención, la ATENCION").items())
    [('atencion', 2), ('la', 2)]
    """
    return Counter(words_of(text))


def says(reply: str, words: str) -> bool:
    """Whether the words stand in the reply, in any case, but not as a part of others.

    >>> says("Te llamas ANA.", "Ana"), says("Eso lo dejo para mañana.", "Ana")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", reply.casefold()) is not None


def f1(a: Counter[str], b: Counter[str]) -> float:
    """Harmonic mean of the parts of each that the other has: 1 for the same words.

    >>> f1(bag("one two three"), bag("two three four five"))
    0.5714285714285714
    """
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def interval(right: int, count: int) -> str:
    """Wilson's 95 % interval of a rate (Wilson 1927): honest for small counts and rates near 1.

    >>> interval(9, 10)
    '60–98 %'
    >>> interval(0, 20)
    '0–16 %'
    """
    z, p = 1.96, right / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    least, greatest = max(0.0, center - spread), min(1.0, center + spread)  # rounding passes them
    return f"{100 * least:.0f}–{100 * greatest:.0f} %"


def _share(right: int, count: int) -> str:
    """In per cent, rounded down: 84 of 96 miss an aim of 88 %, and must not read as 88 %."""
    return f"{1000 * right // count / 10:g} %"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
