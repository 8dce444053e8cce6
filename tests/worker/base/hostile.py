"""Ways to spoil a folder of a model, each by chance: those that no reader may take for a model, and some that change
nothing."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json")
Change = Callable[[Path, random.Random], None]


def split(folder: Path, chance: random.Random) -> dict[str, str]:
    """The weights as two shards and an index; the index's map."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    where = {name: f"model-{chance.choice((1, 2))}.safetensors" for name in sorted(tensors)}
    where |= dict(zip(sorted(tensors), ("model-1.safetensors", "model-2.safetensors"), strict=False))
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def no_file(folder: Path, chance: random.Random) -> None:
    """A pipe, a folder, a socket, a device, a link to nowhere, to itself or to a folder, in a file's place."""
    file = folder / chance.choice((*READ, "README.md", "special_tokens_map.json"))
    file.unlink(missing_ok=True)
    kind = chance.randrange(8)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        here = Path.cwd()
        os.chdir(folder)  # A socket's path may have a hundred letters.
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(file.name)
        finally:
            os.chdir(here)
    else:
        target = ("/dev/zero", "/dev/urandom", "nowhere", file.name, "..")[kind - 3]
        file.symlink_to(target)


def not_json(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice((*READ[:1], *READ[2:]))
    whole = file.read_bytes()
    junk = (
        b"",
        b"null",
        b"[1]",
        b"5",
        b'"x"',
        whole[: len(whole) // 2],
        b"\xff\xfe" + whole,
        whole.decode().encode("utf-16"),
    )
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    file.write_bytes(chance.choice((*junk, deep, b"\x00" * 300, b"{" + b'"a": 1, ' * 3)))


def two_things(folder: Path, chance: random.Random) -> None:
    """A key twice, with another value the second time."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = chance.choice(sorted(config))
    other = chance.choice([config[k] for k in sorted(config) if config[k] != config[key]])
    file.write_text(file.read_text().rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(other)}}}")


def quantized(folder: Path, chance: random.Random) -> None:
    edit(folder, quantization_config=chance.choice(({"quant_method": "fp8"}, {}, 5, "x", [1])) or {"a": 1})


def own_code(folder: Path, chance: random.Random) -> None:
    edit(folder, auto_map=chance.choice(({"AutoModelForCausalLM": "x.Y"}, ["x"], "x")))


def another_model(folder: Path, chance: random.Random) -> None:
    kind = chance.choice(("bert", "t5", "gpt2", "nonesuch", "mamba", "whisper", "", "../x", "llava", "clip"))
    name = chance.choice(
        ("BertForMaskedLM", "T5ForConditionalGeneration", "Nonesuch", "GPT2LMHeadModel", "", "LlamaModel")
    )
    edit(
        folder,
        **chance.choice(
            ({"model_type": kind}, {"architectures": [name]}, {"model_type": kind, "architectures": [name]})
        ),
    )


def sizes(folder: Path, chance: random.Random) -> None:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
    key = chance.choice((*keys, "intermediate_size"))
    was = json.loads((folder / "config.json").read_text())[key]
    values = (0, -1, -was, was + 1, was * 3, 10**6, 10**9, 10**30, str(was), [was, was], {}, was + 0.5, False, 1e999)
    edit(folder, **{key: chance.choice(values)})


def numbers(folder: Path, chance: random.Random) -> None:
    """What no shape tells."""
    wrong = (-1, "x", [], {}, float("nan"), float("inf"), True)
    key = chance.choice(
        ("rms_norm_eps", "rope_theta", "max_position_embeddings", "sliding_window", "tie_word_embeddings")
    )
    values = {
        "rms_norm_eps": (*wrong, 0, 7.0, 1e30, None),
        "rope_theta": (*wrong, 0, 1e30, 0.5),
        "max_position_embeddings": (*wrong, 0, 1.5, 10**30),
        "sliding_window": (*wrong, 0, 2.5),
        "tie_word_embeddings": ("false", "true", 2, [], {}, -1),
    }
    edit(folder, **{key: chance.choice(values[key])})


def rope(folder: Path, chance: random.Random) -> None:
    factor = chance.choice((0, -1, "x", float("nan"), [], 1e9))
    scaling = chance.choice(
        ("x", 5, [1], {"rope_type": "nonesuch"}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": factor})
    )
    edit(folder, rope_scaling=chance.choice((scaling, {"rope_type": "linear", "factor": factor})))


def slip(folder: Path, chance: random.Random) -> None:
    """A letter of a key that decides something."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    key = chance.choice(
        ("rms_norm_eps", "rope_theta", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    )
    place = chance.randrange(1, len(key))
    config[key[:place] + chance.choice("bxz7") + key[place + 1 :]] = config.pop(key)
    file.write_text(json.dumps(config))


def header(folder: Path, chance: random.Random) -> None:
    """The safetensors header: places, types, shapes, names, its length."""
    file = folder / WEIGHTS
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    table, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    table.pop("__metadata__", None)
    name, other = chance.sample(sorted(table), 2)
    entry, kind = table[name], chance.randrange(12)
    begin, end = entry["data_offsets"]
    if kind == 0:
        entry["data_offsets"] = chance.choice(
            (
                [begin + 4, end + 4],
                [end, begin],
                [begin, end + 2**40],
                [-8, end],
                [begin, end - 4],
                table[other]["data_offsets"],
            )
        )
    elif kind == 1:
        entry["data_offsets"] = chance.choice(
            ([begin], [], None, "x", [begin, str(end)], [begin + 0.5, end], [0, end, 1])
        )
    elif kind == 2:
        entry["dtype"] = chance.choice(("F7", "", None, 5, "f32", "I8", "F64", "I32", "U32", "BOOL", "F16", "C64"))
    elif kind == 3:
        rows = entry["shape"]
        entry["shape"] = chance.choice(
            ([*rows, 2], [], [-1], [2**62, 2**62], [0], [[1]], None, "x", [1.5], [*rows[:-1], rows[-1] * 2])
        )
    elif kind == 4:
        entry.pop(chance.choice(sorted(entry)))
    elif kind == 5:
        del table[name]
    elif kind == 6:
        table[name + chance.choice((".x", "0", " "))] = table.pop(name)
    elif kind == 7:
        table[name] = chance.choice((None, [], 5, "x", {}))
    elif kind == 8:
        table["__metadata__"] = chance.choice((5, [1], {"a": 1}, {"a": {"b": "c"}}, "x"))
    text = json.dumps(table).encode()
    if kind == 9:
        again = {**entry, "data_offsets": table[other]["data_offsets"]}
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(again)}}}".encode()
    stated = len(text)
    if kind == 10:
        stated = chance.choice((0, 1, stated - 1, stated + 1, 2**63, 2**64 - 1, len(data), 100_000_001))
    if kind == 11:
        body = chance.choice((body[:-1], body + b"\x00", body[: len(body) // 2], b""))
    file.write_bytes(struct.pack("<Q", stated) + text + body)


def index(folder: Path, chance: random.Random) -> None:
    where = split(folder, chance)
    name = chance.choice(sorted(where))
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    outside.write_bytes((folder / where[name]).read_bytes())
    lies = (
        f"../{outside.name}",
        str(outside),
        "gone.safetensors",
        "a/b.safetensors",
        "",
        5,
        None,
        [where[name]],
        ".",
        "..",
    )
    other = {"model-1.safetensors": "model-2.safetensors", "model-2.safetensors": "model-1.safetensors"}[where[name]]
    maps: tuple[Any, ...] = (
        None,
        [],
        {},
        "x",
        {**where, name: chance.choice(lies)},
        {**where, name: chance.choice(lies)},
    )
    maps += ({**where, name: other}, {n: f for n, f in where.items() if n != name}, {**where, "model.extra": other})
    (folder / INDEX).write_text(json.dumps({"weight_map": chance.choice(maps)}))


def shards(folder: Path, chance: random.Random) -> None:
    """Shards that are not those of the index: one gone, one tensor in both, none listed."""
    from safetensors.numpy import load_file, save_file

    where = split(folder, chance)
    kind, name = chance.randrange(3), chance.choice(sorted(where))
    if kind == 0:
        (folder / where[name]).unlink()
    elif kind == 1:
        (folder / INDEX).unlink()
    else:
        for file in set(where.values()) - {where[name]}:
            tensor = load_file(folder / where[name])[name]
            save_file({**load_file(folder / file), name: tensor}, folder / file)


def no_weights(folder: Path, chance: random.Random) -> None:
    (folder / WEIGHTS).unlink()
    if chance.random() < 0.7:
        (folder / chance.choice(("pytorch_model.bin", "model.pt", "consolidated.00.pth"))).write_bytes(b"\x80\x04cos\n")


def vocabulary(folder: Path, chance: random.Random) -> None:
    """A tokenizer that is none, or another model's."""
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    kind = chance.randrange(4)
    if kind == 0:
        whole["model"] = chance.choice((None, {}, [], {"type": "Nonesuch"}, 5))
    elif kind == 1:
        whole["model"]["vocab"] = chance.choice((None, [], {"a": "b"}, {"a": -1}, 5, {"a": 2**40}))
    elif kind == 2:
        whole["model"]["vocab"] |= {
            f"more{n}": len(whole["model"]["vocab"]) + n for n in range(chance.randrange(1, 50))
        }
    else:
        whole["model"]["merges"] = chance.choice((["a"], [["a"]], "x", 5, [[1, 2]], ["nonesuch another"]))
    file.write_text(json.dumps(whole))


def generation(folder: Path, chance: random.Random) -> None:
    text = chance.choice(("[]", "null", "{", "5", "\x00", '{"max_length": 5, "max_length": 6}'))
    (folder / "generation_config.json").write_text(text)


def gone(folder: Path, chance: random.Random) -> None:
    (folder / "config.json").unlink()
    if chance.random() < 0.5:
        (folder / "adapter_config.json").write_text(
            chance.choice(('{"base_model_name_or_path": "a/b"}', "{}", "[]", ""))
        )


def nothing(folder: Path, chance: random.Random) -> None:
    """What readers of a model pass over."""
    kind = chance.randrange(7)
    if kind == 0:
        (folder / "README.md").write_bytes(chance.choice((b"", b"---\n{\n---\n", b"\xff\xfe", b"---\n" + b"[" * 5000)))
    elif kind == 1:
        os.mkfifo(folder / "pipe")
    elif kind == 2:
        (folder / "pytorch_model.bin").write_bytes(b"x")
    elif kind == 3:
        split(folder, chance)
    elif kind == 4:
        (folder / "original").mkdir()
        (folder / "original" / "config.json").write_text("{")
    elif kind == 5:
        edit(folder, a_word_of_their_own=chance.choice((None, 5, "x", {"a": [1]})))
    else:
        kept = folder.parent / f"{folder.name}-blobs"
        kept.mkdir()
        for file in list(folder.iterdir()):  # As a hub's cache keeps its files.
            target = kept / file.name
            file.rename(target)
            file.symlink_to(target)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BAD: tuple[Change, ...] = (no_file, not_json, two_things, quantized, own_code, another_model, gone, no_weights)
BAD += (sizes, sizes, numbers, numbers, rope, slip, header, header, header, index, shards, vocabulary, generation)
