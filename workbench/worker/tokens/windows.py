"""From text to token ids, once a recipe, so that every engine sees the same tokens.

A set of windows is for evaluation (what a variant is scored on) or for calibration (what a method may look
at); tokens of the one never appear in the other. Evaluation takes consecutive windows; calibration draws
windows at random, and where both come from one text, only from what evaluation leaves.

Where windows begin and what of them is scored is the convention's business (`conventions.py`). A window begins with
BOS if the tokenizer adds one: it takes the first token's place, as in llama.cpp.

What a text spells is text: a special token's name in it (`<s>`, `<|im_end|>`) becomes the tokens of its letters, as in
llama.cpp, and only the convention itself adds one.

Rejected: re-tokenizing in each engine (their tokenizers differ in corners, and the comparison would measure
that), and special tokens around every document (no engine's perplexity tool does it).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, unknown
from workbench.records import Evaluation, TokenSet, TokensRequest, from_json, to_json
from workbench.worker import Progress
from workbench.worker.tokens.conventions import CONVENTIONS, Spans
from workbench.worker.tokens.file import TokenFile, write_tokens
from workbench.worker.tokens.text import Source, one_line, read_text, source_of

CORPUS_VERSION = 1
"""Version of the way text becomes windows. Raise it when the same recipe would give other ids."""

OVERLAP_TOKENS = 32
"""A run of equal ids this long in both sets is shared text, not chance."""
ROLES = ("evaluation", "calibration")

DRAW_FROM = 8
"""A streamed dataset is read until it holds this many times the tokens that calibration draws."""


@dataclass(frozen=True)
class Tokens:
    """A source's text as token ids, with each token's place in the text where the tokenizer tells it."""

    text: str
    ids: list[int]
    begins: array[int] | None
    ends: array[int] | None


def build(payload: object, progress: Progress) -> object:
    """Worker for a `TokensRequest`: write the windows of every set of a recipe.

    Each file holds `windows` (lists of `window` ids), `score_from` (one position a window: positions from it to
    window - 2 are scored), `vocab_size`, `bos` (an id, or null if none is added) and `digest`. Returns
    `{"sets": [Evaluation, ...]}` in the order asked for. Raises `UserError` for all that a user can mend.
    """
    request: TokensRequest = from_json(TokensRequest, payload)
    sets = request.sets
    for each in sets:
        _check_set(each)
    tokenizer, vocab_size, bos = open_tokenizer(Path(request.base), request.allow_remote_code)
    needs = _needed_tokens(sets)
    texts: dict[Source, Tokens] = {}
    for done, (source, need) in enumerate(needs.items()):
        progress(done, len(needs) + 1, f"reading {source}")
        texts[source] = _tokens(source, tokenizer, need)

    chosen: dict[int, Spans] = {}
    read: dict[Source, list[tuple[int, int]]] = {}
    for index, each in enumerate(sets):
        if each.role == "evaluation":
            source = source_of(each.source)
            chosen[index] = _evaluation_spans(each, len(texts[source].ids))
            read.setdefault(source, []).extend((start, start + each.window) for start, _ in chosen[index])
    evaluated = _runs_of(texts[source].ids[a:b] for source, spans in read.items() for a, b in _merged(spans))
    for index, each in enumerate(sets):
        if each.role == "calibration":
            source = source_of(each.source)
            ids, used = texts[source].ids, _merged(read.get(source, []))
            starts = _calibration_starts(each, ids, used, set() if request.allow_overlap else evaluated)
            if not request.allow_overlap:
                _refuse_overlap(each, [ids[start : start + each.window] for start in starts], evaluated)
            [(_, first)] = _spans(each, each.window)
            chosen[index] = [(start, first) for start in starts]

    made = [
        _write(each, texts[source_of(each.source)], chosen[index], tokenizer, vocab_size, bos)
        for index, each in enumerate(sets)
    ]
    progress(1, 1, "token windows written")
    return {"sets": to_json(made)}


# --- what is asked for --------------------------------------------------------------------------


def _check_set(each: TokenSet) -> None:
    if each.role not in ROLES:
        raise unknown("role", each.role, ROLES, each.name)
    if each.score not in CONVENTIONS:
        raise unknown("score", each.score, CONVENTIONS, each.name)
    if each.window < 4:
        raise UserError(f"{each.name}: window {each.window} is too short; 512 is usual.")
    if CONVENTIONS[each.score].stride and not 1 <= (each.stride or 0) < each.window:
        raise UserError(
            f"{each.name}: `score: {each.score}` needs a `stride` from 1 to {each.window - 1}, not {each.stride}."
        )


def _spans(each: TokenSet, tokens: int) -> Spans:
    """The windows of so many tokens by the set's convention."""
    return CONVENTIONS[each.score].spans(tokens, each.window, each.stride or 0)


