"""A Hugging Face directory, written so that every reader of the field takes it.

Tensors are asked for one at a time and written a shard at a time, so a model is never whole in memory. The
configuration says rope and dtype in the words of transformers 4 and of 5.

Rejected: saving with transformers' own config writer (readers built on transformers 4 do not know
`rope_parameters` and fall back to a rope theta of 10000 without a word).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.disk import need_room
from workbench.front_matter import block
from workbench.worker import Progress, Tensors

SHARD_BYTES = 2_000_000_000


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def for_both_readers(given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4 and 5 both read: `rope_theta` and `rope_scaling` beside `rope_parameters`,
    `torch_dtype` beside `dtype`. Rope parameters that differ by layer type have no older form and stay as they are.
    """
    config = dict(given)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            # Newer readers let `rope_scaling` win over `rope_parameters`, so it must say all of it.
            config["rope_scaling"] = dict(rope)
    elif config.get("rope_theta") and not rope:
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        config["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": config["rope_theta"]}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        config["dtype"] = config["torch_dtype"] = dtype
    return config


def write_weights(
    out: Path, shapes: dict[str, tuple[int, ...]], dtype: str, make: Callable[[str], Any], progress: Progress, text: str
) -> None:
    """Write tensors one shard at a time, sharded and indexed as transformers does; `make(name)` gives each.

    Split by sizes: huggingface_hub's function for tensors wants all of them in memory.
    """
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    item_bytes = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    sizes = {name: math.prod(shape) * item_bytes for name, shape in shapes.items()}
    total = sum(sizes.values())
    need_room(out, total)
    shards = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    done = 0
    for file, names in shards.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor = make(name)
            if tuple(tensor.shape) != shapes[name]:
                raise AssertionError(f"{name} came out as {tuple(tensor.shape)}, planned {shapes[name]}")
            content[name] = tensor.to(getattr(torch, dtype)).contiguous()
            done += sizes[name]
            progress(done, total, text)
        save_file(content, out / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(out / "model.safetensors.index.json", index)


def write_shards(out: Path, parts: Iterable[Tensors], reader: str) -> None:
    """Write tensors as they come, a shard at a time, with their index; `reader`: whom they are for ("pt", "mlx")."""
    from safetensors.torch import save_file

    content, places, count = Tensors(), dict[str, str](), 0

    def save() -> None:
        shard = f"model-{count - 1:05}.safetensors"
        save_file(content, out / shard, metadata={"format": reader})
        places.update(dict.fromkeys(content, shard))
        content.clear()

    for count, part in enumerate(parts, 1):  # noqa: B007 (`save` reads it)
        content |= part
        if sum(tensor.nbytes for tensor in content.values()) > SHARD_BYTES:
            save()
    if content:
        save()
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def copy_side_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_card(out: Path, name: str | None, license_name: str | None, text: str) -> None:
    """A model card: converters take the model's name and license from it."""
    head = block({"license": license_name.lower() if license_name else None, "model_name": name})
    (out / "README.md").write_text(f"{head}\n{text}\n", encoding="utf-8")
