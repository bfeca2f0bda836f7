"""The cases that measure the tutor, and whether it was in fact never shown their wordings.

They were written by another hand than the dialogues. Yet "why?" occurs to everybody: a case counts
only if none of its user messages is a line of the training files, whatever case, accents and signs,
and none is a line with something in its {hole}: another line of these files, or, in {value} and
{text}, where the training data invent names, any word or two; nor is it one of these with what the
training data put before or behind a message ("Hi,", "thanks"), or in the place of its words ("dog"
for "cat"), nor two that they put together ("I'm Ana and I live in Lima"). Of a case where nothing
was told only the last message must be new: the question.

Proof: tests/test_tutor.py.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chatbot.engines import TUTOR
from chatbot.tutor.corpus import JOINS, LANGUAGES, read_file

FOLDER = Path(__file__).parent.parent / "tests" / "held_out"
DIALOGUES = TUTOR / "dialogues"
LONGEST, LONGEST_INVENTED = 6, 2  # words in a hole
HOLE = "_"

Case = dict[str, Any]


def read_cases(group: str, folder: Path = FOLDER) -> list[Case]:
    """The cases of a group: id, language, messages, and what is expected."""
    lines = (folder / f"{group}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "group": group} for line in lines]


def wordings(case: Case) -> list[str]:
    """What the user says, which must be new; where nothing was told, only what is asked at last."""
    said = [message["content"] for message in case["messages"] if message["role"] == "user"]
    return said[-1:] if case["group"] == "not_told" else said


def words_of(text: str) -> list[str]:
    """The words of a text, without case, accents and signs.

    >>> words_of("¿La ATENCIÓN?")
    ['la', 'atencion']
    """
    letters = unicodedata.normalize("NFD", text.casefold())
    return re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c)))


AND = {word for joins in JOINS.values() for join in joins for word in words_of(join)}


class Seen:
    """The wordings that training can show: the files' lines, and what stands in their holes.

    >>> seen = Seen(["¿Qué es {term}?", "LoRA", "Me llamo {value}."])
    >>> [seen.holds(text) for text in ("que es lora", "me llamo Zimar", "¿Qué es Zimar?", "lo")]
    [True, True, False, False]
    >>> Seen(["LoRA"], before=["Hi,"], after=["thanks!"]).holds("hi LoRA, thanks")
    True
    >>> Seen(["My dog is {value}"], alike=["dog cat"]).holds("My cat is Zimar")
    True
    >>> Seen([], together=["I am {value}", "I like {value}"]).holds("I like Zimar and I am Ana")
    True
    """

    def __init__(
        self,
        lines: Iterable[str],
        before: Iterable[str] = (),
        after: Iterable[str] = (),
        alike: Iterable[str] = (),
        together: Iterable[str] = (),
    ):
        groups = [words_of(group) for group in alike]
        self.first = {word: group[0] for group in groups for word in group}  # of those alike
        self.before, self.after = (
            {" ".join(self._words(text)) for text in opener} for opener in (before, after)
        )
        self.lines: set[str] = set()
        self.frames: dict[str, bool] = {}  # a line with its hole, and whether names are invented
        for line in lines:
            words, holes = self._frame(line)
            if not holes:
                self.lines.add(words)
            elif words != HOLE:  # a hole alone says nothing
                self.frames[words] = "{value}" in line or "{text}" in line
        self.together = {self._frame(line)[0]: True for line in together}  # the same, of such pairs

    @classmethod
    def read(cls, folder: Path = DIALOGUES) -> "Seen":
        """All lines of a directory's text files but the headings."""
        lines = (
            line
            for path in sorted(folder.rglob("*.txt"))
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        openers = read_file(folder / "openers.txt")["openers"]
        before, after = (
            [
                line
                for language in LANGUAGES
                for line in openers[f"{language} {place}"] + openers[f"{language} aside"]
            ]
            for place in ("before", "after")
        )
        groups = read_file(folder / "alike.txt")["alike"]
        alike = [group for language in LANGUAGES for group in groups[f"{language} words"]]
        lines = (line for line in lines if not line.startswith(("# ", "[")))
        facts = read_file(folder / "memory.txt").values()
        together = [
            line
            for sections in facts
            for language in LANGUAGES
            for line in sections[f"{language} common_tell"]
        ]
        return cls(lines, before, after, alike, together)

    def holds(self, text: str) -> bool:
        """Whether training can show this wording."""
        words = self._words(text)
        n = len(words)
        starts = [i for i in range(n) if i == 0 or " ".join(words[:i]) in self.before]
        ends = [i for i in range(1, n + 1) if i == n or " ".join(words[i:]) in self.after]
        return any(self._holds(words[start:end]) for start in starts for end in ends if start < end)

    def _words(self, text: str) -> list[str]:
        """The bare words, of words that are alike always the same one."""
        return [self.first.get(word, word) for word in words_of(text)]

    def _frame(self, line: str) -> tuple[str, int]:
        """A line's bare words, and how many of them are holes."""
        text, holes = re.subn(r"\{(term|thing|value|text)\}", f" {HOLE} ", line)
        return " ".join(self._words(text)), holes

    def _holds(self, words: list[str]) -> bool:
        """The same of bare words that nothing stands before or behind."""
        if " ".join(words) in self.lines or self._fits(words, self.frames):
            return True
        return any(
            self._fits(words[:i], self.together)
            and self._fits(words[i + (words[i] in AND) :], self.together)
            for i in range(1, len(words))
        )

    def _fits(self, words: list[str], frames: dict[str, bool]) -> bool:
        """Whether the words are one of these lines with something in its hole."""
        for start in range(len(words)):
            for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
                frame = " ".join([*words[:start], HOLE, *words[end:]])
                known = " ".join(words[start:end]) in self.lines
                invented = frames.get(frame, False) and end - start <= LONGEST_INVENTED
                if frame in frames and (known or invented):
                    return True
        return False

    def any_of(self, case: Case) -> bool:
        """Whether training can show one of the wordings that the case is about."""
        return any(self.holds(text) for text in wordings(case))
