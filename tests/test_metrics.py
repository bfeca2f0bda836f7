"""Step 15: our arithmetic against scikit-learn, rouge-score, torch and transformers."""

import math
from random import Random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from hf_bridge import metrics as theirs
from hf_bridge.model import GPT as HF
from minigpt import GPT, GPTConfig
from minigpt import metrics as ours
from minigpt.batches import Causal

EXACT = 1e-9  # float64
BOTH = pytest.mark.parametrize("side", [ours, theirs], ids=["minigpt", "hf_bridge"])
WORDS = ["el", "gato", "canción", "perro", "y", "the", "cat", "sees", "a", "dog", "42", "ñandú"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: two threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, HF]:
    """The same float64 model on both sides, with 12 positions."""
    config = GPTConfig(
        vocab_size=50,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("model")
    GPT(config, generator=torch.Generator().manual_seed(0)).double().save_pretrained(folder)
    return GPT.from_pretrained(folder), HF.from_pretrained(folder)


def ids(N: int) -> torch.Tensor:
    return torch.randint(50, (1, N), generator=torch.Generator().manual_seed(N))


def test_batches_weigh_by_their_tokens_and_both_sides_agree(models):
    rows = [{"input_ids": ids(n)[0].tolist()} for n in (3, 11, 5, 2)]
    collate = Causal(pad_token_id=0)
    batches = [collate(rows[:1]), collate(rows[1:])]
    mine, other = ours.evaluate(models[0], batches), theirs.evaluate(models[1], batches)
    assert mine == pytest.approx(other, abs=EXACT)
    alone = [ours.evaluate(models[0], [collate([row])]) for row in rows]
    total = sum(one["loss"] * one["tokens"] for one in alone)
    assert mine["tokens"] == 2 + 10 + 4 + 1
    assert mine["loss"] == pytest.approx(total / 17, abs=EXACT)
    assert mine["perplexity"] == pytest.approx(math.exp(total / 17))


@pytest.mark.parametrize("stride", [1, 5, 6, 11])
@pytest.mark.parametrize("N", [2, 11, 12, 13, 40])
def test_a_moving_window_counts_every_token_once_on_both_sides(models, N, stride):
    row = ids(N)
    mine = ours.perplexity(models[0], row, stride=stride)
    assert mine == pytest.approx(theirs.perplexity(models[1], row, stride=stride), rel=EXACT)
    losses = []
    for t in range(1, N):  # by hand: each token after what the first window that holds it shows
        window = max(0, math.ceil((t + 1 - 12) / stride)) * stride
        logits = models[0](row[:, window:t])[0, -1].detach()
        losses.append(-logits.log_softmax(-1)[row[0, t]].item())
    assert mine == pytest.approx(math.exp(sum(losses) / len(losses)), rel=EXACT)


def test_a_model_that_knows_nothing_hesitates_between_all_words(models):
    model = GPT(models[0].config)
    model.wte.weight.data.zero_()
    assert ours.perplexity(model, ids(30)) == pytest.approx(50)


def test_a_hopeless_perplexity_is_infinite_not_an_error(models):
    model = GPT(models[0].config)
    model.ln_f.weight.data.mul_(1e8)
    assert ours.perplexity(model, ids(12)) == math.inf


@BOTH
@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((1, 1), {}, r"ids must be one row of at least 2 tokens, \(1, N\), got \(1, 1\)"),
        ((2, 5), {}, r"got \(2, 5\)"),
        ((1, 5), {"stride": 12}, r"stride must be in \[1, max_length\), got 12 of 12"),
        ((1, 5), {"stride": 0}, r"stride must be in \[1, max_length\), got 0 of 12"),
        ((1, 5), {"max_length": 13}, r"max_length must be in \[2, 12\], up to the context, got 13"),
    ],
)
def test_windows_that_cannot_be_are_refused(side, models, shape, options, message):
    model = models[0] if side is ours else models[1]
    with pytest.raises(ValueError, match=message):
        side.perplexity(model, torch.zeros(shape, dtype=torch.int64), **options)


@BOTH
def test_nothing_to_predict_is_refused(side, models):
    model = models[0] if side is ours else models[1]
    batch = {"input_ids": ids(4), "labels": torch.full((1, 4), -100)}
    with pytest.raises(ValueError, match="there is no token to predict"):
        side.evaluate(model, [batch])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_is_different_n_grams_over_all_on_both_sides(n):
    random = Random(n)
    for _ in range(20):
        rows = [random.choices(WORDS, k=random.randrange(8)) for _ in range(4)]
        assert ours.distinct(rows, n) == theirs.distinct(rows, n)
    assert ours.distinct([[1, 1, 1, 1, 1]], n) == 1 / (6 - n)
    assert ours.distinct([[1, 2, 3, 4, 5]], n) == 1
    assert ours.distinct([[], []], n) == theirs.distinct([[], []], n) == 0
    # An n-gram does not reach from one row into the next.
    assert ours.distinct([[1], [2]], 2) == 0


