"""Step 13: text to chunks to batches, ours against the tokenizers and collators of the library."""

import json
from collections import Counter
from itertools import chain, count
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_bridge import batches as their_batches
from hf_bridge import corpus as their_corpus
from hf_bridge import data as theirs
from hf_bridge.tokenizer import Tokenizer as HFTokenizer
from minigpt import GPT, GPTConfig, Tokenizer, batches, corpus
from minigpt import data as ours
from minigpt.batches import Batches, Causal, Masked, mask_chunks, seeded
from minigpt.optimize import summed_loss
from minigpt.tokenizer import WORD

BOTH = pytest.mark.parametrize("side", ["minigpt", "hf_bridge"])
ROWS = [{"input_ids": list(range(10 * i, 10 * i + 3 + i))} for i in range(5)]


def read(side: str, path: Path, **options) -> list[str]:
    module = corpus if side == "minigpt" else their_corpus
    return ["".join(pieces) for pieces in module.read_documents(path, **options)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Cleaning


def test_cleaning_is_what_the_librarys_normalizers_do():
    random = Random(0)
    signs = [*"aé¿ñ \t\n\r\0\x07\x7f\x85\ufeff日🙂ﬁ²", "e\u0301", "n\u0303", "\r\n", "\u212b"]
    for _ in range(300):
        text = "".join(random.choices(signs, k=random.randrange(20)))
        for ascii_only in (False, True):
            clean = corpus.clean(text, ascii_only=ascii_only)
            assert clean == their_corpus.clean(text, ascii_only=ascii_only)
            assert corpus.clean(clean, ascii_only=ascii_only) == clean
            assert clean.isascii() or not ascii_only


def test_a_file_is_a_document_and_so_is_a_line_of_jsonl(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"uno\r\ndos")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.jsonl").write_text('{"text": "tres"}\n{"text": "cuatro"}\n')
    (tmp_path / "d.bin").write_bytes(b"\0")
    for side in ("minigpt", "hf_bridge"):
        assert read(side, tmp_path) == ["tres", "cuatro", "uno\ndos"]
        assert read(side, tmp_path / "b.txt") == ["uno\ndos"]


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_pieces_of_a_file_have_the_tokens_of_the_whole(ascii_only, tmp_path, monkeypatch):
    random = Random(0)
    signs = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "casa",
        "é",
        "e\u0301",
        "'s",
        "'",
        "12",
        "日",
        ".",
        "\x07",
        "´",
    ]
    for block in (7, 64):
        monkeypatch.setattr(corpus, "BLOCK", block)
        for _ in range(30):
            text = "".join(random.choices(signs, k=200))
            (tmp_path / "a.txt").write_bytes(text.encode())
            documents = corpus.read_documents(tmp_path / "a.txt", ascii_only=ascii_only)
            (pieces,) = map(list, documents)
            whole = corpus.clean(text, ascii_only=ascii_only)
            assert "".join(pieces) == whole
            # Tokens are made inside of words: whatever the merges, equal words are equal tokens.
            assert list(chain.from_iterable(map(WORD.findall, pieces))) == WORD.findall(whole)
            assert len(pieces) > 3


def test_a_corpus_is_read_in_pieces(tmp_path):
    text = "una línea\n" * 400_000
    (tmp_path / "a.txt").write_text(text)
    (pieces,) = corpus.read_documents(tmp_path / "a.txt")
    lengths = [len(piece) for piece in pieces]
    assert sum(lengths) == len(text)
    assert max(lengths) <= corpus.BLOCK + 4096


@BOTH
@pytest.mark.parametrize(
    "content, message",
    [
        (b"text\0more", r"a\.txt must be text, got a zero byte at 4"),
        (b"ol\xe9", r"a\.txt must be UTF-8 text, got byte 0xe9 at 2"),
    ],
)
def test_binary_files_are_refused_with_the_place(side, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 3)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(side, tmp_path)


