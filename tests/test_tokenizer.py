"""Step 2: the ids of transformers, the merges of the tokenizers library, whole characters."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer

import hf_bridge.tokenizer
import minigpt.tokenizer
from hf_bridge import Tokenizer as BridgeTokenizer
from minigpt import Tokenizer
from minigpt.tokenizer import StreamDecoder, train

CORPORA = {
    "prose": [
        "The attention of a model, the model's attention: it's what they've all got.",
        "¿Qué es la caché KV? Guarda las claves y los valores de los tokens ya leídos.",
        "Ein größeres Modell – 1,5 Milliarden Parameter – braucht mehr Zeit.",
        "日本語のテキスト と русский текст и 한국어 텍스트",
    ]
    * 3,
    "repeats": ["aaaa aaa aa a " * 5, "ababababab abab", "\n\n\n   \t  x"],
    "ties": ["ab cd ef gh ij kl", "ij kl ab cd ef gh"],
}
# Blocks whose letters, digits and signs both Unicode tables class alike, from many scripts.
RANGES = [
    (0x20, 0x7F), (0xA1, 0x17F), (0x386, 0x3CE), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A),
    (0x905, 0x939), (0xE01, 0xE30), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x4FFF),
    (0xAC00, 0xAD00), (0x660, 0x669), (0x2010, 0x2027), (0x2190, 0x21FF), (0x1F600, 0x1F64F),
    (0x300, 0x340), (0xB2, 0xB9), (0xBC, 0xBE),
]  # fmt: skip
PIECES = [
    "'s",
    "'LL",
    "’s",
    " ",
    "  ",
    "\n",
    "\t ",
    "\u00a0",
    "\u3000",
    "<|endoftext|>",
    "\x1c",
    "é",
]


def fuzz(count: int) -> list[str]:
    """Random strings of letters, digits, signs and blanks in many scripts."""
    chance = random.Random(0)

    def piece() -> str:
        if chance.random() < 0.4:
            return chance.choice(PIECES)
        low, high = chance.choice(RANGES)
        return "".join(chr(chance.randint(low, high)) for _ in range(chance.randint(1, 5)))

    return ["".join(piece() for _ in range(chance.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train(CORPORA["prose"], vocab_size=420, special_tokens=["<|endoftext|>"])


@pytest.fixture(scope="module")
def saved(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save_pretrained(folder)
    return folder


def test_ids_equal_transformers_on_fuzzed_text(ours: Tokenizer, saved: Path) -> None:
    theirs = GPT2Tokenizer.from_pretrained(saved)
    texts = fuzz(20_000)
    expected = theirs(texts, split_special_tokens=True).input_ids
    assert [ours.encode(text) for text in texts] == expected


def test_special_tokens_equal_transformers_where_allowed(ours: Tokenizer, saved: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    text = "one<|endoftext|> two <|endoftext|><|endoftext|>"
    assert ours.encode(text, allow_special=True) == theirs.encode(text)
    assert 0 not in ours.encode(text)
    assert ours.decode(ours.encode(text, allow_special=True)) == text
    assert "<|" not in ours.decode(theirs.encode(text), skip_special_tokens=True)


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("vocab_size", [258, 280, 400])
def test_training_learns_the_librarys_merges(corpus: str, vocab_size: int) -> None:
    texts = CORPORA[corpus]
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(
        texts, vocab_size, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False
    )
    trained = train(texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"])
    assert trained.vocab == library.get_vocab()


def test_decode_undoes_encode(ours: Tokenizer) -> None:
    for text in ["", *fuzz(500), "\x00\x01", "a" * 5000]:
        assert ours.decode(ours.encode(text)) == text


def test_a_stream_never_shows_half_a_character(ours: Tokenizer) -> None:
    for text in ["naïve café", "日本語 🙂🙃", "a�b", "한국어"]:
        decoder = StreamDecoder(ours)
        pieces = [decoder.feed(i) for i in ours.encode(text)]
        assert "".join(pieces) == text
        assert decoder.flush() == ""
        assert "�" not in "".join(pieces).replace(text, "")
        assert text.startswith(pieces[0])


def test_a_stream_that_ends_inside_a_character_says_so(ours: Tokenizer) -> None:
    decoder = StreamDecoder(ours)
    ids = train([], vocab_size=256).encode("🙂")[:2]
    plain = StreamDecoder(train([], vocab_size=256))
    assert [plain.feed(i) for i in ids] == ["", ""]
    assert plain.flush() == "�"
    assert decoder.flush() == ""


def test_a_stream_equals_decoding_at_once_even_of_broken_bytes() -> None:
    tokenizer = train([], vocab_size=256)
    chance = random.Random(1)
    for _ in range(200):
        ids = [chance.randrange(256) for _ in range(12)]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_vocab_and_merges_files_read_as_tokenizer_json(ours: Tokenizer, tmp_path: Path) -> None:
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(
        CORPORA["prose"], 420, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.save_model(str(tmp_path))
    read = Tokenizer.from_pretrained(tmp_path)
    assert (read.vocab, read.merges) == (ours.vocab, ours.merges)
    assert read.eos_token_id == ours.eos_token_id == 0
    bridge, text = BridgeTokenizer.from_pretrained(tmp_path), " ".join(CORPORA["prose"])
    assert bridge.encode(text) == ours.encode(text)


def test_what_is_saved_is_read_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    read = Tokenizer.from_pretrained(tmp_path)
    for name in ("vocab", "merges", "special_tokens", "eos_token", "chat_template"):
        assert getattr(read, name) == getattr(tokenizer, name)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer)
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.eos_token_id == tokenizer.eos_token_id


def test_what_cannot_be_encoded_or_decoded_is_refused(ours: Tokenizer) -> None:
    with pytest.raises(ValueError, match="text must be valid Unicode"):
        ours.encode("a\ud800b")
    with pytest.raises(ValueError, match=f"one of the vocabulary's {len(ours)}, got 99999"):
        ours.decode([5, 99999])
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*, got 200"):
        train(["x"], vocab_size=200, special_tokens=["<|endoftext|>"])
    with pytest.raises(ValueError, match="must hold every byte and merge, got none for 'ab'"):
        Tokenizer(train([], vocab_size=256).vocab, [("a", "b")])


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer: it needs tokenizer\.json, or vocab"):
        Tokenizer.from_pretrained(tmp_path)


def change(folder: Path, part: str, name: str, value: object) -> None:
    """Set one entry of a tokenizer.json, or take it out (None)."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    inside = content[part] if part else content
    inside[name] = value
    if value is None:
        del inside[name]
    path.write_text(json.dumps(content), encoding="utf-8")


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def older(folder: Path, merges: bytes) -> None:
    """The layout of 2019, with these merges."""
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_bytes(merges)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("side", [Tokenizer, BridgeTokenizer], ids=["minigpt", "hf_bridge"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil("tokenizer.json", b"{"), "tokenizer.json is not valid JSON"),
        (spoil("tokenizer.json", b"[]"), "tokenizer.json (is damaged|must be a byte-level BPE)"),
        (lambda f: change(f, "model", "merges", None), r"tokenizer.json is damaged \(no .*merges"),
        (lambda f: change(f, "model", "vocab", {}), "(every byte|is damaged)"),
        (lambda f: older(f, b"#version: 0.2\na b c\n"), r"is damaged \("),
        (lambda f: older(f, b"\xff\xfe\n"), r"is damaged \("),
        (spoil("tokenizer_config.json", b"[]"), r"is damaged \("),
        (spoil("tokenizer_config.json", b'{"eos_token": "<|no|>"}'),
         r"eos_token must be one of the special tokens, got '<\|no\|>'"),
        (spoil("tokenizer_config.json", b'{"add_prefix_space": true}'),
         "tokenizer_config.json: add_prefix_space must be false, this is another tokenizer"),
        (spoil("chat_template.jinja", b"\xff\xfe"), r"is damaged \("),
        (lambda f: change(f, "model", "type", "WordPiece"), "must be a byte-level BPE as GPT-2's"),
        (lambda f: change(f, "model", "ignore_merges", True), "must be a byte-level BPE"),
        (lambda f: change(f, "pre_tokenizer", "add_prefix_space", True), "must be a byte-level"),
        (lambda f: change(f, "pre_tokenizer", "use_regex", False), "must be a byte-level BPE"),
        (lambda f: change(f, "", "normalizer", {"type": "NFC"}), "must be a byte-level BPE"),
    ],
)  # fmt: skip
def test_files_that_would_give_other_ids_or_none_are_refused(
    ours: Tokenizer, tmp_path: Path, side: type, damage: Callable[[Path], object], message: str
) -> None:
    ours.save_pretrained(tmp_path)
    side.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        side.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("side", [Tokenizer, BridgeTokenizer], ids=["minigpt", "hf_bridge"])
