"""Folders spoiled by chance: one line that names the place, or the model that is in them; and nothing that waits.

`prepare` is what makes a base, and `headers.read` what plans read: they have one reader.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import GONE, Mutant, how_many, mutant
from tests.worker.base.bases import run
from tests.worker.base.hostile import BAD, nothing
from workbench.errors import UserError
from workbench.worker.base import headers

FOLDERS = 320
LIMIT_S = 10
"""Of processor time. No reader toils over a device or a billion layers; one that waited for a pipe would not end."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, make_tokenizer: Any) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("whole") / "m", hidden=32, intermediate=64, vocab_size=354)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return Path(make_tokenizer(folder))


@contextlib.contextmanager
def limit(what: str) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"{what}: still not read after {LIMIT_S} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def verdict(folder: Path, what: str) -> UserError | Path:
    """What the maker of bases says: why it does not take a folder, or where what it made of it lies. A plan's reader
    must take what that takes."""
    out = folder.with_name(f"{folder.name}-out")

    def plan() -> Any:
        return headers.read({"source": {"path": str(folder)}, "offline": True}, lambda *_: None)

    said: list[Any] = []
    for read in (plan, lambda: run({"path": str(folder)}, out)):
        try:
            with limit(what):
                said.append(read())
        except UserError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 700 and text.isprintable(), f"{what}: {text}"
            assert str(folder) in text or str(out) in text, f"{what}: {text}"
            said.append(error)
    planned, made = said
    if isinstance(made, UserError):
        return made
    assert not isinstance(planned, UserError), f"{what}: a plan refuses what is made: {planned}"
    return Path(made["path"])


def logits(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(3, 60)[None]).logits


def settings(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    ignored = ("_name_or_path", "architectures", "dtype", "torch_dtype", *IDS)
    return {key: value for key, value in AutoConfig.from_pretrained(folder).to_dict().items() if key not in ignored}


def as_stated(change: Mutant, found: dict[str, Any], usual: dict[str, Any]) -> bool:
    """Whether a configuration differs from the usual one at most by a number that a model can have, as it is stated."""
    differs = {key for key in found.keys() | usual.keys() if found.get(key) != usual.get(key)}
    if not differs or change.of_text:
        return True
    new = change.new
    plain = isinstance(new, int | float) and not isinstance(new, bool) and math.isfinite(new) and new > 0
    unread = change.path and str(change.path[0]) not in usual
    return bool(new is None or new == GONE or plain or unread or change.what == "added")


@pytest.mark.slow
def test_spoiled_folders_are_refused_in_one_line(whole: Path, tmp_path: Path, torch_quiet: None) -> None:
    """Two of three are spoiled in a way that no reader may take; of the others the configuration is changed by chance,
    or something lies beside the model."""
    usual, expected = settings(whole), logits(whole)
    config = json.loads((whole / "config.json").read_text())
    counts = {"refused": 0, "taken": 0, "changed configurations taken": 0}
    chance = random.Random(5)
    for number in range(how_many(FOLDERS)):
        folder = tmp_path / "m"
        shutil.copytree(whole, folder)
        kind, change = number % 6, None
        if kind < 4:
            way: Callable[..., None] = chance.choice(BAD)
            way(folder, chance)
            what = f"{number}: {way.__name__}"
        elif kind == 4:
            change = mutant(config, chance)
            (folder / "config.json").write_bytes(change.text)
            what = f"{number}: {change}"
        else:
            nothing(folder, chance)
            what = f"{number}: nothing"
        said = verdict(folder, what)
        counts["taken" if isinstance(said, Path) else "refused"] += 1
        assert kind == 4 or isinstance(said, Path) == (kind > 4), f"{what}: {said}"
        if isinstance(said, Path):
            got, found = logits(said), settings(said)
            assert bool(got.isfinite().all()), what
            if found == usual:
                assert bool((got - expected).abs().max() < 1e-4), what
            elif change:
                counts["changed configurations taken"] += 1
                assert as_stated(change, found, usual), what
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    print(counts)
    assert counts["taken"] and counts["refused"]


@pytest.fixture
def torch_quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
