"""The reducer against full-vocabulary formulas in float64, and what it must refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from safetensors import safe_open

from workbench.errors import UserError
from workbench.worker.scoring.reducer import Reducer, Scoring
from workbench.worker.scoring.reference import _likeliest, reference_shape
from workbench.worker.tokens.file import read_tokens

torch = pytest.importorskip("torch")

VOCAB = 3000


def evaluation(tmp_path, windows=4, length=40, score_from=20, vocab=VOCAB, seed=0, name="evaluation.json"):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (windows, length), generator=generator).tolist()
    path = tmp_path / name
    path.write_text(json.dumps({"windows": ids, "score_from": [score_from] * windows, "vocab_size": vocab}))
    return Scoring(read_tokens(path), base="b" * 16), ids


def zipf_logits(windows, length, vocab, seed):
    """Logits as a language model's: Zipf-like over ranks, some positions sharp and some flat, ids
    shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1, dtype=torch.float32).log()
    logits = torch.empty(windows, length, vocab)
    for w in range(windows):
        slope = 0.7 + 1.8 * torch.rand(length, 1, generator=generator)
        order = torch.rand(length, vocab, generator=generator).argsort(-1)
        noise = 0.5 * torch.randn(length, vocab, generator=generator)
        logits[w] = (-slope * rank + noise).gather(-1, order) + 12.0
    return logits


def perturbed(logits, size, seed=9):
    return logits + size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))


def score(spec, logits):
    reducer = Reducer(spec)
    for window, rows in enumerate(logits):
        reducer(window, 0, rows)
    return reducer.result()


def column(result, name):
    return [value for window in result["windows"] for value in window[name]]


def full_divergence(base, variant, score_from=20, vocab=VOCAB):
    """KL(P||Q) a token over the whole vocabulary, in float64."""
    p = base[:, score_from:-1, :vocab].double().log_softmax(-1)
    q = variant[:, score_from:-1, :vocab].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_nll_is_exact_in_every_dtype(tmp_path, dtype):
    spec, ids = evaluation(tmp_path)
    logits = zipf_logits(4, 40, VOCAB, 1).to(getattr(torch, dtype))
    result = score(spec, logits)
    expected = -logits.double().log_softmax(-1)
    targets = torch.tensor(ids)
    for window, found in enumerate(result["windows"]):
        want = expected[window, 20:39].gather(-1, targets[window, 21:40, None])[:, 0]
        assert found["count"] == 19
        assert found["nonfinite"] == 0
        assert found["nll_sum"] == pytest.approx(float(want.sum()), rel=1e-6)
        assert found["nll"] == pytest.approx(want.tolist(), rel=6e-6)


def test_second_half_of_512_scores_255_tokens(tmp_path):
    spec, _ = evaluation(tmp_path, windows=1, length=512, score_from=256, vocab=50)
    assert score(spec, torch.zeros(1, 512, 50))["windows"][0]["count"] == 255
    assert score(spec, torch.zeros(1, 512, 50))["windows"][0]["nll"][0] == pytest.approx(math.log(50), rel=1e-5)


def test_chunks_and_order_do_not_matter(tmp_path):
    spec, _ = evaluation(tmp_path)
    logits = zipf_logits(4, 40, VOCAB, 1)
    whole = score(replace(spec, make_reference=str(tmp_path / "a.safetensors")), logits)
    reducer = Reducer(replace(spec, make_reference=str(tmp_path / "b.safetensors")))
    for window in (2, 0, 3, 1):
        for first in (31, 0, 17, 24):
            end = {0: 17, 17: 24, 24: 31, 31: 40}[first]
            reducer(window, first, logits[window, first:end])
    parts = reducer.result()
    # Chunks of other sizes may round the last bit of a sum otherwise; the digest in the files is of those
    # bits.
    for a, b in zip(whole["windows"], parts["windows"], strict=True):
        assert b["nll_sum"] == pytest.approx(a["nll_sum"], rel=1e-7)
    with safe_open(tmp_path / "a.safetensors", "pt") as a, safe_open(tmp_path / "b.safetensors", "pt") as b:
        assert torch.equal(a.get_tensor("top").int(), b.get_tensor("top").int())
        torch.testing.assert_close(a.get_tensor("logprobs"), b.get_tensor("logprobs"))


