"""Text fit for a screen: nothing that steers it, and lines broken between words.

    piece -> words and spaces -> a word is shown when it has ended -> on the next line if it is long

A terminal by itself breaks a line wherever it is full, in the middle of a word, though the text
comes in pieces. And it obeys control characters, which a model may write too. A broken byte
of the input reaches us as a lone surrogate, which no UTF-8 output takes.

Proof: tests/test_wrap.py.
"""

import re
import unicodedata

PART = re.compile(r"\n|[^\S\n]+|\S+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with a sign in place of each control character but tab and line break, and of each
    lone surrogate.

    >>> printable("a \\x1b[2J\\tb")
    'a �[2J\\tb'
    """
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class WordWrap:
    """Text for a screen of `width` columns. What is held back is at most one word.

    >>> wrap = WordWrap(10)
    >>> [wrap.feed(text) for text in ("a to", "ken is", " a number")], wrap.flush()
    (['a', ' token', ' is\\na'], ' number')
    """

    def __init__(self, width: int):
        self.width = width
        self._column = 0  # of the screen, after all that was shown
        self._space = ""  # between that and the word, not shown at the end of a line
        self._word = ""
        self._long = False  # what was shown last is the beginning of a word longer than a line

    def feed(self, text: str) -> str:
        """What can be shown now that `text` has come too."""
        shown = ""
        for part in PART.findall(text):
            if part == "\n":
                shown += self.flush() + part
                self._column = 0
            elif part.isspace():
                shown += self._show_word()
                self._space += part
            else:
                self._word += part
                columns = _columns(self._word)
                if columns > self.width or columns > len(self._word):
                    shown += self._show_word()  # too long for a line, or of a script without spaces
        return shown

    def flush(self) -> str:
        """The word that was held back, at the end or before a line break."""
        shown = self._show_word()
        self._space = ""
        return shown

    def _show_word(self) -> str:
        if not self._word:
            return ""
        between, size = self._space, _columns(self._word)
        begins = between or not self._long
        if begins and self._column and self._column + _columns(between) + size > self.width:
            between, self._column = "\n", 0
        else:
            self._column += _columns(between)
        self._column += size
        self._long = size > self.width
        if self._column > self.width:  # the screen itself has broken it
            self._column = (self._column - 1) % self.width + 1
        shown = between + self._word
        self._space = self._word = ""
        return shown


def _columns(text: str) -> int:
    """How wide a text is on a screen: East Asian signs and emoji take two columns, marks none."""
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.combining(sign) > 0 for sign in text)
