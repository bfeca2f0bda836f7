"""Lines that break between words, whatever pieces the text comes in."""

import random
import re
import textwrap

import pytest

from chatbot.wrap import WordWrap, printable

TEXT = (
    "La atención compara cada token con los anteriores.  Two spaces, a tab\tand\n\n    an indented "
    "line;\nuna palabraquenocabeenningunalíneadelapantalla y otra. 你好，世界，"
    "这是一个没有空格的句子。 e\u0301te\u0301 🙂 fin "
)


def wrapped(text: str, width: int, size: int) -> str:
    wrap = WordWrap(width)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    return "".join(map(wrap.feed, pieces)) + wrap.flush()


@pytest.mark.parametrize("width", [1, 5, 20, 80])
def test_pieces_make_no_difference_to_words_and_lose_nothing_but_spaces(width: int) -> None:
    spaced = re.sub(r"[\u4e00-\u9fff，。]", "", TEXT)  # a sign alone may be a piece of a line
    whole = wrapped(spaced, width, len(spaced) + 1)
    for size in range(1, 12):
        assert wrapped(spaced, width, size) == whole
        assert "".join(wrapped(TEXT, width, size).split()) == "".join(TEXT.split())


@pytest.mark.parametrize("width", [12, 40, 79])
def test_plain_text_is_broken_as_by_textwrap(width: int) -> None:
    generator = random.Random(0)
    for _ in range(50):
        words = ["x" * generator.randint(1, 12) for _ in range(60)]
        assert wrapped(" ".join(words), width, 3).split("\n") == textwrap.wrap(
            " ".join(words), width
        )


def test_line_breaks_of_the_text_stay_and_so_do_its_indents() -> None:
    assert wrapped("if x:\n    return y\n\nend", 40, 4) == "if x:\n    return y\n\nend"
    assert wrapped("12345 \n789", 5, 2) == "12345\n789"


def test_a_word_longer_than_the_screen_is_broken_by_the_screen_alone() -> None:
    wrap = WordWrap(10)
    pieces = [wrap.feed(piece) for piece in ("a ", "bcdefghijkl", "mno", "pq r", " st", " u vwx ")]
    assert "".join(pieces) + wrap.flush() == "a\nbcdefghijklmnopq r\nst u vwx"


def test_signs_of_two_columns_are_shown_at_once_and_counted_as_two() -> None:
    wrap = WordWrap(6)
    assert [wrap.feed(sign) for sign in "你好世界"] == ["你", "好", "世", "\n界"]


def test_a_word_is_shown_when_it_has_ended_and_not_before() -> None:
    wrap = WordWrap(20)
    assert [wrap.feed(piece) for piece in ("at", "tention", " is", " ")] == [
        "",
        "",
        "attention",
        " is",
    ]


def test_what_cannot_be_written_is_not_printed() -> None:
    assert printable("\ud800caf\udce9\udfff") == "\ufffdcaf\ufffd\ufffd"


def test_what_steers_a_terminal_is_not_printed() -> None:
    signs = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    kept = printable(f"á{signs}ñ")
    assert kept == "á" + "\ufffd" * 9 + "\t\n" + "\ufffd" * 21 + "\ufffd" * 33 + "ñ"