def test_reads_logits_without_changing_them(tmp_path):
    spec, _ = evaluation(tmp_path)
    path = str(tmp_path / "r.safetensors")
    logits = zipf_logits(4, 40, VOCAB, 1)
    before = logits.clone()
    score(replace(spec, make_reference=path), logits)
    score(replace(spec, reference=path, make_reference=path + "2"), logits)
    assert torch.equal(before, logits)


@pytest.mark.parametrize(("size", "smallest", "largest"), [(0.045, 5e-4, 2e-3), (0.3, 0.02, 0.08), (1.7, 0.6, 1.8)])
def test_divergence_is_within_a_percent_and_its_bound_is_below(tmp_path, size, smallest, largest):
    windows, length = 16, 150
    spec, _ = evaluation(tmp_path, windows, length)
    path = str(tmp_path / "r.safetensors")
    base = zipf_logits(windows, length, VOCAB, 1)
    variant = perturbed(base, size)
    # A small k, so that the tail holds as much as with 256 of 49,152 ids and more.
    score(replace(spec, make_reference=path, top_k=64), base)
    result = score(replace(spec, reference=path), variant)
    full = full_divergence(base, variant)
    assert smallest < float(full.mean()) < largest, "the test's own perturbation is of the size it claims"
    tokens = sum(w["kld_count"] for w in result["windows"])
    estimate = sum(w["kld_sum"] for w in result["windows"]) / tokens
    low = sum(w["kld_low_sum"] for w in result["windows"]) / tokens
    assert estimate == pytest.approx(float(full.mean()), rel=0.01)
    assert low < 0.99 * float(full.mean()), "the tail must matter here, or the test shows nothing"
    # Never above: the bound holds for each window, not only on average.
    for found, part in zip(result["windows"], full.view(windows, -1), strict=True):
        assert found["kld_low_sum"] <= float(part.sum()) * (1 + 1e-5)
        assert found["kld_sum"] >= found["kld_low_sum"]


def test_divergence_is_unbiased_over_draws(tmp_path):
    """The same token 2,000 times draws 2,000 tails; their mean is the full value within its own error."""
    repeats = 2000
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"windows": [[1] * (repeats + 1)], "score_from": [0], "vocab_size": 500}))
    spec = Scoring(read_tokens(path), top_k=8)
    base = zipf_logits(1, 1, 500, 3).expand(1, repeats + 1, 500)
    variant = perturbed(base[:, :1], 0.8).expand(1, repeats + 1, 500)
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    # k = 8 of 500 ids leaves room for all draws.
    found = score(replace(spec, reference=str(tmp_path / "r")), variant)["windows"][0]
    draws = torch.tensor(found["kld"], dtype=torch.float64)
    full = float(full_divergence(base[:, :2], variant[:, :2], 0, 500)[0])
    assert float(draws.std()) > 0
    assert float(draws.mean()) == pytest.approx(full, rel=0.002)
    assert found["kld_low_sum"] / repeats < full


def test_divergence_is_exact_when_the_vocabulary_fits(tmp_path):
    spec, _ = evaluation(tmp_path, vocab=100)
    base = zipf_logits(4, 40, 100, 1)
    variant = perturbed(base, 0.5)
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    result = score(replace(spec, reference=str(tmp_path / "r")), variant)
    full = full_divergence(base, variant, vocab=100)
    assert (result["top_k"], result["tail_draws"]) == (100, 0)
    assert column(result, "kld") == pytest.approx(full.tolist(), rel=2e-5)