def test_the_published_file_of_gpt2_need_not_name_its_model(
    ours: Tokenizer, tmp_path: Path, side: type
) -> None:
    ours.save_pretrained(tmp_path)
    change(tmp_path, "model", "type", None)
    change(tmp_path, "pre_tokenizer", "use_regex", None)
    text = "The model's attention<|endoftext|>"
    assert side.from_pretrained(tmp_path).encode(text) == ours.encode(text)


@pytest.mark.parametrize("side", [Tokenizer, BridgeTokenizer], ids=["minigpt", "hf_bridge"])
def test_an_end_token_that_is_only_named_is_special(
    ours: Tokenizer, tmp_path: Path, side: type
) -> None:
    ours.save_pretrained(tmp_path)
    change(tmp_path, "", "added_tokens", [])
    named = '{"eos_token": {"content": "<|endoftext|>"}}'
    (tmp_path / "tokenizer_config.json").write_text(named)
    read = side.from_pretrained(tmp_path)
    assert read.eos_token_id == ours.eos_token_id == 0
    assert read.eos_token_id not in read.encode("<|endoftext|>")
    with pytest.raises(ValueError, match="eos_token must be one of the special tokens, got 'x'"):
        side(ours.vocab, ours.merges, eos_token="x")


@pytest.mark.parametrize("side", [Tokenizer, BridgeTokenizer], ids=["minigpt", "hf_bridge"])
def test_an_end_token_in_the_vocabulary_needs_no_name(
    ours: Tokenizer, tmp_path: Path, side: type
) -> None:
    ours.save_pretrained(tmp_path)
    change(tmp_path, "", "added_tokens", [])
    (tmp_path / "tokenizer_config.json").unlink()
    read = side.from_pretrained(tmp_path)
    assert (read.eos_token, read.eos_token_id) == ("<|endoftext|>", 0)
    assert read.special_tokens == ours.special_tokens


