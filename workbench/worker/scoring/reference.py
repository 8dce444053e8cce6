"""The file that keeps the base's distributions in a few bytes a token, written once and read by every job."""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any

from workbench.errors import UserError, importing
from workbench.shape import DTYPES
from workbench.worker import Tensors
from workbench.worker.base.checkpoint import lay_out

TOP_K = 256
"""Ids kept exactly, unless the spec or the byte budget says fewer."""

TAIL_DRAWS = 64
"""Ids drawn from the tail: enough that the draw adds less than a thousandth to 5,000 tokens' mean."""

BYTES_A_TOKEN = 2000
"""Upper limit of the reference's size."""


def reference_shape(vocab_size: int, top_k: int = TOP_K) -> tuple[int, int]:
    """(k, m) of a reference for a vocabulary: ids kept exactly, ids drawn from the tail.

    Bounded by 2,000 bytes a token and by a 40th of llama.cpp's logits file, which holds
    2 (2 ceil(V/2) + 4) bytes a scored token (`tools/perplexity`, `--save-all-logits`).
    """
    theirs = 2 * (2 * math.ceil(vocab_size / 2) + 4)
    budget = min(BYTES_A_TOKEN, max(1024, theirs // 40))
    id_bytes = 2 if vocab_size <= 1 << 16 else 4
    entries = (budget - 8 - id_bytes) // (4 + id_bytes)
    if min(top_k, vocab_size) == vocab_size <= entries:
        return vocab_size, 0
    draws = min(TAIL_DRAWS, entries // 4)
    return max(1, min(top_k, entries - draws, vocab_size)), draws


def _likeliest(work: Any, k: int) -> Any:
    """Ids [c, k] of the k largest of each row, descending; a third of `topk`'s time at 49,152 ids and k = 256.

    The k largest values lie in the k blocks with the largest maxima, so only those blocks are searched.
    """
    import torch

    block = 16
    blocks = work.shape[-1] // block
    if blocks < 4 * k:
        return work.topk(k, dim=-1).indices
    # Block b holds ids b, b + blocks, b + 2 blocks, ...: its maximum is then one of whole contiguous rows.
    maxima = work[:, : blocks * block].unflatten(-1, (block, blocks)).amax(-2)
    steps = torch.arange(block, device=work.device) * blocks
    ids = (maxima.topk(k, dim=-1, sorted=False).indices[:, None, :] + steps[:, None]).flatten(1)
    rest = torch.arange(blocks * block, work.shape[-1], device=work.device).expand(len(work), -1)
    ids = torch.cat([ids, rest], -1)
    return ids.gather(-1, work.gather(-1, ids).topk(k, dim=-1).indices)


class ReferenceWriter:
    """A reference being written: memory-mapped under a temporary name, so that it never stands in memory whole."""

    def __init__(self, path: str, identity: dict[str, str], tokens: int, k: int, draws: int) -> None:
        import numpy

        ids = "U16" if int(identity["vocab_size"]) <= 1 << 16 else "I32"
        fields = {
            "correct": ("F32", (tokens,)),
            "tail_mass": ("F32", (tokens,)),
            "logprobs": ("F32", (tokens, k)),
            "tail_logprobs": ("F32", (tokens, draws)),
            "top": (ids, (tokens,)),
            "ids": (ids, (tokens, k)),
            "tail_ids": (ids, (tokens, draws)),
        }
        self._path, self._k, self._draws, self._fields = path, k, draws, fields
        self._partial = f"{path}.{os.getpid()}.partial"
        self._metadata = identity | {"top_k": str(k), "tail_draws": str(draws), "digest": "0" * 16}
        head, begins, size = lay_out(fields, self._metadata)
        with open(self._partial, "wb") as file:
            file.write(head)
            file.truncate(size)
        # numpy maps no array without entries; nothing is put into such a field.
        self._arrays = {
            name: numpy.memmap(self._partial, DTYPES[code].name, "r+", begins[name], shape)
            for name, (code, shape) in fields.items()
            if math.prod(shape)
        }

    def add(self, at: int, work: Any, top: Any, correct: Any, log_probability: Any, log_total: Any) -> None:
        """Store a chunk; overwrites `work` [c, vocab], which holds exp(logit - maximum)."""
        import torch

        def put(name: str, value: Any) -> None:
            if name in self._arrays:
                self._arrays[name][at : at + len(value)] = value.cpu().numpy()

        ids = _likeliest(work, self._k)
        put("correct", correct[:, 0])
        put("top", top)
        put("ids", ids)
        put("logprobs", log_probability(ids))
        work.scatter_(-1, ids, 0.0)
        put("tail_mass", (work.sum(-1, keepdim=True).log() - log_total).exp()[:, 0])
        if not self._draws:
            return
        # Systematic sampling in proportion to size (Madow 1949): evenly spaced points on the cumulated mass.
        # In order of ids, which a tokenizer deals by frequency, that is stratified too. The offsets of
        # successive tokens follow the golden ratio: evenly spread, and the same on every device, which no
        # generator's stream is.
        offset = (
            torch.arange(at, at + len(work), dtype=torch.float64).mul_(0.6180339887498949).add_(0.5).remainder_(1.0)
        )
        points = offset.clamp_(2**-11, 1 - 2**-11)[:, None] + torch.arange(self._draws)
        cumulated = torch.cumsum(work, -1, out=work)
        points = (points / self._draws).to(work) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, points, right=True).clamp_(max=work.shape[-1] - 1)
        put("tail_ids", drawn)
        put("tail_logprobs", log_probability(drawn))

    def close(self) -> str:
        """Seal the file under its name with the digest of its content, and return that."""
        for array in self._arrays.values():
            array.flush()
        self._arrays.clear()
        head, *_ = lay_out(self._fields, self._metadata)
        content = hashlib.sha256(json.dumps(self._metadata, sort_keys=True).encode())
        with open(self._partial, "r+b") as file:
            file.seek(len(head))
            while block := file.read(1 << 20):
                content.update(block)
            self._metadata["digest"] = content.hexdigest()[:16]
            file.seek(0)
            # As long as before: a digest has always as many digits.
            file.write(lay_out(self._fields, self._metadata)[0])
        os.replace(self._partial, self._path)
        return self._metadata["digest"]


class ReferenceReader:
    """A reference being read, a few windows' rows at a time, from a memory-mapped file."""

    def __init__(self, path: str, identity: dict[str, str]) -> None:
        with importing("safetensors, which reads the reference,", "pip install safetensors"):
            from safetensors import SafetensorError, safe_open

        file: Any
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"reference {path}: no such file; score the base first, which writes it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"reference {path}: not readable ({error}); delete it and score the base again") from None
        self._file = file
        found = file.metadata() or {}
        again = "score the base on this evaluation again"
        if found.get("format") != identity["format"] or found.get("version") != identity["version"]:
            raise UserError(
                f"reference {path}: is {found.get('format', 'no reference')} version {found.get('version')}, "
                f"expected {identity['format']} version {identity['version']}; {again}"
            )
        for key, what in (
            ("vocab_size", "with another vocabulary"),
            ("evaluation", "with other tokens"),
            ("base", "of another base"),
            ("scored_tokens", "of another number of tokens"),
        ):
            if found.get(key) != identity[key]:
                raise UserError(
                    f"reference {path}: made {what} ({key} '{found.get(key)}', expected '{identity[key]}'); {again}"
                )
        self.top_k, self.draws, self.digest = int(found["top_k"]), int(found["tail_draws"]), found["digest"]

    def rows(self, first: int, end: int, device: Any) -> Tensors:
        """Tokens `first` to `end` of every field on `device`: ids int64, the rest float32."""
        import torch

        rows = {}
        for name in ("correct", "tail_mass", "logprobs", "tail_logprobs", "top", "ids", "tail_ids"):
            value = self._file.get_slice(name)[first:end]
            if value.dtype == torch.uint16:
                # torch has few operations on uint16; the same bits as int16, widened and masked.
                value = value.view(torch.int16).to(device).long() & 0xFFFF
            elif value.dtype == torch.int32:
                value = value.to(device).long()
            rows[name] = value.to(device)
        return rows