def test_against_itself_the_divergence_is_nothing(tmp_path):
    spec, _ = evaluation(tmp_path)
    base = zipf_logits(4, 40, VOCAB, 1)
    made = score(replace(spec, make_reference=str(tmp_path / "r")), base)
    result = score(replace(spec, reference=str(tmp_path / "r")), base)
    assert max(column(result, "kld")) < 1e-9
    assert column(result, "same_top") == [1] * 76
    assert max(map(abs, column(result, "dp"))) < 1e-6
    assert result["reference_digest"] == made["made_reference_digest"]
    # A constant on all logits changes nothing but the rounding.
    shifted = score(replace(spec, reference=str(tmp_path / "r")), base + 100.0)
    assert max(column(shifted, "kld")) < 1e-6


def test_change_of_the_correct_tokens_probability(tmp_path):
    spec, ids = evaluation(tmp_path)
    base = zipf_logits(4, 40, VOCAB, 1)
    base.scatter_add_(-1, torch.tensor(ids).roll(-1, 1)[..., None], torch.full((4, 40, 1), 8.0))
    variant = perturbed(base, 1.0)
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    result = score(replace(spec, reference=str(tmp_path / "r")), variant)
    correct = torch.tensor(ids)[:, 21:, None]
    change = [x[:, 20:39].double().softmax(-1).gather(-1, correct).flatten() for x in (variant, base)]
    assert column(result, "dp") == pytest.approx((change[0] - change[1]).tolist(), abs=2e-6)
    assert max(map(abs, column(result, "dp"))) > 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_for_the_top_go_to_the_lowest_id(tmp_path, dtype):
    spec, _ = evaluation(tmp_path, windows=1, length=5, score_from=0)
    logits = zipf_logits(1, 5, VOCAB, 1).to(getattr(torch, dtype))
    logits[..., 700] = logits[..., 2100] = 40.0
    score(replace(spec, make_reference=str(tmp_path / "r")), logits)
    with safe_open(tmp_path / "r", "pt") as file:
        assert file.get_tensor("top").int().tolist() == [700] * 4
    lower, higher = logits.clone(), logits.clone()
    higher[..., 700] = 39.0  # now 2100 alone
    lower[..., 300] = 40.0  # now 300 ties too
    spec = replace(spec, reference=str(tmp_path / "r"))
    assert column(score(spec, logits), "same_top") == [1] * 4
    assert column(score(spec, higher), "same_top") == [0] * 4
    assert column(score(spec, lower), "same_top") == [0] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits_are_counted_and_excluded(tmp_path, bad):
    spec, _ = evaluation(tmp_path)
    path = str(tmp_path / "r")
    base = zipf_logits(4, 40, VOCAB, 1)
    good = score(replace(spec, make_reference=path), base)
    broken = base.clone()
    broken[1, 25, 17] = bad
    broken[1, 10, 17] = bad  # before score_from: nobody's business
    result = score(replace(spec, reference=path), broken)
    assert [w["nonfinite"] for w in result["windows"]] == [0, 1, 0, 0]
    window, whole = result["windows"][1], good["windows"][1]
    assert (window["count"], window["kld_count"], len(window["nll"])) == (18, 18, 19)
    assert [i for i, v in enumerate(window["nll"]) if v is None] == [5]
    assert window["kld"][5] is window["same_top"][5] is window["dp"][5] is None
    assert window["nll_sum"] == pytest.approx(whole["nll_sum"] - whole["nll"][5], rel=1e-6)
    assert math.isfinite(window["kld_sum"])
    json.dumps(result, allow_nan=False)
    # The other way round: the base's token is the broken one, and only the comparison loses it.
    score(replace(spec, make_reference=path), broken)
    window = score(replace(spec, reference=path), base)["windows"][1]
    assert (window["count"], window["nonfinite"], window["kld_count"], window["kld"][5]) == (19, 0, 18, None)


