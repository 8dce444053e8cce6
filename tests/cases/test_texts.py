"""Texts as people have them, from the command to the token files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench

pytestmark = pytest.mark.slow
PROSE = "It was a bright cold day in April, and the clocks were striking thirteen.\nWinston Smith slipped in. " * 8
SPECIAL = "<s>" + PROSE[:100] + "</s><s> and <unk> " + PROSE
WINDOWS = {"window": 32, "windows": 8, "score": "all"}


def test_one_text_has_one_digest_and_special_tokens_names_are_text(bench: Bench, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    contents: dict[str, bytes] = {
        "lf.txt": PROSE.encode(),
        "crlf.txt": PROSE.replace("\n", "\r\n").encode(),
        "bom.txt": b"\xef\xbb\xbf" + PROSE.encode(),
        "array.json": json.dumps([{"text": PROSE}]).encode(),
        "crlf.jsonl": json.dumps({"text": PROSE}).encode() + b"\r\n",
        "special.txt": SPECIAL.encode(),
    }
    for name, content in contents.items():
        (bench.folder / name).write_bytes(content)
    sets = {name.replace(".", "-"): {"source": {"file": name}, **WINDOWS} for name in contents}
    made = bench("quantize", bench.recipe(evaluation=sets))
    assert made.returncode == 0, made.stderr
    # The newest: the cache is shared.
    record = max((bench.home / "tokens").glob("*/token.json"), key=lambda path: path.stat().st_mtime_ns)
    stored: dict[str, Any] = json.loads(record.read_text())["sets"]
    digests = [stored["evaluation" if not i else f"evaluation-{i + 1}"]["digest"] for i in range(len(sets))]
    assert len(set(digests[:5])) == 1 and digests[5] != digests[0]
    windows = json.loads((record.parent / "evaluation-6.json").read_text())["windows"]
    ids = [token for window in windows for token in window]
    assert not {0, 1, 2} & set(ids)
    assert AutoTokenizer.from_pretrained(tiny_llama).decode(ids) == SPECIAL[: len(ids)]


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_half_a_character_ends_the_run_by_a_line_with_its_place(bench: Bench, role: str) -> None:
    text = '{"text": "whole"}\n{"text": "bad \\ud83d half of an emoji"}\n' + json.dumps({"text": PROSE}) + "\n"
    (bench.folder / "c.jsonl").write_text(text)
    own: dict[str, Any] = {"source": {"file": "c.jsonl"}, "window": 32, "windows": 4}
    variants = [{"gptq": {"group_size": 64}}]
    sets: dict[str, Any] = {"evaluation": {"source": {"text": PROSE}, **WINDOWS}, "calibration": own, role: own}
    done = bench("quantize", bench.recipe(variants=variants, **sets), "-q")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {bench.folder / 'c.jsonl'}: line 2 holds \\ud83d, half of a character. Write the whole one, or none.\n"
    )