BOTH = pytest.mark.parametrize(
    "step", [minigpt.tokenizer, hf_bridge.tokenizer], ids=["minigpt", "hf_bridge"]
)


@BOTH
def test_no_text_becomes_an_added_token_and_those_that_are_not_special_are_shown(
    ours: Tokenizer, saved: Path, tmp_path: Path, step
) -> None:
    theirs = GPT2Tokenizer.from_pretrained(saved)
    theirs.add_tokens(["<think>"])
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    theirs.save_pretrained(tmp_path / "theirs")
    think, text = len(ours), "a<think>b<|endoftext|>"
    a, b = ours.encode("a")[0], ours.encode("b")[0]
    for name in ("theirs", "again"):
        read = step.Tokenizer.from_pretrained(tmp_path / name)
        assert read.special_tokens == {"<|endoftext|>": 0, "<think>": think}
        assert read.encode(text) == ours.encode(text)
        ids = read.encode(text, allow_special=True)
        assert ids == [a, think, b, 0]
        assert read.decode(ids) == text
        assert read.decode(ids, skip_special_tokens=True) == "a<think>b"
        decoder = step.StreamDecoder(read, skip_special_tokens=True)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == "a<think>b"
        read.save_pretrained(tmp_path / "again")


@BOTH
def test_special_tokens_share_no_id(step) -> None:
    texts = ["día tras día"] * 3
    for special_tokens in (["<|e|>", "<|e|>"], ["A"], [""]):
        with pytest.raises(ValueError, match="must be distinct, not empty and no byte's letter"):
            step.train(texts, vocab_size=300, special_tokens=special_tokens)
    vocab = train([], vocab_size=256).vocab
    specials = {"<|b|>": 256, "<|a|>": 257}
    made = step.Tokenizer(vocab, [], specials, eos_token="<|a|>", shown=["<|b|>"])
    assert (made.special_tokens, made.eos_token_id) == (specials, 257)
    assert made.decode([256, 257], skip_special_tokens=True) == "<|b|>"


def test_the_bridge_refuses_ids_that_its_library_would_change(ours: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"or have the ids that follow it, got {'<\|b\|>': 999}"):
        BridgeTokenizer(ours.vocab, ours.merges, {"<|b|>": 999})


@pytest.mark.parametrize("side", [Tokenizer, BridgeTokenizer], ids=["minigpt", "hf_bridge"])
def test_of_several_templates_the_default_is_read_or_none(
    ours: Tokenizer, tmp_path: Path, side: type
) -> None:
    ours.save_pretrained(tmp_path)
    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": several}))
    assert side.from_pretrained(tmp_path).chat_template == "b"
    path.write_text(json.dumps({"chat_template": several[:1]}))
    assert side.from_pretrained(tmp_path).chat_template is None
