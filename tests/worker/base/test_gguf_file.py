"""Headers of GGUF files with bytes changed by chance: refused in one line, or the model that the file states."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import how_many
from tests.worker.base.gguf_files import write_gguf
from workbench.errors import UserError
from workbench.worker.base import headers
from workbench.worker.base.gguf_config import read_gguf

MUTANTS = 400
CALLS = 3
"""Times as many calls of functions as the whole file takes: no number in a header makes the reader toil."""
STATED = {
    "llama.context_length": "max_position_embeddings",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Numbers that nothing else in a file contradicts: the model must have what is stated."""
TEXT = ("general.", "tokenizer.ggml.")


def facts(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """(fields, configuration, tensors) of a file that is read."""
    read = read_gguf(path)
    fields = {name: field.contents() for name, field in read.reader.fields.items()}
    tensors = [(t.name, t.tensor_type, t.shape.tolist(), int(t.data_offset)) for t in read.reader.tensors]
    return fields, read.config.to_dict(), tensors


def counted(path: Path) -> tuple[Any, int]:
    """What `facts` returns or raises, and how many calls of functions it took."""
    calls, said = [0], None

    def count(*_: object) -> None:
        calls[0] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        said = facts(path)
    except UserError as error:
        said = error
    finally:
        sys.setprofile(before)
    return said, calls[0]


def shape_read(path: Path) -> object:
    """What a plan reads of a file, or why it does not."""
    try:
        return headers.read({"source": {"gguf": str(path)}}, lambda *_: None)
    except UserError as error:
        return error


@pytest.mark.parametrize("word", [b"general.architecture", b"general.name"])
def test_a_text_that_is_none(tmp_path: Path, word: bytes) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file, "F32")
    data = bytearray(file.read_bytes())
    data[data.index(word) + len(word) + 12] = 0xD0
    file.write_bytes(data)
    with pytest.raises(UserError, match="truncated or damaged"):
        read_gguf(file)
    assert "truncated or damaged" in str(shape_read(file))


@pytest.mark.slow
def test_changed_headers_are_refused_or_what_they_say(tmp_path: Path) -> None:
    """Half of the changes anywhere, half outside the vocabulary; two of three in one byte, the others in four."""
    import gguf

    whole, file = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    write_gguf(whole, "F32")
    data, reader = whole.read_bytes(), gguf.GGUFReader(whole)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    places = range(4, reader.data_offset)
    outside = [p for p in places if not tokens.offset + 64 <= p < tokens.offset + sum(x.nbytes for x in tokens.parts)]
    (fields, config, tensors), usual = counted(whole)
    chance, accepted = random.Random(7), 0
    count = how_many(MUTANTS)
    for number in range(count):
        mutant = bytearray(data)
        at = chance.choice(outside if number % 2 else places)
        for place in range(at, at + (1 if number % 3 else 4)):
            mutant[place] = chance.randrange(256)
        file.write_bytes(mutant)
        said, calls = counted(file)
        assert calls < CALLS * usual, f"mutant {number} at {at}"
        planned = shape_read(file)
        assert isinstance(said, UserError) or not isinstance(planned, UserError), f"mutant {number} at {at}: {planned}"
        if isinstance(said, UserError):
            assert "\n" not in str(said), f"mutant {number} at {at}: {said}"
            continue
        accepted += 1
        changed = {key for key in fields.keys() | said[0].keys() if fields.get(key) != said[0].get(key)}
        expected = dict(config)
        for key in changed:
            if key in STATED:
                expected[STATED[key]] = said[0][key]
            elif key == "llama.rope.freq_base":
                expected["rope_parameters"] = {**config["rope_parameters"], "rope_theta": said[0][key]}
            else:
                note = isinstance(said[0].get(key), str | None) and not key.startswith("llama.")
                assert note or key.startswith(TEXT), f"mutant {number} at {at}: {key}"
        ignored = {"_model_name_or_path", "_name_or_path", "bos_token_id", "eos_token_id"}
        found = {key: value for key, value in said[1].items() if key not in ignored}
        assert found == {key: value for key, value in expected.items() if key not in ignored}, (
            f"mutant {number} at {at}"
        )
        assert said[2] == tensors, f"mutant {number} at {at}"
    print(f"{count - accepted} of {count} refused, the others what they say")
    assert 0 < accepted < count