def _needed_tokens(sets: list[TokenSet]) -> dict[Source, int | None]:
    """How many tokens of each distinct source are wanted; None for all of them."""
    needs: dict[Source, int | None] = {}
    for each in sets:
        source = source_of(each.source)
        before = needs.get(source, 0)
        if each.windows is None or before is None:
            needs[source] = None
        else:
            drawn = DRAW_FROM if each.role == "calibration" else 1
            needs[source] = before + each.windows * each.window * drawn
    return needs


# --- tokens -------------------------------------------------------------------------------------


def open_tokenizer(base: Path, remote_code: bool) -> tuple[Any, int, int | None]:
    """The base's tokenizer, the model's vocabulary size, and the BOS id if the tokenizer adds one."""
    from transformers import AutoTokenizer

    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(str(base), trust_remote_code=remote_code, local_files_only=True)
        probe = tokenizer("a")["input_ids"]
    except Exception as error:  # transformers raises whatever a broken file led to
        raise UserError(f"{base}: its tokenizer cannot be loaded ({one_line(error)}). Is the base complete?") from None
    sizes = config if "vocab_size" in config else config.get("text_config", {})
    if not sizes.get("vocab_size"):
        raise UserError(f"{base / 'config.json'} has no `vocab_size`. Is the base complete?")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and bool(probe) and probe[0] == bos
    return tokenizer, int(sizes["vocab_size"]), int(bos) if adds_bos else None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """What a tokenizer would take for more than text, and its ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: number for number, token in added.items() if token.special}


def encode(tokenizer: Any, text: str, where: str, **more: Any) -> Any:
    """A text as the tokenizer's `input_ids`, special tokens in it spelt out; `more` is for the tokenizer.

    Raises `UserError` for a tokenizer that cannot spell one out.
    """
    special = {word: number for word, number in special_tokens(tokenizer).items() if word in text}
    # Only then asked for: tokenizers without a fast form give up the other tokens added to them with it.
    more |= {"split_special_tokens": True} if special else {}
    encoded = tokenizer(text, add_special_tokens=False, **more)
    taken = set(special.values()) & set(encoded["input_ids"]) - {tokenizer.unk_token_id} if special else ()
    for word in (word for word, number in special.items() if number in taken):
        raise UserError(f"{where}: this tokenizer takes '{word}' for a special token, not for text: leave it out")
    return encoded


def _tokens(source: Source, tokenizer: Any, need_tokens: int | None) -> Tokens:
    text = read_text(source, need_tokens)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = encode(tokenizer, text, str(source), return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    if not fast:
        return Tokens(text, ids, None, None)
    offsets = encoded["offset_mapping"]
    return Tokens(text, ids, array("q", (a for a, _ in offsets)), array("q", (b for _, b in offsets)))


def _evaluation_spans(each: TokenSet, count: int) -> Spans:
    """The evaluation's windows in a text of `count` tokens, which must hold as many as were asked for."""
    window, spans = each.window, _spans(each, count)
    wanted = each.windows or len(spans)
    if len(spans) < max(1, wanted):
        room = f"{len(spans)} windows of {window} fit" if spans else f"no window of {window} fits"
        fewer = f"Ask for {len(spans)} or fewer" if spans else f"Use a window of {count} or fewer"
        raise UserError(
            f"evaluation '{each.name}': {source_of(each.source)} has {count} tokens, so {room}, "
            f"but {wanted or 'at least one'} asked for. {fewer}, or name a longer text."
        )
    return spans[:wanted]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _grams(ids: list[int]) -> list[bytes]:
    """Every run of `OVERLAP_TOKENS` ids, as bytes."""
    packed = array("I", ids)
    data, size = packed.tobytes(), packed.itemsize
    return [data[i * size : (i + OVERLAP_TOKENS) * size] for i in range(len(ids) - OVERLAP_TOKENS + 1)]