def test_padding_of_the_vocabulary_is_ignored_on_either_side(tmp_path):
    spec, _ = evaluation(tmp_path)
    base = zipf_logits(4, 40, VOCAB, 1)
    padded = torch.cat([base, torch.full((4, 40, 56), 30.0)], -1)
    padded[..., -1] = -math.inf
    variant = perturbed(base, 0.3)
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    score(replace(spec, make_reference=str(tmp_path / "p")), padded)
    plain = score(replace(spec, reference=str(tmp_path / "r")), variant)
    mixed = score(replace(spec, reference=str(tmp_path / "p")), torch.cat([variant, padded[..., VOCAB:]], -1))
    assert mixed["windows"] == plain["windows"]
    with pytest.raises(UserError, match=r"2999 logits .* vocabulary of 3000: not comparable"):
        score(spec, base[..., :-1])


def test_refuses_a_reference_of_something_else(tmp_path):
    spec, _ = evaluation(tmp_path)
    path = str(tmp_path / "r")
    score(replace(spec, make_reference=path), zipf_logits(4, 40, VOCAB, 1))
    with safe_open(path, "pt") as file:
        ours = file.metadata()["evaluation"]
    other, _ = evaluation(tmp_path, seed=5, name="other.json")
    with pytest.raises(UserError, match=f"made with other tokens .*{ours}.*expected"):
        Reducer(replace(other, reference=path))
    with pytest.raises(UserError, match=f"made of another base .*{'b' * 16}.*{'c' * 16}"):
        Reducer(replace(spec, reference=path, base="c" * 16))
    with pytest.raises(UserError, match=r"made of another base"):
        Reducer(Scoring(spec.tokens, reference=path))
    wider, _ = evaluation(tmp_path, vocab=VOCAB + 1, name="wider.json")
    with pytest.raises(UserError, match=r"another vocabulary .*'3000'.*'3001'"):
        Reducer(replace(wider, reference=path))
    with pytest.raises(UserError, match=r"no such file"):
        Reducer(replace(spec, reference=str(tmp_path / "nothing")))
    (tmp_path / "junk").write_bytes(b"not a reference at all")
    with pytest.raises(UserError, match=r"not readable"):
        Reducer(replace(spec, reference=str(tmp_path / "junk")))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match=r"is no reference version None"):
        Reducer(replace(spec, reference=str(tmp_path / "weights")))


def test_refuses_ids_outside_the_vocabulary(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"windows": [[1, 2, 60]], "score_from": [0], "vocab_size": 50}))
    with pytest.raises(UserError, match=r"token id 60 is outside its vocabulary of 50"):
        read_tokens(path)


def test_missing_and_repeated_positions_are_bugs(tmp_path):
    spec, _ = evaluation(tmp_path)
    logits = zipf_logits(4, 40, VOCAB, 1)
    path = tmp_path / "r"
    reducer = Reducer(replace(spec, make_reference=str(path)))
    for window in range(3):
        reducer(window, 0, logits[window])
    reducer(3, 0, logits[3, :30])
    with pytest.raises(RuntimeError, match=r"window 3: no logits for position 30 \(9 of 76"):
        reducer.result()
    assert not path.exists(), "a reference that is not whole must not have its name"
    with pytest.raises(ValueError, match=r"given twice"):
        reducer(3, 25, logits[3, 25:])


@pytest.mark.parametrize("vocab", [32000, 49152, 128256, 151936, 262144])
def test_size_is_within_both_limits(vocab):
    k, draws = reference_shape(vocab)
    size = 8 + (k + draws) * (4 + (2 if vocab <= 65536 else 4)) + (2 if vocab <= 65536 else 4)
    theirs = 2 * (2 * math.ceil(vocab / 2) + 4)
    assert size <= 2000
    assert size <= theirs / 40
    assert k >= 150
    assert draws >= 60


