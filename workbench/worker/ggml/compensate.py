"""Codes of a quantized GGUF file chosen anew, by error feedback through the Gram matrix of each tensor's input.

llama.cpp rounds every weight to the nearest level of its run. What matters is the layer's output: e G e^T for the
errors e of an output channel, with G = mean(x x^T). So the codes are chosen by GPTQ's feedback (`methods/feedback.py`)
within the scales and minimums that llama.cpp found; then column by column once more, each the best for all others as
they are now; then the scales and minimums, the best for the codes; and so on, `ROUNDS` times. After the feedback no
step raises e G e^T. The file stays an ordinary GGUF file with the same types and sizes.

G stands for other text than it was made of. Its diagonal is therefore raised by `DAMPING`, which draws the correlations
of inputs nearer to none: on held-out text the error fell by a tenth against the hundredth of the mean that is custom.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.errors import importing
from workbench.shape import FLOATS
from workbench.worker import Progress, threads
from workbench.worker.ggml.grams import Grams, read
from workbench.worker.ggml.index import Entry, entries
from workbench.worker.kernels import import_kernels
from workbench.worker.methods.feedback import Factor, factored, feedback

TYPES = frozenset(("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL"))
"""Types whose codes can be chosen one by one; the others of llama.cpp's have a code for several weights together."""
LEFT = {
    **{"Q8_0": 0.36, "Q6_K": 0.53, "Q5_K": 0.63, "Q5_1": 0.67, "Q5_0": 0.48, "Q4_K": 0.7, "Q4_1": 0.7, "Q4_0": 0.48},
    **{"Q3_K": 0.52, "Q2_K": 0.68, "IQ4_XS": 0.57, "IQ4_NL": 0.57},
}
"""What is left of a type's price with codes chosen anew, by which types are chosen: means over matrices of the default
model, on text that G was not made of. Least is left where llama.cpp's search finds the worst scales."""
DAMPING = 0.4
"""Added to G's diagonal, as a share of each entry."""
NEVER = 1e-4
"""What inputs that never fire count, as a share of the mean: nothing beside others, but they are rounded to nearest."""
ROUNDS = 2
"""How often the scales are searched again. A third round gains less than a hundredth."""
APART = 1e-6
"""Two directions whose determinant is a smaller share of what it could be are one."""
COLUMNS = 64
"""Columns between two large products of a sweep."""
SLAB = 2**25
"""Weights that are worked on at once, in whole rows."""


@dataclass(frozen=True)
class Input:
    """What of a tensor's input the choice of codes needs: G with its diagonal raised [in, in], and its factor."""

    gram: Any
    factor: Factor


def input_of(gram: Any, where: str) -> Input:
    """The same of G, float32 [in, in]. Raises `UserError`, which begins with `where`, if it cannot be factored."""
    import torch

    damped = gram.clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal.mul_(1 + DAMPING)
    diagonal[gram.diagonal() <= 0] = NEVER * mean if mean > 0 else 1.0
    order = torch.argsort(diagonal, descending=True, stable=True)
    return Input(damped, factored(damped, order, 0.0, where))


def compensated(kind: str, blocks: Any, weight: Any, given: Input) -> Any:
    """The blocks of `weight` float32 [out, in] with codes and scales chosen anew: uint8 [out, bytes of a row], as is
    `blocks`, what a quantizer made of it; `kind`: one of `TYPES`. All on one device."""
    with threads.fit_for(weight.numel()):
        return _Rows(kind, blocks, weight, given).made()


def repriced(prices: Mapping[str, Mapping[str, float]], grams: Path) -> dict[str, dict[str, float]]:
    """Prices of types by tensor as they are with codes chosen anew, where there is a Gram matrix for it."""
    held = read(grams).files
    return {
        name: {kind: price * (LEFT.get(kind, 1.0) if name in held else 1.0) for kind, price in each.items()}
        for name, each in prices.items()
    }


def told(source: str | None, made: str, grams: str | None, progress: Progress) -> dict[str, object]:
    """`write`, where there is a folder of Gram matrices; what the artifact says of it. Raises `UserError` if torch is
    missing."""
    if grams is None:
        return {}
    with importing("torch (rounding: compensated)", "pip install torch"):
        import torch  # noqa: F401
    chosen = write(Path(str(source)), Path(made), read(Path(grams)), progress)
    return {"rounding": {"compensated_tensors": chosen, "damping": DAMPING, "rounds": ROUNDS}}


