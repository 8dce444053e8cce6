"""From logits to numbers, at once: negative log-likelihood, divergence from the base, agreement.

A `Reducer` takes the logits of consecutive positions wherever they are (a device tensor, a tensor over
llama.cpp's own buffer, inside vLLM's worker) and keeps five float32 a token, so full logits never pile up.
It is made of a plain `Scoring`, because vLLM's worker is another process and has to build the same one.

What is kept of the base is a *compact reference*, not its vocabulary: a token's k likeliest ids and their
log-probabilities, the mass T of all others (the tail), and m ids drawn from that tail in proportion to their
probability. llama.cpp keeps a 16-bit logit for every id, 98 KB a token at 49,152 ids; this keeps at most
2 KB.

The divergence KL(P||Q) of base P and variant Q, with g(d) = e^d - 1 - d >= 0 and d = log q - log p, splits
without remainder (chain rule of relative entropy: Cover & Thomas, Elements of Information Theory, 2.5) into

    sum over the k ids of p g(d)  +  T g(log(Tq / T))  +  T E[g(log r)],   r = (q_i / Tq) / (p_i / T)

where E is over ids i drawn from the base's tail. Writing each term with g is free, since the probabilities
of either side sum to one, and it makes every term non-negative and the sum blind, to first order, to rounding
in the normalisation (the estimator called k3 in J. Schulman, "Approximating KL Divergence", 2020).

**Which side it errs on.** The first two terms alone (`kld_low`) never exceed the full-vocabulary value:
lumping ids can only lose divergence (log-sum inequality). They lose too much: a quantizer's noise sits on
every logit, and the tail's share of it goes missing. The third term is its unbiased estimate from the m drawn
ids, and not negative. So `kld` errs on neither side in expectation over the draw, is never below `kld_low`,
and its sampling error shrinks with the number of tokens; it is part of the spread between windows and so of
the error reported with the mean. Where T = 0 (k ids are the vocabulary) the value is exact.

Rejected: top-k and one tail bucket (3 to 8 % low on a real model at k = 256); buckets of ids (still low,
and a few dozen masses cannot resolve noise that differs from id to id); 16-bit log-probabilities of the whole
vocabulary (50 times the size, and their rounding alone reads as a divergence of 5e-4).
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from typing import Any

from workbench.errors import UserError
from workbench.records import REFERENCE_VERSION, Quality, WindowScores, digest
from workbench.worker import Tensors
from workbench.worker.scoring.reference import TOP_K, ReferenceReader, ReferenceWriter, reference_shape
from workbench.worker.tokens.file import TokenFile

_CHUNK_BYTES = {"cpu": 4 << 20, "other": 32 << 20}
"""Working memory. On a processor a chunk should stay in the cache between its passes (a whole window at once
took 2.5 times as long a row); on an accelerator it should be large enough to hide the launches."""

_COLUMNS = ("nll", "kld", "kld_low", "same_top", "dp")


@dataclass(frozen=True)
class Scoring:
    """What one pass over an evaluation set is to find out. Plain JSON, because vLLM's worker is another process."""

    tokens: TokenFile
    reference: str | None = None
    """Path of a reference to compare with."""
    make_reference: str | None = None
    """Path to write one to from these logits; both may be given."""
    base: str = ""
    """Digest of the base that a reference is or must be of."""
    top_k: int = TOP_K
    """Ids a made reference keeps exactly, lowered to fit 2,000 bytes a token and a 40th of llama.cpp's logits file, but
    for vocabularies under 20,000 ids, where 1,024 bytes are always allowed."""
    per_token: bool = True
    """Whether to give per-token lists, which quantiles need."""
    greedy: bool = False
    """Whether to count, without a reference, how often the likeliest id was the text's own."""

    @property
    def windows(self) -> list[tuple[int, list[int], int]]:
        """(index, ids, first scored position) of each."""
        pairs = zip(self.tokens.windows, self.tokens.score_from, strict=True)
        return [(index, ids, first) for index, (ids, first) in enumerate(pairs)]


