"""From text to token ids, once a recipe, so that every engine sees the same tokens.

A set of windows is for evaluation (what a variant is scored on) or for calibration (what a method may look
at); tokens of the one never appear in the other. Evaluation takes consecutive windows; calibration draws
windows at random, and where both come from one text, only from what evaluation leaves.

The scoring convention is llama.cpp's unless a recipe says otherwise: independent windows, and only
positions from half the window on count, so that every scored token has a context of at least half a window.
Position p of a window is scored by how well it predicts token p + 1; the last has nothing to predict.
A window begins with BOS if the tokenizer adds one: it takes the first token's place, as in llama.cpp.

Rejected: re-tokenizing in each engine (their tokenizers differ in corners, and the comparison would measure
that), and special tokens around every document (no engine's perplexity tool does it).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, did_you_mean, install_with, unknown
from workbench.worker import Progress

CORPUS_VERSION = 1
"""Of the way text becomes windows. Raise it when the same recipe would give other ids."""

OVERLAP_TOKENS = 32
"""A run of equal ids this long in both sets is shared text, not chance."""

OTHERWISE = 20
"""One token in so many may be spelt otherwise by a variant's tokenizer before it counts as another one."""

SOURCES = ("module", "package", "file", "dataset", "text")
SCORES = ("second-half", "all", "strided")
ROLES = ("evaluation", "calibration")
SEPARATOR = "\n\n"
"""Between documents; WikiText's perplexity is by custom measured on its lines joined so."""

DRAW_FROM = 8
"""A streamed dataset is read until it holds this many times the tokens that calibration draws."""


@dataclass(frozen=True)
class Tokens:
    """A source's text as token ids, with each token's place in the text where the tokenizer tells it."""

    text: str
    ids: list[int]
    begins: array[int] | None
    ends: array[int] | None