def test_file_on_disk_is_a_fortieth_of_llama_cpps(tmp_path):
    """One window of the convention at a real vocabulary; the header is the only part that does not scale."""
    vocab = 49152
    spec, _ = evaluation(tmp_path, windows=1, length=512, score_from=256, vocab=vocab)
    path = tmp_path / "r"
    logits = torch.randn(512, vocab, generator=torch.Generator().manual_seed(0)).mul_(3)
    reducer = Reducer(replace(spec, make_reference=str(path), per_token=False))
    reducer(0, 256, logits[256:])
    result = reducer.result()
    assert "nll" not in result["windows"][0]
    assert path.stat().st_size <= 255 * 2 * (2 * math.ceil(vocab / 2) + 4) / 40
    assert path.stat().st_size <= 255 * 2000
    # Read by the library, ids above 32,767 among them, in descending order of probability.
    with safe_open(path, "pt") as file:
        ids = file.get_tensor("ids").int()
        logprobs = file.get_tensor("logprobs")
    assert int(ids.max()) > 40000
    assert bool((logprobs.diff(dim=-1) <= 0).all())
    assert torch.equal(ids[:, 0], logits[256:511].argmax(-1).int())
    again = Reducer(replace(spec, reference=str(path)))
    again(0, 256, logits[256:])
    assert max(again.result()["windows"][0]["kld"]) < 1e-9


@pytest.mark.parametrize(("vocab", "k"), [(3000, 40), (3007, 20), (70001, 256), (500, 256)])
def test_blockwise_search_finds_the_k_largest(vocab, k):
    work = torch.rand(7, vocab, generator=torch.Generator().manual_seed(4))
    work[3, -k:] += 1.0
    ids = _likeliest(work, k)
    assert torch.equal(work.gather(-1, ids), work.topk(k, dim=-1).values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_large_vocabulary_ids_survive(tmp_path):
    vocab = 70000
    spec, _ = evaluation(tmp_path, windows=1, length=6, score_from=0, vocab=vocab)
    base = zipf_logits(1, 6, vocab, 2)
    base[0, :, 69999] = 50.0
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    result = score(replace(spec, reference=str(tmp_path / "r")), base)
    assert max(column(result, "kld")) < 1e-9
    assert column(result, "same_top") == [1] * 5


def test_reads_a_strided_buffer_that_the_engine_overwrites(tmp_path):
    """A tensor over someone else's memory with a row stride, as llama.cpp's buffer is given."""
    numpy = pytest.importorskip("numpy")
    spec, _ = evaluation(tmp_path)
    base = zipf_logits(4, 40, VOCAB, 1)
    plain = score(spec, base)
    reducer = Reducer(spec)
    storage = numpy.zeros((40, VOCAB + 8), numpy.float32)
    wrapped = torch.from_numpy(storage)
    for window in range(4):
        storage[:, :VOCAB] = base[window].numpy()  # the engine overwrites its buffer at every window
        reducer(window, 0, wrapped)
    assert reducer.result()["windows"] == plain["windows"]


@pytest.mark.gpu
def test_an_accelerator_gives_the_processors_numbers(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    spec, _ = evaluation(tmp_path)
    base = zipf_logits(4, 40, VOCAB, 1)
    variant = perturbed(base, 0.3)
    score(replace(spec, make_reference=str(tmp_path / "c"), top_k=64), base)
    score(replace(spec, make_reference=str(tmp_path / "g"), top_k=64), base.cuda())
    results = [
        score(replace(spec, reference=str(tmp_path / name)), logits)
        for name in ("c", "g")
        for logits in (variant, variant.cuda())
    ]
    for other in results[1:]:
        for a, b in zip(results[0]["windows"], other["windows"], strict=True):
            assert b["nll_sum"] == pytest.approx(a["nll_sum"], rel=1e-6)
            assert b["kld_sum"] == pytest.approx(a["kld_sum"], rel=1e-3)
            assert b["same_top"] == a["same_top"]