class Reducer:
    """Reduces the logits of one pass over an evaluation set.

    Raises `UserError` if the reference is of other tokens, another base, another vocabulary or format.
    """

    def __init__(self, asked: Scoring) -> None:
        tokens = asked.tokens
        self._windows, self._score_from, self._vocab = tokens.windows, tokens.score_from, tokens.vocab_size
        counts = [max(0, len(w) - 1 - s) for w, s in zip(self._windows, self._score_from, strict=True)]
        self._starts = list(itertools.accumulate(counts, initial=0))
        self._per_token = asked.per_token
        self._greedy = asked.greedy and not asked.reference
        self._seen = bytearray(self._starts[-1])
        self._pending: list[tuple[int, Any]] = []
        self._work: Any = None

        identity = {
            "format": "workbench.reference",
            "version": str(REFERENCE_VERSION),
            "base": asked.base,
            "evaluation": digest({"windows": self._windows, "score_from": self._score_from, "vocab_size": self._vocab}),
            "vocab_size": str(self._vocab),
            "scored_tokens": str(self._starts[-1]),
        }
        self._reference = ReferenceReader(asked.reference, identity) if asked.reference else None
        self._made = None
        if asked.make_reference:
            k, draws = reference_shape(self._vocab, asked.top_k)
            self._made = ReferenceWriter(asked.make_reference, identity, self._starts[-1], k, draws)

    def __call__(self, window: int, first_position: int, logits: Any) -> None:
        """Reduce `logits` [n, at least vocab_size] of positions `first_position ...` of a window.

        Position p predicts token p + 1. Positions before `score_from` and the last one are ignored, and so
        are columns beyond `vocab_size` (an engine's padding). Log-probabilities do as well as logits. Any
        float type is computed in float32. The tensor is only read, and may be overwritten once this returns.
        """
        import torch

        if logits.shape[-1] < self._vocab:
            raise UserError(
                f"the model gives {logits.shape[-1]} logits a position, but the evaluation was tokenized "
                f"with a vocabulary of {self._vocab}: not comparable. Use variants of one base"
            )
        ids, score_from = self._windows[window], self._score_from[window]
        low = max(first_position, score_from)
        high = min(first_position + logits.shape[0], len(ids) - 1)
        if high <= low:
            return
        at = self._starts[window] + low - score_from
        if any(self._seen[at : at + high - low]):
            raise ValueError(f"window {window}: positions {low} to {high - 1} were given twice")
        self._seen[at : at + high - low] = b"\1" * (high - low)

        with torch.inference_mode():
            rows = logits[low - first_position : high - first_position, : self._vocab]
            targets = torch.tensor(ids[low + 1 : high + 1]).to(rows.device)
            stored = self._reference.rows(at, at + high - low, rows.device) if self._reference else None
            step = max(1, _CHUNK_BYTES["cpu" if rows.device.type == "cpu" else "other"] // (4 * self._vocab))
            if self._work is None or self._work.device != rows.device:
                self._work = torch.empty(step, self._vocab, device=rows.device)
            for i in range(0, high - low, step):
                part = slice(i, i + step)
                chunk = {name: value[part] for name, value in stored.items()} if stored else None
                self._pending.append((at + i, self._reduce(rows[part], targets[part], chunk, at + i)))

    def _reduce(self, rows: Any, targets: Any, stored: Tensors | None, at: int) -> Any:
        """One chunk [c, vocab] to [c, 5] float32 in the order of `_COLUMNS`; NaN marks an excluded token."""
        import torch

        work = self._work[: len(rows)]
        source = rows
        if rows.dtype != torch.float32:
            source = work.copy_(rows)
        highest = source.amax(-1, keepdim=True)
        # The minimum finds what the maximum hides: a lone -inf. NaN shows in both.
        finite = torch.isfinite(highest) & torch.isfinite(source.amin(-1, keepdim=True))
        # argmax promises the first of equal maxima, on every device.
        top = source.argmax(-1) if self._reference or self._made or self._greedy else None
        torch.sub(source, highest, out=work)
        log_total = work.exp_().sum(-1, keepdim=True).log_()

        def log_probability(ids: Any) -> Any:
            # Shifted by the maximum first: the difference of two large numbers would cost digits.
            return rows.gather(-1, ids).float() - highest - log_total

        correct = log_probability(targets[:, None])
        columns = torch.full((len(rows), len(_COLUMNS)), math.nan, device=rows.device)
        columns[:, 0:1] = -correct
        if stored is not None:
            low, tail = _divergence(stored, work, log_probability, log_total)
            columns[:, 1] = low + tail
            columns[:, 2] = low
            columns[:, 3] = top == stored["top"]
            columns[:, 4] = correct[:, 0].exp() - stored["correct"].exp()
            columns[:, 1:].masked_fill_(~torch.isfinite(stored["correct"])[:, None], math.nan)
        elif self._greedy:
            columns[:, 3] = top == targets
        columns.masked_fill_(~finite, math.nan)
        if self._made is not None:
            correct = correct.masked_fill(~finite, math.nan)
            self._made.add(at, work, top, correct, log_probability, log_total)
        return columns

    def result(self) -> Quality:
        """What was measured; also completes the file of `make_reference`.

        With `per_token` there are lists over the scored positions, to six digits and with null in the place of an
        excluded token, so that lists of two passes stay aligned and no average can swallow one.

        Raises `RuntimeError` if a scored position was never given.
        """
        import torch

        if not all(self._seen):
            missing = self._seen.index(0)
            window = max(w for w in range(len(self._windows)) if self._starts[w] <= missing)
            position = missing - self._starts[window] + self._score_from[window]
            raise RuntimeError(
                f"window {window}: no logits for position {position} "
                f"({self._seen.count(0)} of {len(self._seen)} scored positions are missing)"
            )
        table = torch.empty(len(self._seen), len(_COLUMNS))
        for at, columns in self._pending:
            table[at : at + len(columns)] = columns.cpu()
        reference = self._reference
        result: Quality = {
            "windows": [
                _window(table[a:b].double(), reference is not None, self._per_token, self._greedy)
                for a, b in zip(self._starts, self._starts[1:], strict=False)
            ],
            "top_k": reference.top_k if reference else None,
            "tail_draws": reference.draws if reference else None,
            "reference_digest": reference.digest if reference else None,
            "vocab_size": self._vocab,
            "made_reference_digest": None,
        }
        if self._made is not None:
            result["made_reference_digest"] = self._made.close()
        return result


def of_losses(asked: Scoring, told: list[tuple[list[float], list[bool]]]) -> Quality:
    """The same of who tells no logits, only, for each window's scored tokens, their losses in nats and whether each was
    the likeliest: no divergence."""
    import torch

    windows = []
    for losses, likeliest in told:
        table = torch.full((len(losses), len(_COLUMNS)), math.nan, dtype=torch.float64)
        table[:, 0] = torch.tensor(losses, dtype=torch.float64)
        table[:, 3] = torch.tensor(likeliest)
        windows.append(_window(table, False, asked.per_token, asked.greedy))
    return {
        "windows": windows,
        "top_k": None,
        "tail_draws": None,
        "reference_digest": None,
        "vocab_size": asked.tokens.vocab_size,
        "made_reference_digest": None,
    }


def compact(result: Quality, is_base: bool) -> Quality:
    """`Reducer.result()` as a row stores it: every sum and count as it is, of the per-token lists what is needed.

    - `kld`, for the quantiles.
    - `nll`, which only a paired difference over tokens that are not all finite reads: in windows that have such
      a token, and in all windows of the base, which cannot know what a variant will lose.
    - Not `same_top` and `dp`: their sums hold all that is shown of them.

    A list is little-endian float16 with NaN for an excluded token (`estimates.unpacked` reads it): as base64 2.7 bytes
    a token and 0.05 % of a value, against 8 to 10 bytes as JSON numbers of three digits; a row of 2,550
    scored tokens has 10 KB of quality instead of 90. Float16 ends at 6e-8, below which float32 logits say
    nothing of a divergence, and at 65,504, where larger values are put. Means come from the sums, in full.
    """

    def packed(values: bytes | list[float | None]) -> bytes:
        if isinstance(values, bytes):
            return values
        numbers = (math.nan if value is None else max(-65504.0, min(value, 65504.0)) for value in values)
        return struct.pack(f"<{len(values)}e", *numbers)

    windows = []
    for window in result["windows"]:
        kept = window.copy()
        kept.pop("same_top", None)
        kept.pop("dp", None)
        nll = kept.pop("nll", None)
        if nll is not None and (is_base or window["nonfinite"]):
            kept["nll"] = packed(nll)
        if "kld" in window:
            kept["kld"] = packed(window["kld"])
        windows.append(kept)
    return {**result, "windows": windows}


def _divergence(stored: Tensors, work: Any, log_probability: Any, log_total: Any) -> tuple[Any, Any]:
    """([c], [c]) nats: the lower bound of KL(P||Q) and the estimate of what it misses (module docstring).

    `work` [c, vocab] holds exp(logit - maximum) and is left as it was found.
    """
    import torch

    def g(d: Any) -> Any:
        # exp(80) is near float32's end; a ratio beyond it means that the base gives the id a probability of
        # 0.
        d = d.clamp(max=80.0)
        return torch.expm1(d) - d

    ids, log_p = stored["ids"], stored["logprobs"]
    low = (log_p.exp() * g(log_probability(ids) - log_p)).sum(-1)
    tail = stored["tail_mass"]
    if stored["tail_ids"].shape[-1] == 0:
        return low, torch.zeros_like(low)
    # Summed without the kept ids, not as one minus them: the tail may be smaller than that difference's
    # error.
    kept = work.gather(-1, ids)
    work.scatter_(-1, ids, 0.0)
    mass = work.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    work.scatter_(-1, ids, kept)
    log_tail_q = mass.log() - log_total
    log_tail_p = tail.clamp(min=torch.finfo(torch.float32).tiny).log()[:, None]
    low = low + tail * g(log_tail_q - log_tail_p)[:, 0]
    ratio = (log_probability(stored["tail_ids"]) - log_tail_q) - (stored["tail_logprobs"] - log_tail_p)
    missed = torch.where(tail > 0, tail * g(ratio).mean(-1), 0.0)
    return low, missed


def _window(table: Any, compared: bool, per_token: bool, greedy: bool = False) -> WindowScores:
    """One window's [n, 5] float64 table as JSON."""
    import torch

    def total(column: int) -> float:
        return float(torch.nansum(table[:, column]))

    def listed(column: int) -> list[float | None]:
        return [None if value != value else float(f"{value:.6g}") for value in table[:, column].tolist()]

    excluded = int(torch.isnan(table[:, 0]).sum())
    window: WindowScores = {"count": len(table) - excluded, "nonfinite": excluded, "nll_sum": total(0)}
    if per_token:
        window["nll"] = listed(0)
    if greedy:
        window["greedy_sum"] = int(total(3))
    if compared:
        window["kld_count"] = int((~torch.isnan(table[:, 1])).sum())
        window["kld_sum"], window["kld_low_sum"] = total(1), total(2)
        window["same_top_sum"] = int(total(3))
        window["dp_square_sum"] = float(torch.nansum(table[:, 4] ** 2))
        if per_token:
            window["kld"], window["dp"] = listed(1), listed(4)
            window["same_top"] = [None if value is None else int(value) for value in listed(3)]
    return window
