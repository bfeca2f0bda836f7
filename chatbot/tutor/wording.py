"""A wording as somebody else would have typed it, and names that nobody has.

What the tutor is asked must not hang on a letter, a sign or a single word: case, accents and signs
vary, letters are swapped, and words are left out, moved, exchanged for others of their kind, or
taken from an earlier message. So a wording is hardly ever seen twice.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from random import Random

# fmt: off
SYLLABLES = [
    "a", "e", "i", "o", "u", "ba", "be", "bo", "ca", "ce", "co", "da", "de", "di", "do", "fa", "fe",
    "ga", "go", "ha", "ja", "jo", "ka", "ke", "ki", "la", "le", "li", "lo", "lu", "ma", "me", "mi",
    "mo", "na", "ne", "ni", "no", "pa", "pe", "po", "qui", "ra", "re", "ri", "ro", "sa", "se", "si",
    "so", "ta", "te", "ti", "to", "tu", "va", "ve", "vi", "vo", "wa", "xi", "ya", "yo", "za", "zo",
    "bra", "cla", "dro", "fri", "gue", "tra", "pli", "ster", "rond", "kwa", "zhe", "shi", "chu",
    "thi", "lan", "ber", "mar", "ton", "dor", "win", "gar", "nes", "kov", "sky", "ez", "ic", "an",
    "el", "or", "á", "é", "í", "ó", "ú", "ña", "ñe", "ñi", "ño", "ría", "lía", "món", "rés", "zül",
    "jör", "gö", "nå", "sø", "ça", "ção", "łu", "ši", "žan", "rhys", "schw", "hrv", "krz", "ngu",
    "mgu", "gwy", "szt", "tte", "nna", "mm", "ll", "rr", "ck", "th", "wh", "ph", "tz", "x", "q",
]
# fmt: on
LETTERS = "aabcdeefghiijklmnñoopqrstuuvwxyzáéíóúü"
JOINS = (" ", " ", "-", "'")


def invent_name(random: Random) -> str:
    """A name that nobody has: the tutor must copy names, not know them."""
    name = _invent_word(random)
    if random.random() < 0.3:
        name += random.choice(JOINS) + _invent_word(random)
    return name


def _invent_word(random: Random) -> str:
    """Mostly one that could be said; the others are cut into more tokens, to be copied too."""
    parts = random.choices(SYLLABLES, k=random.randint(1, 4))
    if random.random() < 0.2:
        parts = random.choices(LETTERS, k=random.randint(2, 7))
    return "".join(parts).capitalize()


def words_of(text: str) -> list[str]:
    """The words of a text, bare: small letters, no accents, no signs.

    >>> words_of("¿Qué es LoRA?")
    ['que', 'es', 'lora']
    """
    return re.findall(r"\w+", without_accents(text.lower()))


def thin(random: Random, text: str, kept: frozenset[str] = frozenset()) -> str:
    """Leave out or move some words, but none of `kept`: what is asked hangs on no single word."""
    words = text.split(" ")
    if random.random() < 0.6 or len(words) < 3:
        return text
    rate = random.choice([0.1, 0.2, 0.35])
    words = [
        word
        for word in words
        if random.random() > rate or "{" in word or not kept.isdisjoint(words_of(word))
    ]
    if random.random() < 0.2:
        order = [i + 3 * random.random() for i in range(len(words))]
        words = [word for _, word in sorted(zip(order, words, strict=True))]
    return " ".join(words) if len(words) > 1 else text


def mumble(random: Random, text: str, kept: str) -> str:
    """Leave out each word with a chance of 20 to 60 %, but not `kept`, which stands in the text.

    >>> mumble(Random(2), "Hello, my name is Ana and I am new here", "Ana")
    'Hello, is Ana and I new here'
    """
    rate = random.uniform(0.2, 0.6)
    words = text.replace(kept, "\0").split(" ")
    heard = [word for word in words if "\0" in word or random.random() > rate]
    return " ".join(heard).replace("\0", kept)


def echo(random: Random, text: str, said: str, value: str) -> str:
    """Put one to four words of what was `said`, but not the value, somewhere into a text.

    >>> echo(Random(7), "What is my name?", "Everybody at work calls me Ana", "Ana")
    'What is my name? at work calls me'
    """
    parts = [part.split() for part in said.split(value)]
    words = random.choice([part for part in parts if part] or [[]])
    start = random.randrange(len(words) or 1)
    again = words[start : start + random.randint(1, 4)]
    whole = text.split(" ")
    place = random.choice([len(whole), len(whole), 0, random.randint(0, len(whole))])
    return " ".join([*whole[:place], *again, *whole[place:]])


def reword(random: Random, text: str, alike: Mapping[str, Sequence[str]]) -> str:
    """In one text of three, put words of the same kind in the place of half of those in `alike`.

    >>> reword(Random(2), "My dog is called {value}", {"dog": ["cat"], "called": ["named"]})
    'My cat is called {value}'
    """
    if random.random() < 0.65:
        return text

    def other(match: re.Match[str]) -> str:
        word = match[0]
        if word.lower() not in alike or random.random() < 0.5:
            return word
        new = random.choice(alike[word.lower()])
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"(?<!\{)\b\w+", other, text)


def casing(random: Random, term: str) -> str:
    """A term in small letters, capitals, or as it was."""
    way = random.random()
    if way < 0.2:
        return term.lower()
    if way < 0.35:
        return term[0].upper() + term[1:]
    return term.upper() if way < 0.45 else term


def contract(text: str) -> str:
    """Spanish joins de and a with el.

    >>> contract("¿Para qué sirve eso de el relleno?")
    '¿Para qué sirve eso del relleno?'
    """
    return re.sub(r"\b(de|a) el\b", r"\1l", text)


def relax(random: Random, text: str, rate: float) -> str:
    """Type carelessly: with probability `rate` lose case, accents or signs; seldom a letter."""
    if random.random() < rate:
        if random.random() < 0.5:
            text = text.lower()
        if random.random() < 0.5:
            text = without_accents(text)
        if random.random() < 0.6:
            text = text.replace("¿", "").replace("¡", "")
        if random.random() < 0.5:
            text = text.rstrip("?.! ") or text
    elif random.random() < 0.03:
        text = re.sub(r"[^{}]+(?![^{]*\})", lambda match: match[0].upper(), text)
    if random.random() < rate / 4:
        text = mistype(random, text)
    return text


def without_accents(text: str) -> str:
    """á becomes a and ü u, as people type in haste; ñ stays."""
    letters = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(c for c in letters if c not in "\u0301\u0308"))


def mistype(random: Random, text: str) -> str:
    """Swap, drop or double one letter in the middle of a word."""
    spots = [m.start() + 1 for m in re.finditer(r"[^\W\d_]{4,}", text) if "{" not in m[0]]
    spots = [i for i in spots if "{" not in text[max(0, i - 2) : i]]  # not inside a {value}
    if not spots:
        return text
    i = random.choice(spots) + random.randint(0, 1)
    way = random.randrange(3)
    if way == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + text[i + 1 :] if way == 1 else text[:i] + text[i] + text[i:]