def write(source: Path, made: Path, grams: Grams, progress: Progress) -> int:
    """Choose the codes anew of all tensors of the file `made` that there is a Gram matrix for, in place; `source`: the
    file it was quantized from. Returns how many tensors that are."""
    before = {entry.name: entry for entry in entries(str(source))}
    after = [
        entry
        for entry in entries(str(made))
        if entry.kind in TYPES and entry.shape[2] == 1 and grams.has(entry.name, entry.shape[0])
    ]
    # Tensors with one input lie beside each other, so that its matrix is factored once.
    after.sort(key=lambda entry: (grams.first[entry.name], entry.kind))
    groups = [list(alike) for _, alike in itertools.groupby(after, lambda entry: (grams.first[entry.name], entry.kind))]
    works = [_work(some[0].shape[0], sum(entry.shape[1] for entry in some)) for some in groups]
    done, key, given = 0.0, "", None
    for some, work in zip(groups, works, strict=True):
        words = f"codes of {', '.join(entry.name for entry in some)}"
        progress(done, sum(works), words)
        if given is None or grams.first[some[0].name] != key:
            key = grams.first[some[0].name]
            given = input_of(grams.load(some[0].name), key)
        tensors = [(_Stored(source, before[entry.name], "r"), _Stored(made, entry, "r+")) for entry in some]
        for share in _rewrite(tensors, given):
            done += share * work
            progress(done, sum(works), words)
    return len(after)


def _work(columns: int, rows: int) -> float:
    """How long the codes of a matrix take beside those of another, as measured with 512 to 4,096 columns on two cores:
    a step a column, products with each of its rows and, through G, with all columns."""
    return columns * (5e5 + rows * (1000 + columns))


def first_step(grams: str | None, progress: Progress) -> Progress:
    """How the quantizing before it is told, which takes little beside this: by words, without a share of its own from
    which nobody could tell how long the whole takes."""
    return progress if grams is None else lambda done, total, words: progress(0, 1, words)