@BOTH
def test_an_n_gram_has_at_least_one_word(side):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        side.distinct([["a"]], 0)


def test_kl_is_torchs_and_zero_only_between_equals():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 7, 11, generator=generator, dtype=torch.float64)
    assert ours.kl_divergence(p, q) == pytest.approx(theirs.kl_divergence(p, q), abs=EXACT)
    assert ours.kl_divergence(p, p) == 0
    assert ours.kl_divergence(p, p + 5) == pytest.approx(0, abs=1e-12)  # softmax forgets a shift
    assert ours.kl_divergence(p, q) != pytest.approx(ours.kl_divergence(q, p), rel=1e-3)
    masked = p.clone()
    masked[..., 0] = -math.inf
    assert ours.kl_divergence(masked, q) == pytest.approx(theirs.kl_divergence(masked, q))
    assert ours.kl_divergence(q, masked) == math.inf


def test_agreement_is_the_share_of_equal_first_choices():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 40, 5, generator=generator)
    assert ours.top1_agreement(p, q) == theirs.top1_agreement(p, q)
    assert 0 < ours.top1_agreement(p, q) < 0.5
    assert ours.top1_agreement(p, 2 * p) == 1


@BOTH
def test_nan_agrees_with_nothing_and_is_no_distance(side):
    known = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    broken = known.clone()
    broken[1, 0] = math.nan
    for p, q in ((known, broken), (broken, known), (broken, broken)):
        assert side.top1_agreement(p, q) == 0.5
        assert math.isnan(side.kl_divergence(p, q))


@BOTH
def test_kl_is_infinite_only_where_q_rules_out_what_p_may_say(side):
    half, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]])
    assert side.kl_divergence(half, sure) == math.inf
    assert side.kl_divergence(sure, half) == pytest.approx(math.log(2))
    assert side.kl_divergence(sure, sure) == 0


@BOTH
@pytest.mark.parametrize("name", ["kl_divergence", "top1_agreement"])
def test_logits_of_two_shapes_are_not_compared(side, name):
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3\) and \(3, 2\)"):
        getattr(side, name)(torch.zeros(2, 3), torch.zeros(3, 2))


def test_classes_are_counted_and_scored_as_scikit_learn_does():
    random = Random(0)
    for k in (2, 3, 6):
        labels = WORDS[:k]
        for n in (1, 4, 60):  # with few cases some class is never true or never predicted
            truth, predicted = random.choices(labels, k=n), random.choices(labels, k=n)
            matrix = ours.confusion_matrix(truth, predicted, labels=labels)
            assert torch.equal(matrix, theirs.confusion_matrix(truth, predicted, labels=labels))
            for a, b in zip(ours.class_scores(matrix), theirs.class_scores(matrix)):
                assert a == pytest.approx(b, abs=1e-12)
            assert ours.macro_f1(matrix) == pytest.approx(theirs.macro_f1(matrix), abs=1e-12)


@BOTH
def test_cases_that_cannot_be_counted_are_refused(side):
    with pytest.raises(ValueError, match="must be of one length, got 2 and 1"):
        side.confusion_matrix(["a", "b"], ["a"], labels=["a", "b"])
    with pytest.raises(ValueError, match="labels must hold every class, got none for 'c'"):
        side.confusion_matrix(["a", "c"], ["a", "b"], labels=["a", "b"])


def test_rouge_l_is_that_of_rouge_score():
    random = Random(0)
    published = RougeScorer(["rougeL"])
    for _ in range(100):
        a, b = (" ".join(random.choices(WORDS, k=random.randrange(12))) for _ in range(2))
        assert ours.rouge_l(a, b) == pytest.approx(theirs.rouge_l(a, b), abs=1e-12)
        a, b = (text.encode("ascii", "ignore").decode() for text in (a, b))
        score = published.score(b, a)["rougeL"]
        assert ours.rouge_l(a, b) == pytest.approx(tuple(map(float, score)), abs=1e-12)
    assert ours.rouge_l("", "the cat") == ours.rouge_l("the cat", "") == (0, 0, 0)
    assert ours.rouge_l("the cat", "The cat!") == (1, 1, 1)
    assert ours.rouge_l("canción", "canci n").f1 == 0
