"""The reference's file and the divergence made of it, recomputed in float64 from the logits; and its sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from workbench.errors import UserError
from workbench.worker.scoring import reducer as module
from workbench.worker.scoring.reducer import Reducer, Scoring, compact
from workbench.worker.scoring.reference import _likeliest, reference_shape
from workbench.worker.tokens.file import TokenFile

torch = pytest.importorskip("torch")

VOCAB, LENGTH, FIRST = 600, 24, 9


def asked(windows: int = 3, vocab: int = VOCAB, **more: Any) -> Scoring:
    chance = np.random.default_rng(1)
    ids = chance.integers(0, vocab, (windows, LENGTH)).tolist()
    return Scoring(TokenFile(ids, [FIRST] * windows, vocab), base="b" * 16, **more)


def drawn(windows: int = 3, vocab: int = VOCAB, seed: int = 0) -> Any:
    chance = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(windows, LENGTH, vocab, generator=chance) + 10


def score(spec: Scoring, logits: Any) -> Any:
    reducer = Reducer(spec)
    for window, rows in enumerate(logits):
        reducer(window, 0, rows)
    return reducer.result()


def scored_rows(logits: Any) -> Any:
    """Log-probabilities of the scored positions, float64 [tokens, vocabulary]."""
    return logits[:, FIRST:-1].double().log_softmax(-1).flatten(0, 1).numpy()


def targets_of(spec: Scoring) -> Any:
    return np.array([ids[FIRST + 1 :] for ids in spec.tokens.windows]).reshape(-1)


def read(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).to(torch.float64).numpy() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("top_k", [4, 16])
def test_the_file_holds_what_its_fields_say(tmp_path: Path, top_k: int) -> None:
    path, logits = tmp_path / "r", drawn()
    spec = asked(top_k=top_k, make_reference=str(path))
    made = score(spec, logits)
    stored, log_p = read(path), scored_rows(logits)
    tokens = np.arange(len(log_p))
    k, draws = reference_shape(VOCAB, top_k)
    assert stored["ids"].shape == (len(log_p), k) and stored["tail_ids"].shape == (len(log_p), draws) and draws > 8
    order = np.argsort(-log_p, 1)[:, :k]
    np.testing.assert_array_equal(stored["ids"], order)
    np.testing.assert_array_equal(stored["top"], order[:, 0])
    np.testing.assert_allclose(stored["logprobs"], np.take_along_axis(log_p, order, 1), atol=2e-6)
    np.testing.assert_allclose(stored["correct"], log_p[tokens, targets_of(spec)], atol=2e-6)
    p = np.exp(log_p)
    np.put_along_axis(p, order, 0.0, 1)
    np.testing.assert_allclose(stored["tail_mass"], p.sum(1), rtol=2e-6)
    # Systematic sampling: evenly spaced points on the cumulated mass, each token's offset by the golden ratio.
    offset = np.clip((tokens * 0.6180339887498949 + 0.5) % 1, 2**-11, 1 - 2**-11)
    points = (offset[:, None] + np.arange(draws)) / draws
    sums = np.cumsum(p, 1)
    expected = np.stack([np.searchsorted(s, x * s[-1], side="right") for s, x in zip(sums, points, strict=True)])
    assert (stored["tail_ids"] == expected).mean() > 0.995, "but where a point lies on a border"
    assert not (stored["tail_ids"][:, :, None] == stored["ids"][:, None]).any()
    np.testing.assert_allclose(
        stored["tail_logprobs"], np.take_along_axis(log_p, stored["tail_ids"].astype(int), 1), atol=2e-6
    )
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert (found["top_k"], found["tail_draws"]) == (str(k), str(draws))
    assert found["digest"] == made["made_reference_digest"] and len(found["digest"]) == 16
    assert made["reference_digest"] is made["top_k"] is made["tail_draws"] is None and made["vocab_size"] == VOCAB


def test_the_divergence_is_the_three_terms(tmp_path: Path) -> None:
    path, base = tmp_path / "r", drawn()
    variant = base + 0.4 * drawn(seed=1)
    spec = asked(top_k=8)
    score(replace(spec, make_reference=str(path)), base)
    found = score(replace(spec, reference=str(path)), variant)
    stored, log_p, log_q = read(path), scored_rows(base), scored_rows(variant)

    def g(d: Any) -> Any:
        return np.expm1(d) - d

    ids, drawn_ids = stored["ids"].astype(int), stored["tail_ids"].astype(int)
    low = (np.exp(np.take_along_axis(log_p, ids, 1)) * g(np.take_along_axis(log_q - log_p, ids, 1))).sum(1)
    tails = []
    for log in (log_p, log_q):
        mass = np.exp(log)
        np.put_along_axis(mass, ids, 0.0, 1)
        tails.append(mass.sum(1))
    low += tails[0] * g(np.log(tails[1] / tails[0]))
    ratio = np.take_along_axis(log_q - log_p, drawn_ids, 1) - np.log(tails[1] / tails[0])[:, None]
    whole = low + tails[0] * g(ratio).mean(1)
    correct = [np.exp(log[np.arange(len(log)), targets_of(spec)]) for log in (log_p, log_q)]
    same = log_p.argmax(1) == log_q.argmax(1)
    for place, window in enumerate(found["windows"]):
        part = slice(place * 14, place * 14 + 14)
        assert (window["count"], window["nonfinite"], window["kld_count"]) == (14, 0, 14)
        assert window["kld_sum"] == pytest.approx(whole[part].sum(), rel=1e-5)
        assert window["kld_low_sum"] == pytest.approx(low[part].sum(), rel=1e-5)
        assert window["same_top_sum"] == same[part].sum() and window["same_top"] == same[part].astype(int).tolist()
        assert window["dp_square_sum"] == pytest.approx(((correct[1] - correct[0])[part] ** 2).sum(), rel=1e-4)
        assert window["kld"] == pytest.approx(whole[part], rel=1e-4)
        assert window["dp"] == pytest.approx((correct[1] - correct[0])[part], abs=1e-6)
    assert 0 < same.sum() < len(same) and low.sum() < 0.98 * whole.sum(), "or the test shows nothing"
    assert (found["top_k"], found["tail_draws"]) == (8, reference_shape(VOCAB, 8)[1])


def test_a_base_that_leaves_nothing_to_its_tail_has_no_divergence_there(tmp_path: Path) -> None:
    """Logits 300 below the likeliest are a probability of zero in float32."""
    spec, base = asked(top_k=8), drawn()
    base[..., 5] += 300.0
    score(replace(spec, make_reference=str(tmp_path / "r")), base)
    assert read(tmp_path / "r")["tail_mass"].max() == 0.0
    for window in score(replace(spec, reference=str(tmp_path / "r")), base)["windows"]:
        assert window["kld_sum"] == pytest.approx(0.0, abs=1e-9)


def test_pieces_of_any_size_are_put_in_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, variant = drawn(), drawn() + 0.3 * drawn(seed=1)
    spec = asked(top_k=8)
    score(replace(spec, make_reference=str(tmp_path / "whole")), base)
    whole = score(replace(spec, reference=str(tmp_path / "whole")), variant)
    for rows in (1, 5):
        monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": 4 * VOCAB * rows, "other": 0})
        score(replace(spec, make_reference=str(tmp_path / "parts")), base)
        assert read(tmp_path / "parts")["tail_ids"].tolist() == read(tmp_path / "whole")["tail_ids"].tolist()
        parts = score(replace(spec, reference=str(tmp_path / "parts")), variant)
        for one, two in zip(whole["windows"], parts["windows"], strict=True):
            assert one["kld"] == pytest.approx(two["kld"]) and one["nll"] == pytest.approx(two["nll"])


def test_windows_with_nothing_to_score_have_no_token() -> None:
    spec = Scoring(TokenFile([[1, 2, 3], [4, 5], [6, 7, 8, 9]], [2, 5, 1], 10), greedy=True)
    reducer = Reducer(spec)
    logits = torch.zeros(4, 10)
    logits[:, 8] = 1.0
    reducer(2, 0, logits)
    found = reducer.result()["windows"]
    assert [window["count"] for window in found] == [0, 0, 2]
    assert [window["nll_sum"] for window in found[:2]] == [0.0, 0.0]
    # Of positions 1 and 2 of the last window, the ids 8 and 9 are next, and 8 is the likeliest of both.
    assert found[2]["greedy_sum"] == 1 and found[0]["greedy_sum"] == 0
    assert found[2]["nll_sum"] == pytest.approx(2 * math.log(9 + math.e) - 1)
    assert spec.windows == [(0, [1, 2, 3], 2), (1, [4, 5], 5), (2, [6, 7, 8, 9], 1)]
    assert Reducer(spec)(0, 0, logits[:3]) is None


def test_positions_are_given_once_and_to_the_end() -> None:
    spec = asked(windows=1)
    logits = drawn(windows=1)[0]
    reducer = Reducer(spec)
    reducer(0, 0, logits[:FIRST])  # before the first scored one: nobody's business
    reducer(0, LENGTH - 1, logits[-1:])  # nor is what follows the last token
    reducer(0, FIRST, logits[FIRST : FIRST + 1])
    with pytest.raises(ValueError, match=f"window 0: positions {FIRST} to {FIRST} were given twice"):
        reducer(0, FIRST, logits[FIRST : FIRST + 1])
    with pytest.raises(RuntimeError, match=rf"window 0: no logits for position {FIRST + 1} \(13 of 14 scored"):
        reducer.result()
    reducer(0, FIRST + 1, logits[FIRST + 1 :])
    assert reducer.result()["windows"][0]["nll"] == pytest.approx(score(spec, logits[None])["windows"][0]["nll"])


def test_of_the_likeliest_ids_only_a_scoring_without_reference_counts_the_texts_own(tmp_path: Path) -> None:
    spec, logits = asked(top_k=8), drawn()
    score(replace(spec, make_reference=str(tmp_path / "r")), logits)
    assert "greedy_sum" not in score(spec, logits)["windows"][0]
    both = score(replace(spec, reference=str(tmp_path / "r"), greedy=True), logits)["windows"][0]
    assert "greedy_sum" not in both and both["same_top_sum"] == 14
    short = score(replace(spec, per_token=False, greedy=True), logits)["windows"][0]
    assert set(short) == {"count", "nonfinite", "nll_sum", "greedy_sum"}
    compared = score(replace(spec, per_token=False, reference=str(tmp_path / "r")), logits)["windows"][0]
    assert not set(compared) & {"nll", "kld", "dp", "same_top"}


@pytest.mark.parametrize(
    ("vocab", "top_k", "shape"),
    [
        # (2 bytes of an id + 4 of a log-probability) x entries + 8 + 2 (4 in large vocabularies) in the budget:
        # 1,024 bytes up to 20,000 ids, then a 40th of 2 x (2 x ceil(V / 2) + 4), then 2,000.
        (10, 256, (10, 0)),
        (169, 256, (169, 0)),
        (170, 256, (127, 42)),
        (3000, 256, (127, 42)),
        (3000, 100, (100, 42)),
        (3000, 1, (1, 42)),
        (20476, 256, (127, 42)),
        (21000, 256, (130, 43)),
        (32001, 256, (201, 64)),
        (40001, 256, (256, 64)),
        (49152, 256, (256, 64)),
        (65536, 400, (267, 64)),
        (65537, 400, (186, 62)),
        (262144, 256, (186, 62)),
    ],
)
def test_how_much_is_kept(vocab: int, top_k: int, shape: tuple[int, int]) -> None:
    wide = 2 if vocab <= 65536 else 4
    budget = min(2000, max(1024, 2 * (2 * math.ceil(vocab / 2) + 4) // 40))
    entries = (budget - 8 - wide) // (4 + wide)
    draws = 0 if vocab <= min(entries, top_k) else min(64, entries // 4)
    assert reference_shape(vocab, top_k) == (max(1, min(top_k, vocab, entries - draws)), draws) == shape


@pytest.mark.parametrize("vocab", [64, 65, 1000, 1023, 1040])
def test_the_likeliest_ids_wherever_they_lie(vocab: int) -> None:
    work = torch.rand(40, vocab, generator=torch.Generator().manual_seed(vocab))
    for k in (1, 4, 15, 16):
        work[:, -2:] += 0.5 * (torch.arange(40) % 2)[:, None]
        ids = _likeliest(work, k)
        assert torch.equal(work.gather(-1, ids), work.topk(k, dim=-1).values)
        assert all(len(set(row)) == k for row in ids.tolist())


def packed(values: bytes) -> list[float]:
    return np.frombuffer(values, "<f2").tolist()


def test_a_row_keeps_the_sums_and_of_the_lists_what_is_needed() -> None:
    whole = {"count": 3, "nonfinite": 0, "nll_sum": 6.0, "nll": [1.0, 2.0, 3.0]}
    hurt = {"count": 2, "nonfinite": 1, "nll_sum": 1e5, "nll": [None, 1e5, 0.1]}
    lists = {"kld": [0.5, None, -1e6], "same_top": [1, 0, 1], "dp": [0.1, 0.2, 0.3]}
    result = {"windows": [whole | lists, hurt | lists, {"count": 1, "nonfinite": 0, "nll_sum": 1.0}], "vocab_size": 9}
    row, base = compact(result, False), compact(result, True)  # type: ignore[arg-type]
    first, second, third = row["windows"]
    assert set(first) == {"count", "nonfinite", "nll_sum", "kld"} and set(second) == set(first) | {"nll"}
    assert third == result["windows"][2] and row["vocab_size"] == 9  # type: ignore[index, typeddict-item]
    # 65,504 is where float16 ends, on either side.
    assert np.isnan(packed(second["nll"])[0]) and packed(second["nll"])[1:] == [65504.0, pytest.approx(0.1, rel=1e-3)]  # type: ignore[arg-type]
    assert packed(first["kld"])[::2] == [0.5, -65504.0] and math.isnan(packed(first["kld"])[1])  # type: ignore[arg-type]
    assert packed(base["windows"][0]["nll"]) == [1.0, 2.0, 3.0]  # type: ignore[arg-type]
    assert compact(row, False) == row, "what is packed stays as it is"
    assert whole["nll"] == [1.0, 2.0, 3.0] and "dp" in result["windows"][0]  # type: ignore[operator]


def test_what_is_no_reference_of_these_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r"
    spec = asked(top_k=8)
    score(replace(spec, make_reference=str(path)), drawn())
    header = path.read_bytes()
    # Of fewer tokens with all else alike: as if the digest of the evaluation did not see it.
    path.write_bytes(header.replace(b'"scored_tokens":"42"', b'"scored_tokens":"41"'))
    with pytest.raises(UserError, match="made of another number of tokens .scored_tokens '41', expected '42'"):
        Reducer(replace(spec, reference=str(path)))
    path.write_bytes(header.replace(b'"format":"workbench.reference"', b'"format":"workbench.referencf"'))
    with pytest.raises(UserError, match="is workbench.referencf version "):
        Reducer(replace(spec, reference=str(path)))
    version = json.loads(header[8 : header.index(b"}}") + 2])["__metadata__"]["version"]
    path.write_bytes(header.replace(f'"version":"{version}"'.encode(), f'"version":"{int(version) + 1}"'.encode()))
    with pytest.raises(
        UserError, match=f"workbench.reference version {int(version) + 1}, expected .* version {version};"
    ):
        Reducer(replace(spec, reference=str(path)))