class _Stored:
    """The rows of a tensor in its file, uint8 [rows, bytes of a row], as the file has them."""

    def __init__(self, file: Path, entry: Entry, mode: Literal["r", "r+"]) -> None:
        import numpy as np

        self.kind, self.inputs = entry.kind, entry.shape[0]
        self.rows = np.memmap(file, np.uint8, mode, entry.offset, (entry.shape[1], entry.size_bytes // entry.shape[1]))


def _rewrite(tensors: Sequence[tuple[_Stored, _Stored]], given: Input) -> Iterator[float]:
    """Tensors of one type with one input, each behind what it was quantized from, in place; yields which share of them
    is done, part by part.

    They are worked on as one matrix, `SLAB` weights at once: a step is a column of all their rows, and takes as long
    for a few thousand as for one.
    """
    import numpy as np
    import torch

    device, kind = given.gram.device, tensors[0][1].kind
    for pieces in _slabs(tensors, max(1, SLAB // tensors[0][1].inputs)):
        weight = torch.cat(
            [
                torch.from_numpy(wide.rows[some].copy()).view(getattr(torch, FLOATS[wide.kind].name)).float()
                for wide, _, some in pieces
            ]
        )
        blocks = torch.from_numpy(np.concatenate([made.rows[some] for _, made, some in pieces]))
        new = compensated(kind, blocks.to(device), weight.to(device), given).cpu().numpy()
        for _, made, some in pieces:
            count = some.stop - some.start
            made.rows[some], new = new[:count], new[count:]
        yield len(blocks) / sum(len(made.rows) for _, made in tensors)
    for _, made in tensors:
        made.rows.flush()


def _slabs(tensors: Sequence[tuple[_Stored, _Stored]], most: int) -> Iterator[list[tuple[_Stored, _Stored, slice]]]:
    """The rows of all `tensors` in their order, `most` at once."""
    pieces: list[tuple[_Stored, _Stored, slice]] = []
    room = most
    for wide, made in tensors:
        first = 0
        while first < len(made.rows):
            some = slice(first, min(first + room, len(made.rows)))
            pieces.append((wide, made, some))
            room, first = room - (some.stop - first), some.stop
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


class _Rows:
    """Some rows of a tensor while their numbers are chosen. Everything lies turned around, [in, out]; `d` and `dmin`
    are [blocks of a row, out], `scale` and `least` [runs of a row, out]."""

    def __init__(self, kind: str, blocks: Any, weight: Any, given: Input) -> None:
        import_kernels()
        import torch
        from workbench_kernels.encoders.numbers import NUMBERS
        from workbench_kernels.gguf.types import BLOCK_TYPES

        layout = BLOCK_TYPES[kind].layout
        self.numbers, self.given, self.gram = NUMBERS[kind], given, given.gram
        self.weight = weight.t().contiguous()
        self.block, self.run = layout.weights, self.numbers.run
        scales = self.numbers.scales(blocks.reshape(-1, layout.size_bytes))
        parts = (scales.d, scales.dmin, scales.scale, scales.least)
        self.d, self.dmin, self.scale, self.least = (part.reshape(len(weight), -1).t().contiguous() for part in parts)
        self.level = torch.empty_like(self.weight)
        """What each code stands for."""
        self.error = torch.empty_like(self.weight)
        """W - Q."""
        self.table = torch.tensor(self.numbers.table, dtype=torch.float32, device=weight.device)

    def made(self) -> Any:
        """The blocks, uint8 [out, bytes of a row], with all numbers chosen."""
        self._feed_back()
        for _ in range(ROUNDS):
            self._sweep()
            self._search_scales()
        self._sweep()
        return self._packed()

    def _grids(self) -> None:
        """Step, its inverse and shift of every run, [runs of a row, out], for the scales as they are now."""
        import torch

        runs = self.block // self.run
        self.step = self.d.repeat_interleave(runs, 0) * self.scale
        self.shift = self.dmin.repeat_interleave(runs, 0) * self.least
        self.inverse = torch.where(self.step == 0, 0.0, 1.0 / self.step)

    def _nearest(self, column: int, wanted: Any) -> Any:
        """The numbers [out] nearest to those wanted that a column may become, whose levels are noted."""
        import torch

        run = column // self.run
        level = torch.add(wanted, self.shift[run]).mul_(self.inverse[run])
        if len(self.table):
            level = self.table[torch.bucketize(level, (self.table[1:] + self.table[:-1]) / 2)]
        else:
            level.round_().clamp_(-self.numbers.less, self.numbers.codes - 1 - self.numbers.less)
        self.level[column] = level
        return (level * self.step[run]).sub_(self.shift[run])

    def _feed_back(self) -> None:
        self._grids()
        order = self.given.factor.order
        columns = order.tolist()
        error, _ = feedback(self.weight, self.given.factor, lambda k, wanted: self._nearest(columns[k], wanted))
        self.error[order] = error

    def _sweep(self) -> None:
        """Each column once more, to the best for all others: w - q moves by (G e)_k / G_kk."""
        self._grids()
        gram, diagonal = self.gram, self.gram.diagonal().tolist()
        for first in range(0, len(gram), COLUMNS):
            here = slice(first, first + COLUMNS)
            pull = gram[here] @ self.error
            for k in range(first, first + len(pull)):
                error = self.error[k]
                wanted = (pull[k - first] / diagonal[k]).sub_(error).add_(self.weight[k])
                new = self.weight[k] - self._nearest(k, wanted)
                pull.addr_(gram[here, k], new - error)
                self.error[k] = new

    def _search_scales(self) -> None:
        """Scale and least of each run, then d and dmin of each block, the best for the levels and for all others."""
        low, high = self.numbers.inner
        runs = self.block // self.run

        def whole(value: Any) -> Any:
            return value.round().clamp(low, high)

        for block in range(len(self.d)):
            for run in range(block * runs, (block + 1) * runs) if high > low else ():
                inside = slice(run * self.run, (run + 1) * self.run)
                up, down = self.d[block] * self.level[inside], -self.dmin[block].expand(self.run, -1)
                self.scale[run], self.least[run] = self._moved(
                    inside, (self.scale[run], up), (self.least[run], down), whole
                )
            inside, mine = slice(block * self.block, (block + 1) * self.block), slice(block * runs, (block + 1) * runs)
            up = self.scale[mine].repeat_interleave(self.run, 0) * self.level[inside]
            down = -self.least[mine].repeat_interleave(self.run, 0)
            self.d[block], self.dmin[block] = self._moved(
                inside, (self.d[block], up), (self.dmin[block], down), lambda value: value.half().float()
            )

    def _moved(self, inside: slice, one: tuple[Any, Any], other: tuple[Any, Any], stored: Any) -> tuple[Any, Any]:
        """Two numbers a, b [out] of some columns, whose weights are a u + b v and more, where e G e^T is least, as they
        can be stored; where that is no better, as they were. `one` is (a, u), `other` (b, v); u, v [columns, out]."""
        import torch

        (a, u), (b, v) = one, other
        gram, pull = self.gram[inside, inside], self.gram[inside] @ self.error
        gu, gv = gram @ u, gram @ v
        uu, uv, vv = ((x * y).sum(0) for x, y in ((u, gu), (u, gv), (v, gv)))
        up, vp = (u * pull).sum(0), (v * pull).sum(0)
        determinant = uu * vv - uv * uv
        apart = determinant > APART * uu * vv
        move = torch.where(apart, (up * vv - vp * uv) / determinant, up / uu)
        new_a = stored(a + torch.where(uu > 0, move, 0.0))
        da = new_a - a
        new_b = stored(b + torch.where(vv > 0, (vp - da * uv) / vv, 0.0))
        db = new_b - b
        gain = 2 * (da * up + db * vp) - (da * da * uu + 2 * da * db * uv + db * db * vv)
        better = (gain > 0) & new_a.isfinite() & new_b.isfinite()
        da, db = torch.where(better, da, 0.0), torch.where(better, db, 0.0)
        self.error[inside] -= da * u + db * v
        return a + da, b + db

    def _packed(self) -> Any:
        import torch
        from workbench_kernels.encoders.numbers import Scales

        outputs = self.weight.shape[1]
        parts = (self.d, self.dmin, self.scale, self.least)
        count = outputs * len(self.d)
        scales = Scales(*(part.t().reshape(count, -1) for part in parts))
        codes = torch.bucketize(self.level, self.table) if len(self.table) else self.level + self.numbers.less
        blocks = self.numbers.pack(scales, codes.t().reshape(count, -1).int())
        return blocks.view(outputs, -1)
