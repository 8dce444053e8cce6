"""The `tokenizer.model` of a GGUF file's vocabulary, for readers that take no other (llama.cpp's converter, for Phi-3).

Written by hand: the messages are few, and the package of their definitions is not everywhere that this is. Layout:
sentencepiece's `sentencepiece_model.proto`; GGUF's types of tokens are its types of pieces, number for number.
"""

from __future__ import annotations

import struct
from typing import Any

from workbench.worker.base.gguf_file import field_of

UNKNOWN, CONTROL, BYTE = 2, 3, 6
UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"


def model_of(reader: Any) -> bytes | None:
    """A serialized `ModelProto` (BPE, nothing normalized) of a GGUF file's tokens, scores and types.

    None where the file's vocabulary is no SentencePiece one: of another kind, or without an unknown piece (which some
    files call a control token).
    """
    tokens, types = (field_of(reader, f"tokenizer.ggml.{key}") or [] for key in ("tokens", "token_type"))
    scores = field_of(reader, "tokenizer.ggml.scores") or []
    whole = len(tokens) == len(types) == len(scores) == len(set(tokens))
    by_name = tokens.index("<unk>") if "<unk>" in tokens else None
    unknown = types.index(UNKNOWN) if UNKNOWN in types else field_of(reader, UNKNOWN_ID, by_name)
    if field_of(reader, "tokenizer.ggml.model") != "llama" or not whole or unknown is None:
        return None
    types = [CONTROL if kind == UNKNOWN else kind for kind in types]
    types[unknown] = UNKNOWN
    pieces = (
        _bytes(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _number(3, 2) + _number(35, BYTE in types) + _number(40, unknown)
    for number, word in ((41, "bos"), (42, "eos"), (43, "padding")):
        trainer += _number(number, field_of(reader, f"tokenizer.ggml.{word}_token_id", -1))
    spaces = field_of(reader, "tokenizer.ggml.add_space_prefix", True)
    less = field_of(reader, "tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer = _bytes(1, b"identity") + _number(3, spaces) + _number(4, less) + _number(5, 1)
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(value: int) -> bytes:
    value, found = value % (1 << 64), b""
    while value > 127:
        found, value = found + bytes([value % 128 + 128]), value // 128
    return found + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field * 8) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field * 8 + 2) + _varint(len(value)) + value