def build(payload: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the windows of every set of a recipe.

    `payload`: `base` (a Hugging Face directory), `sets` (each with `role`, `name`, `source`, `window`, `windows`,
    `score`, `stride`, `seed`, `skip_windows`, `out`), `allow_overlap`, `allow_remote_code`.

    Each file holds `windows` (lists of `window` ids), `score_from` (one position a window: positions from it to
    window - 2 are scored), `vocab_size`, `bos` (an id, or null if none is added) and `digest`. Returns
    `{"sets": [...]}` in the order asked for, each with `name`, `role`, `path`, `digest`, `window`, `windows`, `score`,
    `scored_tokens` and `scored_bytes` (UTF-8 bytes of the text that the scored tokens spell).
    Raises `UserError` for all that a user can mend.
    """
    base, sets = Path(payload["base"]), payload["sets"]
    for entry in sets:
        _check_set(entry)
    tokenizer, vocab_size, bos = open_tokenizer(base, bool(payload.get("allow_remote_code")))
    needs = _needed_tokens(sets)
    sources: dict[str, Tokens] = {}
    for done, (key, need) in enumerate(needs.items()):
        progress(done, len(needs) + 1, f"reading {_describe(json.loads(key))}")
        sources[key] = _tokens(json.loads(key), tokenizer, need)

    chosen: dict[int, list[int]] = {}
    starts_of: dict[str, list[tuple[int, int]]] = {}
    for index, entry in enumerate(sets):
        if entry["role"] == "evaluation":
            key = _key(entry["source"])
            chosen[index] = _evaluation_starts(entry, len(sources[key].ids))
            starts_of.setdefault(key, []).extend((s, s + entry["window"]) for s in chosen[index])
    evaluated = _runs_of(
        ids for key, spans in starts_of.items() for ids in (sources[key].ids[a:b] for a, b in _merged(spans))
    )
    overlap = bool(payload.get("allow_overlap"))
    for index, entry in enumerate(sets):
        if entry["role"] == "calibration":
            key = _key(entry["source"])
            ids, used = sources[key].ids, _merged(starts_of.get(key, []))
            chosen[index] = _calibration_starts(entry, ids, used, set() if overlap else evaluated)
            if not overlap:
                _refuse_overlap(entry, [ids[s : s + entry["window"]] for s in chosen[index]], evaluated)

    replies = []
    for index, entry in enumerate(sets):
        source = sources[_key(entry["source"])]
        replies.append(_write(entry, source, chosen[index], tokenizer, vocab_size, bos))
    progress(1, 1, "token windows written")
    return {"sets": replies}


# --- what is asked for --------------------------------------------------------------------------


def _check_set(entry: dict[str, Any]) -> None:
    name = entry.get("name") or entry.get("role", "set")
    if entry.get("role") not in ROLES:
        raise unknown("role", str(entry.get("role")), ROLES, name)
    if entry.get("score", "second-half") not in SCORES:
        raise unknown("score", str(entry["score"]), SCORES, name)
    window = entry.get("window")
    if not isinstance(window, int) or window < 4:
        raise UserError(f"{name}: window {window} is too short; 512 is usual.")
    windows = entry.get("windows")
    if windows is not None and windows < 1:
        raise UserError(f"{name}: windows must be 1 or more.")
    if entry["role"] == "calibration" and windows is None:
        raise UserError(f"{name}: say how many `windows` to draw for calibration.")
    if entry.get("score") == "strided":
        stride = entry.get("stride")
        if not isinstance(stride, int) or not 1 <= stride < window:
            raise UserError(f"{name}: `score: strided` needs a `stride` from 1 to {window - 1}, not {stride}.")


def _key(source: dict[str, Any]) -> str:
    return json.dumps(source, sort_keys=True)


def _step(entry: dict[str, Any]) -> int:
    """Tokens from one evaluation window's start to the next one's."""
    return int(entry["stride"]) if entry.get("score") == "strided" else int(entry["window"])


def _needed_tokens(sets: list[dict[str, Any]]) -> dict[str, int | None]:
    """How many tokens of each distinct source are wanted; None for all of them."""
    needs: dict[str, int | None] = {}
    for entry in sets:
        key = _key(entry["source"])
        if entry.get("windows") is None:
            needs[key] = None
            continue
        count = int(entry["windows"]) * int(entry["window"]) * (DRAW_FROM if entry["role"] == "calibration" else 1)
        count += int(entry.get("skip_windows") or 0) * int(entry["window"])
        before = needs.get(key, 0)
        needs[key] = None if before is None else before + count
    return needs


def _describe(source: dict[str, Any]) -> str:
    kind = _kind(source)
    if kind == "text":
        return "the recipe's own text"
    parts = [str(source[k]) for k in ("config", "split") if source.get(k)]
    return " ".join([f"{kind} '{source[kind]}'", *parts, *([str(source["file"])] if kind == "package" else [])])


def _kind(source: dict[str, Any]) -> str:
    for kind in SOURCES:
        if kind in source and source[kind] is not None:
            return kind
    for key in source:
        raise unknown("text source", key, SOURCES)
    raise UserError(f"a text source is empty. Give one of: {', '.join(SOURCES)}.")


# --- text ---------------------------------------------------------------------------------------


def read_text(source: dict[str, Any], need_tokens: int | None = None) -> str:
    """A source's text; of a streamed dataset about as much as `need_tokens` tokens take. Never empty."""
    kind = _kind(source)
    if kind == "text":
        text = str(source["text"])
    elif kind == "module":
        text = _module_text(source["module"], source.get("attribute"))
    elif kind == "dataset":
        text = _dataset_text(source, need_tokens)
    else:
        path = _package_path(source["package"], source.get("file")) if kind == "package" else _file_path(source["file"])
        text = _jsonl_text(path, source.get("field") or "text") if _is_jsonl(path) else _plain_text(path)
    if not text.strip():
        raise UserError(f"{_describe(source)} is empty: there is nothing to score. Name a source with text.")
    return text


def _module_text(name: str, attribute: str | None) -> str:
    """The text that a Python module carries: a string, or a mapping's strings in the order of their keys."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UserError(f"module '{name}' cannot be imported here: install the package it is part of.") from None
    held = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, str | dict) and v}
    wanted = attribute or (name.rpartition(".")[2] if name.rpartition(".")[2] in held else None)
    if wanted is None and len(held) == 1:
        wanted = next(iter(held))
    if wanted is None or wanted not in held:
        hint = did_you_mean(attribute or "", held) if held else "It holds neither strings nor mappings."
        raise UserError(f"module '{name}': which `attribute` holds the text? {hint}")
    value = held[wanted]
    if isinstance(value, str):
        return value
    if not all(isinstance(item, str) for item in value.values()):
        raise UserError(f"module '{name}': {wanted} holds more than strings. Name another `attribute`.")
    return SEPARATOR.join(value[key] for key in sorted(value))


def _file_path(value: str) -> Path:
    path = Path(value).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"text file {path} is a directory. Name a .txt or .jsonl file in it.")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside)
    raise UserError(f"text file {path} does not exist. {hint if hint.startswith('Did') else 'Check the path.'}")


def _package_path(package: str, file: str | None) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise install_with(f"the package '{package}' that holds the text", f"pip install {package}") from None
    if not file:
        raise UserError(f"package '{package}': say which `file` of it holds the text.")
    path = Path(str(distribution.locate_file(file)))
    if not path.is_file():
        names = [str(f) for f in distribution.files or [] if not str(f).endswith(".pyc")]
        hint = did_you_mean(file, names)
        raise UserError(
            f"package '{package}' {distribution.version} has no file '{file}'. "
            f"{hint if hint.startswith('Did') else f'It has {len(names)} files.'}"
        )
    return path


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _plain_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise UserError(f"{path} is a binary file (a zero byte at {data.index(0)}). Name UTF-8 text or JSONL.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Convert it, or name another file.") from None


def _jsonl_text(path: Path, field: str) -> str:
    documents = []
    for number, line in enumerate(_plain_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is not valid JSON. Each line must be one object.") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = list(record) if isinstance(record, dict) else []
            state = "is not text" if field in keys else "is missing"
            raise UserError(f"{path}: line {number}: field '{field}' {state}. {did_you_mean(field, keys)}".rstrip())
        documents.append(record[field])
    return SEPARATOR.join(documents)


def _dataset_text(source: dict[str, Any], need_tokens: int | None) -> str:
    """Documents of a dataset, joined. C4 and its like are streamed: only what is needed is fetched."""
    try:
        import datasets
    except ImportError:
        raise install_with("the library `datasets`", "pip install datasets") from None
    name, config, split = source["dataset"], source.get("config"), source.get("split") or "train"
    field = source.get("field") or "text"
    streaming = bool(source.get("streaming", name.lower().rpartition("/")[2] in ("c4", "mc4", "fineweb", "slimpajama")))
    where = _describe(source)
    by_hand = "or give the text as `file:` (.txt or .jsonl)"
    limit = max(0, need_tokens or 0) * 8  # characters: no tokenizer of this field spends fewer tokens on text
    documents: list[str] = []
    held = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(rows):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: row {number} has no text field '{field}'. {did_you_mean(field, row)}")
            documents.append(row[field])
            held += len(row[field])
            if streaming and need_tokens is not None and held > limit:
                break
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{where} does not exist, is gated, or the hub cannot be reached: check the name and HF_TOKEN, {by_hand}."
        ) from None
    except UserError:
        raise
    except ValueError as error:  # unknown configurations and splits come as plain ValueErrors
        raise UserError(f"{where}: {_one_line(error)} Check `config` and `split`.") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} cannot be fetched ({_one_line(error)}): check the connection, {by_hand}.") from None
    return SEPARATOR.join(documents)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]


# --- tokens -------------------------------------------------------------------------------------


def open_tokenizer(base: Path, remote_code: bool) -> tuple[Any, int, int | None]:
    """The base's tokenizer, the model's vocabulary size, and the BOS id if the tokenizer adds one."""
    from transformers import AutoTokenizer

    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(str(base), trust_remote_code=remote_code, local_files_only=True)
        probe = tokenizer("a")["input_ids"]
    except Exception as error:  # transformers raises whatever a broken file led to
        raise UserError(f"{base}: its tokenizer cannot be loaded ({_one_line(error)}). Is the base complete?") from None
    sizes = config if "vocab_size" in config else config.get("text_config", {})
    if not sizes.get("vocab_size"):
        raise UserError(f"{base / 'config.json'} has no `vocab_size`. Is the base complete?")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and bool(probe) and probe[0] == bos
    return tokenizer, int(sizes["vocab_size"]), int(bos) if adds_bos else None


def _tokens(source: dict[str, Any], tokenizer: Any, need_tokens: int | None) -> Tokens:
    text = read_text(source, need_tokens)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    if not fast:
        return Tokens(text, ids, None, None)
    offsets = encoded["offset_mapping"]
    return Tokens(text, ids, array("q", (a for a, _ in offsets)), array("q", (b for _, b in offsets)))


def _evaluation_starts(entry: dict[str, Any], count: int) -> list[int]:
    """Where consecutive windows begin; the text must hold as many as were asked for."""
    window, step = int(entry["window"]), _step(entry)
    skip = int(entry.get("skip_windows") or 0)
    first = skip * window
    fit = max(0, (count - first - window) // step + 1) if count - first >= window else 0
    wanted = entry.get("windows") or fit
    if fit < max(1, wanted):
        skipped = f" after skipping {skip} windows" if skip else ""
        room = f"{fit} windows of {window} fit{skipped}" if fit else f"no window of {window} fits{skipped}"
        shorter = max(0, count - first)
        advice = (
            f"Ask for {fit} or fewer"
            if fit
            else f"Use a window of {shorter} or fewer"
            if shorter >= 4
            else "Skip fewer"
        )
        raise UserError(
            f"evaluation '{entry.get('name')}': {_describe(entry['source'])} has {count} tokens, so {room}, "
            f"but {wanted or 'at least one'} asked for. {advice}, or name a longer text."
        )
    return [first + i * step for i in range(wanted)]


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
    entry: dict[str, Any], ids: list[int], used: list[tuple[int, int]], evaluated: set[bytes]
) -> list[int]:
    """Random windows that overlap neither each other nor, in a text shared with evaluation, any of its tokens.

    In a shared text, windows that repeat a passage of the evaluation (boilerplate does) are passed over too.
    """
    window, wanted = int(entry["window"]), int(entry["windows"])
    skip = int(entry.get("skip_windows") or 0) * window
    taken = _merged([(0, skip), *used]) if skip else used
    edges = [0, *(edge for span in taken for edge in span), len(ids)]
    free = [
        start
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
        for start in range(begin, end - window + 1, window)
    ]
    random.Random(int(entry.get("seed") or 0)).shuffle(free)
    starts: list[int] = []
    for start in free:
        if len(starts) == wanted:
            break
        if used and not evaluated.isdisjoint(_grams(ids[start : start + window])):
            continue
        starts.append(start)
    if len(starts) < wanted:
        left = " that evaluation does not use" if used else ""
        raise UserError(
            f"calibration '{entry.get('name')}': {_describe(entry['source'])} has {len(ids)} tokens and "
            f"{len(starts)} windows "
            f"of {window}{left}, but {wanted} asked for. Ask for fewer or shorter ones, or name a longer "
            "text."
        )
    return starts


def _refuse_overlap(entry: dict[str, Any], windows: list[list[int]], evaluated: set[bytes]) -> None:
    runs = 0
    for ids in windows:
        inside = False
        for gram in _grams(ids):
            hit = gram in evaluated
            runs += hit and not inside
            inside = hit
    if runs:
        raise UserError(
            f"calibration '{entry.get('name')}' shares {runs} passages of {OVERLAP_TOKENS} tokens or more "
            "with the evaluation "
            "text, which makes any method look better than it is. Calibrate on another text, or set "
            "`allow_overlap: true`."
        )


def _score_from(entry: dict[str, Any], number: int) -> int:
    window, score = int(entry["window"]), entry.get("score") or "second-half"
    if score == "all" or (score == "strided" and number == 0):
        return 0
    # The tokens new to a strided window are its last `stride`; the position before each predicts it.
    return window - int(entry["stride"]) - 1 if score == "strided" else window // 2


def _write(
    entry: dict[str, Any], source: Tokens, starts: list[int], tokenizer: Any, vocab_size: int, bos: int | None
) -> dict[str, Any]:
    window, score = int(entry["window"]), entry.get("score") or "second-half"
    windows = [source.ids[start : start + window] for start in starts]
    largest = max(map(max, windows))
    if largest >= vocab_size or min(map(min, windows)) < 0:
        raise UserError(
            f"{entry['role']} '{entry.get('name')}': the tokenizer gives id {largest}, but the model's "
            f"vocabulary has {vocab_size}: "
            "tokenizer and weights are not of the same model."
        )
    if bos is not None:
        windows = [[bos, *ids[1:]] for ids in windows]
    score_from = [_score_from(entry, number) for number in range(len(windows))]
    scored = [(start + p + 1, start + window) for start, p in zip(starts, score_from, strict=True)]
    facts = [CORPUS_VERSION, windows, score_from, score, bos]
    digest = hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()
    out = Path(entry["out"])
    used = sorted({token for ids in windows for token in ids})
    content = {
        "windows": windows, "score_from": score_from, "vocab_size": vocab_size, "bos": bos, "digest": digest,
        "spelling": dict(zip(map(str, used), tokenizer.convert_ids_to_tokens(used), strict=True)),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, so that a killed run leaves no half of it.
    whole = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    whole.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    os.replace(whole, out)
    return {
        "name": entry.get("name"),
        "role": entry["role"],
        "path": str(out),
        "digest": digest,
        "window": window,
        "windows": len(windows),
        "score": score,
        "scored_tokens": sum(end - begin for begin, end in scored),
        "scored_bytes": sum(_bytes_of(source, begin, end, tokenizer) for begin, end in scored),
    }


# --- whose tokens -------------------------------------------------------------------------------


def check_spelling(path: str, spell: Callable[[list[int]], list[str | None] | None], variant: str) -> None:
    """Refuse a variant whose own tokenizer gives the ids of an evaluation other meanings than the base's.

    `spell(ids)` says what the ids are in the variant's vocabulary (None for one, or for all, where it cannot be told).
    Formats write a few tokens in ways of their own (bytes, added ones), so only more than one in `OTHERWISE` counts.
    """
    with open(path, encoding="utf-8") as file:
        ours = json.load(file).get("spelling")
    theirs = spell([int(token) for token in ours]) if ours else None
    if not ours or theirs is None:
        return
    pairs = [(token, a, b) for (token, a), b in zip(ours.items(), theirs, strict=True) if b is not None]
    other = [pair for pair in pairs if pair[1] != pair[2]]
    if len(other) * OTHERWISE > len(pairs):
        token, a, b = other[0]
        raise UserError(
            f"{variant} has another tokenizer than the base: {len(other)} of {len(pairs)} ids of the evaluation mean "
            f"something else (id {token}: {a!r} in the base, {b!r} here), so its perplexity is not comparable. "
            "Make the variant from this base"
        )


def checkpoint_spelling(folder: str, ids: list[int]) -> list[str | None] | None:
    """What ids are in the vocabulary of a Hugging Face directory's `tokenizer.json`; None if it has none to read."""
    try:
        stored = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = stored["model"]["vocab"]
        # Unigram models have pairs of piece and score in the order of their ids.
        names = dict(enumerate(p for p, _ in vocabulary)) if isinstance(vocabulary, list) else {}
        names |= {token: name for name, token in vocabulary.items()} if isinstance(vocabulary, dict) else {}
        names |= {entry["id"]: entry["content"] for entry in stored.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [names.get(token) for token in ids]


def _bytes_of(source: Tokens, begin: int, end: int, tokenizer: Any) -> int:
    """UTF-8 bytes of the text between two tokens."""
    if source.begins is None or source.ends is None:
        return len(tokenizer.decode(source.ids[begin:end], clean_up_tokenization_spaces=False).encode())
    return len(source.text[source.begins[begin] : source.ends[end - 1]].encode())