@BOTH
def test_corpora_that_are_none_are_refused(side, tmp_path):
    with pytest.raises(ValueError, match=r"no file or directory '.*nowhere': check the path"):
        read(side, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no text: no file ends in \.txt, \.md, \.jsonl"):
        read(side, tmp_path)


@BOTH
def test_an_empty_path_is_not_the_working_directory(side, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("uno")
    monkeypatch.chdir(tmp_path)
    assert read(side, Path(".")) == ["uno"]
    module = corpus if side == "minigpt" else their_corpus
    with pytest.raises(ValueError, match="no file or directory '': check the path"):
        module.find_files("")


@BOTH
@pytest.mark.parametrize(
    "line",
    [
        '{"txt": "y"}',
        '{"text": 5}',
        '{"text": null}',
        '{"text": "half \\ud800"}',
        '{"prompt": "p", "completion": "c"}',
        '["text"]',
        '"text"',
        "{",
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_line_of_jsonl_without_text_is_named(side, line, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:2 must be \{"text": …\}, got ') as caught:
        read(side, tmp_path)
    assert line[:9] in str(caught.value)


@BOTH
def test_blank_lines_and_a_byte_order_mark_are_no_rows_of_jsonl(side, tmp_path):
    text = '\ufeff{"text": "the word \\"completion\\""}\n\n{"text": "completion"}\r\n \n'
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    want = ['the word "completion"', "completion"]
    assert read(side, tmp_path) == want
    module = corpus if side == "minigpt" else their_corpus
    assert list(module.read_pairs(tmp_path)) == [("", text) for text in want]


@pytest.mark.parametrize(
    "line, name",
    [
        ('{"completion": "c"}', "prompt"),
        ('{"prompt": 5, "completion": "c"}', "prompt"),
        ('{"prompt": "p", "completion": [1]}', "completion"),
        ('{"prompt": "p"}', "text"),
    ],
)
@BOTH
def test_a_pair_that_is_none_is_named_with_what_it_lacks(side, line, name, tmp_path):
    module = corpus if side == "minigpt" else their_corpus
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ValueError, match=rf'a\.jsonl:1 must be \{{"{name}": …\}}, got '):
        list(module.read_pairs(tmp_path))


# Chunks


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    random = Random(0)
    for name in "abc":
        words = random.choices(["casa", "perro", "the", "cat", "é", "¿qué?"], k=60)
        (folder / f"{name}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.mark.parametrize("chunk_size, overlap", [(16, 0), (16, 5), (17, 16), (1000, 0), (1000, 3)])
def test_both_sides_cut_a_corpus_into_the_same_chunks(
    texts, tokenizer, tmp_path, chunk_size, overlap
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    hf = HFTokenizer.from_pretrained(tmp_path / "tokenizer")
    options = {"chunk_size": chunk_size, "overlap": overlap, "progress": False}
    lengths = ours.write_chunks(texts, tokenizer, tmp_path / "ours.jsonl", **options)
    assert lengths == theirs.write_chunks(texts, hf, tmp_path / "theirs.jsonl", **options)
    assert (tmp_path / "ours.jsonl").read_bytes() == (tmp_path / "theirs.jsonl").read_bytes()
    rows = ours.Chunks(tmp_path / "ours.jsonl")
    assert [*rows] == [*theirs.Chunks(tmp_path / "theirs.jsonl")] == rows[:]
    assert rows[-1] == rows[len(rows) - 1]
    with pytest.raises(IndexError):
        rows[len(rows)]

    documents = [tokenizer.encode(text) for text in read("minigpt", texts) if text]
    whole = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in documents))
    assert lengths == [len(ids) + 1 for ids in documents]
    kept = rows[0]["input_ids"] + [i for row in rows[1:] for i in row["input_ids"][overlap:]]
    assert kept == whole
    assert all(len(row["input_ids"]) == chunk_size for row in rows[:-1])


@BOTH
def test_a_stream_without_end_is_cut_while_it_flows(side):
    module = ours if side == "minigpt" else theirs
    rows = module.chunk(count(), 4, 1)
    assert [next(rows) for _ in range(2)] == [[0, 1, 2, 3], [3, 4, 5, 6]]


@BOTH
def test_a_corpus_without_text_is_refused_and_leaves_no_file(side, tokenizer, tmp_path):
    module = ours if side == "minigpt" else theirs
    (tmp_path / "a.txt").write_text("\ufeff")
    with pytest.raises(ValueError, match="holds no text: there is nothing to learn"):
        module.write_chunks(tmp_path, tokenizer, tmp_path / "rows.jsonl", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@BOTH
@pytest.mark.parametrize(
    "numbers, message",
    [
        ((1, 0), "chunk_size must be at least 2, to predict one token, got 1"),
        ((8, 8), r"overlap must be in \[0, chunk_size\), got 8 of 8"),
        ((8, -1), r"overlap must be in \[0, chunk_size\), got -1 of 8"),
        ((65, 0, 64), "chunk_size must be at most the model's context of 64, got 65"),
    ],
)
def test_chunks_that_cannot_be_are_refused(side, numbers, message):
    module = ours if side == "minigpt" else theirs
    with pytest.raises(ValueError, match=message):
        module.check_chunks(*numbers)


@pytest.mark.parametrize("size, overlap", [(4, 0), (8, 3), (8, 7), (32, 0), (64, 40)])
def test_coverage_is_what_counting_token_by_token_gives(size, overlap):
    config = GPTConfig(vocab_size=20, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    lengths = [30, 1, 100, 7]
    places = [(i, p) for i, n in enumerate(lengths) for p in range(n)]  # (document, position)
    chunks = list(ours.chunk(range(len(places)), size, overlap))
    seen = there = 0
    for token, (document, p) in enumerate(places):
        holding = next(row for row in chunks if token in row)
        before = [t for t in holding if t < token and places[t][0] == document]
        seen += min(len(before), 63)
        there += min(p, 63)
    report = ours.coverage(lengths, config, size, overlap)
    assert report.context == pytest.approx(seen / there)
    assert report.chunks == len(chunks)
    assert report.repeated == pytest.approx(sum(map(len, chunks)) / len(places) - 1)


def test_a_chunk_as_long_as_the_corpus_covers_everything():
    config = GPTConfig(n_positions=1024)
    assert ours.coverage([500], config, 512).context == 1


@pytest.mark.parametrize("sizes", [(96, 4, 300, None), (64, 2, 100, None), (128, 3, 50, 200)])
def test_the_memory_of_a_row_is_what_autograd_keeps(sizes):
    C, L, V, inner = sizes
    config = GPTConfig(
        vocab_size=V,
        n_positions=64,
        n_embd=C,
        n_layer=L,
        n_head=2,
        n_inner=inner,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT(config)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = summed_loss(model, {"input_ids": ids, "labels": ids})
    assert loss > 0
    megabytes = ours.coverage([64], config, 64).megabytes
    # Statistics of norms, heads and indices are left out: a few percent.
    assert sum(kept.values()) / 2 / 1e6 == pytest.approx(megabytes, rel=0.03)


# Batches


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("max_length", [None, 4, 128])
def test_the_causal_collator_is_the_librarys_with_labels_by_place(max_length):
    rows = [*ROWS, {"input_ids": [7, 0, 0], "labels": [-100, 0, 5]}]
    mine = Causal(pad_token_id=0, max_length=max_length)(rows)
    assert equal(mine, their_batches.Causal(pad_token_id=0, max_length=max_length)(rows))
    T = min(max_length or 99, 7)
    assert {tuple(tensor.shape) for tensor in mine.values()} == {(6, T)}
    assert mine["labels"][5, :3].tolist() == [-100, 0, 5]  # the pad's id, where it is no padding
    assert torch.equal(mine["attention_mask"] == 0, mine["labels"] == -100) is False
    assert (mine["labels"][mine["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("side", [batches, their_batches], ids=["minigpt", "hf_bridge"])
def test_where_the_padding_is_no_word_the_labels_are_those_of_the_language_model_collator(side):
    vocabulary = {str(i): i for i in range(60)}
    backend = PreTrainedTokenizerFast(
        tokenizer_object=Backend(models.WordLevel(vocabulary, unk_token="59")), pad_token="59"
    )
    published = DataCollatorForLanguageModeling(backend, mlm=False)([dict(row) for row in ROWS])
    assert equal(side.Causal(pad_token_id=59)(ROWS), dict(published))
    # Where it is one, as in GPT-2, the library would not learn it.
    rows = [{"input_ids": [5, 59]}, {"input_ids": [7, 8]}]
    published = DataCollatorForLanguageModeling(backend, mlm=False)(rows)
    assert published["labels"].tolist() == [[5, -100], [7, 8]]
    assert side.Causal(pad_token_id=59)(rows)["labels"].tolist() == [[5, 59], [7, 8]]


def test_the_causal_collator_builds_no_vocabulary(monkeypatch):
    sizes = []

    def noted(vocabulary, **options):
        sizes.append(len(vocabulary))
        return word_level(vocabulary, **options)

    word_level = models.WordLevel
    monkeypatch.setattr(their_batches.models, "WordLevel", noted)
    batch = their_batches.Causal(pad_token_id=50256)([{"input_ids": [50255, 50256]}])
    assert batch["input_ids"].tolist() == [[50255, 50256]]
    assert sizes == [1]


@pytest.mark.parametrize("max_length", [None, 5])
def test_the_masked_collator_draws_what_the_librarys_draws(max_length):
    options = {
        "pad_token_id": 0,
        "mask_token_id": 59,
        "vocab_size": 60,
        "special_ids": frozenset({1, 21}),
        "mlm_probability": 0.5,
        "max_length": max_length,
    }
    for seed in range(20):
        mine = Masked(**options)(ROWS, torch.Generator().manual_seed(seed))
        other = their_batches.Masked(**options)(ROWS, torch.Generator().manual_seed(seed))
        assert equal(mine, other)


def test_15_percent_are_masked_80_10_10_and_never_a_special_token_or_padding():
    random = Random(0)
    rows = [{"input_ids": random.choices(range(2, 1000), k=200)} for _ in range(200)]
    for row in rows:
        row["input_ids"][0] = 1
    rows.append({"input_ids": [5]})
    collate = Masked(
        pad_token_id=0, mask_token_id=1000, vocab_size=1001, special_ids=frozenset({1})
    )
    plain = Causal(pad_token_id=0)(rows)["input_ids"]
    batch = collate(rows, torch.Generator().manual_seed(0))
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert torch.equal(batch["input_ids"][~chosen], plain[~chosen])
    assert not chosen[:, 0][:-1].any()
    assert not chosen[-1, 1:].any()
    # 40,000 tokens: four standard deviations of a share p are 4 * sqrt(p * (1 - p) / n).
    assert chosen.sum() / (199 * 200) == pytest.approx(0.15, abs=0.008)
    masked = batch["input_ids"][chosen] == 1000
    same = batch["input_ids"][chosen] == plain[chosen]
    assert masked.double().mean() == pytest.approx(0.8, abs=0.021)
    assert same.double().mean() == pytest.approx(0.1, abs=0.016)
    again = collate(rows, torch.Generator().manual_seed(1))
    assert not torch.equal(again["labels"], batch["labels"])  # dynamic: other tokens each time


def test_static_masking_hides_10_percent_of_the_chunks_whole_and_is_the_librarys_draw():
    rows = [{"input_ids": [i, i + 1]} for i in range(3000)]
    masked = mask_chunks(rows, mask_token_id=9999, generator=torch.Generator().manual_seed(0))
    other = their_batches.mask_chunks(
        rows, mask_token_id=9999, generator=torch.Generator().manual_seed(0)
    )
    assert masked == other
    hidden = [row["input_ids"] == [9999, 9999] for row in masked]
    assert sum(hidden) / 3000 == pytest.approx(0.1, abs=0.022)
    for row, before, hide in zip(masked, rows, hidden):
        assert row["labels"] == (before["input_ids"] if hide else [-100, -100])
        assert hide or row["input_ids"] == before["input_ids"]
    for rate in (0.0, 1.0):
        ends = mask_chunks(rows[:5], mask_token_id=9999, rate=rate)
        assert all((row["labels"][0] != -100) == bool(rate) for row in ends)


@BOTH
@pytest.mark.parametrize("name, wrong", [("pad_token_id", 60), ("mask_token_id", -1)])
def test_padding_and_mask_are_words_of_the_vocabulary(side, name, wrong):
    module = batches if side == "minigpt" else their_batches
    options = {"pad_token_id": 0, "mask_token_id": 59, "vocab_size": 60, name: wrong}
    message = rf"{name} must be in \[0, 60\), the vocabulary, got {wrong}"
    with pytest.raises(ValueError, match=message):
        module.Masked(**options)


@BOTH
def test_rates_are_probabilities(side):
    module = batches if side == "minigpt" else their_batches
    with pytest.raises(ValueError, match=r"mlm_probability must be in \[0, 1\], got 1.5"):
        module.Masked(pad_token_id=0, mask_token_id=1, vocab_size=2, mlm_probability=1.5)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got -1"):
        module.mask_chunks(ROWS, mask_token_id=0, rate=-1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_a_batch_is_a_function_of_seed_and_number_on_both_sides(batch_size):
    rows = [{"input_ids": [i, i]} for i in range(5)]

    def first(provider, i: int) -> list[int]:
        return provider(i)["input_ids"][:, 0].tolist()

    mine = Batches(rows, batch_size, Causal(0), seed=3)
    other = their_batches.Batches(rows, batch_size, their_batches.Causal(0), seed=3)
    forwards = [first(mine, i) for i in range(15)]
    assert [first(other, i) for i in range(15)] == forwards
    fresh = Batches(rows, batch_size, Causal(0), seed=3)
    assert [first(fresh, i) for i in reversed(range(15))] == forwards[::-1]
    # Each epoch is every row once, in an order of its own.
    places = list(chain.from_iterable(forwards))
    epochs = [places[i : i + 5] for i in range(0, len(places) - 4, 5)]
    assert all(Counter(epoch) == Counter(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    another = Batches(rows, batch_size, Causal(0), seed=4)
    assert [first(another, i) for i in range(15)] != forwards


def test_generators_of_two_purposes_draw_different_numbers():
    draws = {
        torch.rand(1, generator=seeded(seed, purpose, number)).item()
        for seed in (0, 1)
        for purpose in ("batch", "epoch")
        for number in (0, 1, 10)
    }
    assert len(draws) == 12
    both = (
        torch.rand(3, generator=module.seeded(5, "batch", 2)) for module in (batches, their_batches)
    )
    assert torch.equal(*both)


@BOTH
def test_a_data_set_smaller_than_a_batch_is_refused(side):
    module = batches if side == "minigpt" else their_batches
    with pytest.raises(ValueError, match="at most the number of rows, 5, got 6: give more data"):
        module.Batches(ROWS, 6, Causal(0), seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        module.Batches(ROWS, 0, Causal(0), seed=0)


def test_chunks_are_rows_of_json(texts, tokenizer: Tokenizer, tmp_path):
    ours.write_chunks(texts, tokenizer, tmp_path / "a.jsonl", chunk_size=32, progress=False)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(ours.Chunks(tmp_path / "a.jsonl"))