def _runs_of(texts: Iterable[list[int]]) -> set[bytes]:
    return {gram for ids in texts for gram in _grams(ids)}


def _calibration_starts(
    each: TokenSet, ids: list[int], used: list[tuple[int, int]], evaluated: set[bytes]
) -> list[int]:
    """Random windows that overlap neither each other nor, in a text shared with evaluation, any of its tokens.

    In a shared text, windows that repeat a passage of the evaluation (boilerplate does) are passed over too.
    """
    window, wanted = each.window, each.windows or 0
    edges = [0, *(edge for span in used for edge in span), len(ids)]
    free = [
        start
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
        for start in range(begin, end - window + 1, window)
    ]
    random.Random(each.seed).shuffle(free)
    fresh = (s for s in free if not used or evaluated.isdisjoint(_grams(ids[s : s + window])))
    starts = list(itertools.islice(fresh, wanted))
    if len(starts) < wanted:
        left = " that evaluation does not use" if used else ""
        raise UserError(
            f"calibration '{each.name}': {source_of(each.source)} has {len(ids)} tokens and {len(starts)} windows "
            f"of {window}{left}, but {wanted} asked for. Ask for fewer or shorter ones, or name a longer text."
        )
    return starts


def _refuse_overlap(each: TokenSet, windows: list[list[int]], evaluated: set[bytes]) -> None:
    runs = 0
    for ids in windows:
        inside = False
        for gram in _grams(ids):
            hit = gram in evaluated
            runs += hit and not inside
            inside = hit
    if runs:
        raise UserError(
            f"calibration '{each.name}' shares {runs} passages of {OVERLAP_TOKENS} tokens or more with the evaluation "
            "text, which makes any method look better than it is. Calibrate on another text, or set "
            "`allow_overlap: true`."
        )


def _write(
    each: TokenSet, source: Tokens, spans: Spans, tokenizer: Any, vocab_size: int, bos: int | None
) -> Evaluation:
    windows = [source.ids[start : start + each.window] for start, _ in spans]
    largest = max(map(max, windows))
    if largest >= vocab_size or min(map(min, windows)) < 0:
        raise UserError(
            f"{each.role} '{each.name}': the tokenizer gives id {largest}, but the model's vocabulary has "
            f"{vocab_size}: tokenizer and weights are not of the same model."
        )
    if bos is not None:
        windows = [[bos, *ids[1:]] for ids in windows]
    score_from = [first for _, first in spans]
    scored = [(start + first + 1, start + each.window) for start, first in spans]
    facts = [CORPUS_VERSION, windows, score_from, each.score, bos]
    digest = hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
    out = Path(each.out)
    used = sorted({token for ids in windows for token in ids})
    spelling = dict(zip(map(str, used), tokenizer.convert_ids_to_tokens(used), strict=True))
    write_tokens(out, TokenFile(windows, score_from, vocab_size, bos, digest, spelling))
    return Evaluation(
        each.name,
        str(out),
        digest,
        each.window,
        each.score,
        len(windows),
        scored_tokens=sum(end - begin for begin, end in scored),
        scored_bytes=sum(_bytes_of(source, begin, end, tokenizer) for begin, end in scored),
    )


def _bytes_of(source: Tokens, begin: int, end: int, tokenizer: Any) -> int:
    """UTF-8 bytes of the text between two tokens."""
    if source.begins is None or source.ends is None:
        return len(tokenizer.decode(source.ids[begin:end], clean_up_tokenization_spaces=False).encode())
    return len(source.text[source.begins[begin] : source.ends[end - 1]].encode())
