"""What a recipe will need before any of it is made: bytes of weights, KV cache and workspace, and what fits.

Pure arithmetic on a shape, which a worker reads from `config.json` and headers (`worker/base/headers.py`); no
weights are fetched and nothing is loaded. Weights are exact: each method says what it stores (`sizes`). What an engine
needs beside them it says itself (`needs`): the KV cache is

    2 x layers x kv_heads x head_dim x tokens x bytes a value

and the workspace what the widest step of a forward keeps at once. What an engine's libraries and an interpreter take
beside that is measured, not derived. `benchmarks/plan_vs_measured.py` compares a plan with stored rows.

Rejected: a safety factor over everything. It would hide an error, and tell people to buy twice the memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from workbench.errors import UserError, WorkFailed, short
from workbench.home import home
from workbench.machine.work import ask
from workbench.plan.need import Need, Plan, need_of
from workbench.plan.tensors import shape_of
from workbench.plan.texts import check_texts
from workbench.recipe.choices import (
    BackendChoice,
    form_for,
    forms_of,
    making_of,
    method_of,
    placed,
    wants_gguf_base,
)
from workbench.recipe.load import Recipe
from workbench.records import BaseRequest, CarriedVariant, LayerKind, Variant, from_json, to_json
from workbench.shape import DTYPE_BYTES, Described, Sequences, Shape, Stored
from workbench.sizes import size_text
from workbench.worker.methods import BASE

MOST = 2**24
"""Tokens of a sequence, and sequences at once, that a plan is made for."""


def make(
    recipe: Recipe,
    *,
    memory_bytes: int | None = None,
    context: int | None = None,
    batch: int | None = None,
    cuda: bool | None = None,
    shape: Shape | None = None,
) -> Plan:
    """The plan of a recipe, for this machine unless told otherwise.

    `context`: tokens of a sequence, prompt and new ones; `batch`: sequences at once; by default every point of the
    workload is looked at. `shape`: the base's, where it was read before. Raises `UserError` for a context longer
    than the model's, or a GPU that is not here.
    """
    from workbench.engines import crowded, uses_gpu
    from workbench.machine.identity import machine

    here, notes = machine(), list[str]()
    if memory_bytes is not None and cuda is None and not here.gpus:
        notes.append("on the processor, since there is no GPU here; --device cuda plans for one")
    cuda = any(uses_gpu(choice.name) for choice in recipe.backends) if cuda is None else cuda
    own = memory_bytes is None
    if memory_bytes is None:
        if cuda and not here.gpus:
            raise UserError("--device cuda: there is no GPU here; say how much memory it has: --memory 24GiB")
        memory_bytes = min(gpu.memory_bytes for gpu in here.gpus) if cuda else here.memory_bytes
    anew = shape is None
    if shape is None:
        read = _read(recipe)
        shape = shape_of(read, f"{recipe.path}: base")
        if read["tensors"] is None and not (recipe.base.config or recipe.base.equivalent):
            notes.append("no weights are at hand: their sizes follow from the base's config.json")
    notes += filter(None, (crowded(choice.name, choice.options) for choice in recipe.backends))
    load = recipe.workload
    for value, name in ((context, "context"), (batch, "batch")):
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"--{name} {short(value)}: at least 1, and at most {MOST:,}")
    window = max((test.window for test in recipe.evaluations.values()), default=0)
    sizes = [(prompt_tokens + load.new_tokens, many, prompt_tokens) for prompt_tokens, many in load.points]
    first, many = load.points[0]
    if load.requests:
        sizes += [(first + load.longest_answer, many, first) for many in load.batches]
    if context is not None or batch is not None:
        tokens = load.longest if context is None else context
        sizes = [(tokens, many if batch is None else batch, min(max(load.prompt_tokens), tokens))]
    points = [Sequences(*size, window) for size in sizes]
    longest = max(point.tokens for point in points)
    notes += check_context(recipe, shape.context_tokens, context)
    notes += check_texts(recipe) if anew else []
    needs = []
    for choice in recipe.backends:
        for variant in recipe.variants:
            if choice.takes(variant.name):
                held = found_in(recipe, variant, shape)
                each = [need_of(shape, variant, choice, point, cuda, held, own) for point in points]
                place = max(range(len(points)), key=lambda i: each[i].need_bytes or 0)
                needs.append(_fitted(each[place], shape, variant, choice, points[place], cuda, memory_bytes, held))
    return Plan(
        recipe=recipe.name,
        model=recipe.model,
        parameters=shape.parameters,
        context_tokens=longest,
        batch=max(point.batch for point in points),
        points=tuple(points),
        device="cuda" if cuda else "cpu",
        memory_bytes=int(memory_bytes),
        disk_bytes=_all_disk(recipe, shape),
        free_disk_bytes=shutil.disk_usage(_existing(home())).free,
        needs=tuple(needs),
        notes=tuple(dict.fromkeys(notes)),
    )


def cannot_be_made(recipe: Recipe, variants: Sequence[Variant]) -> dict[str, str]:
    """Those of the variants that cannot be made of this base, and why: before hours of work, not after them."""
    if not variants:
        return {}
    shape, found = shape_of(_read(recipe), f"{recipe.path}: base"), {}
    for variant in variants:
        method, options = method_of(variant)
        if reason := method.sizes(shape, options, forms_of(variant)[0]).refused:
            found[variant.name] = reason
    return found


def advice(recipe: Recipe, choice: BackendChoice, name: str) -> str:
    """For a job that ran out of memory: what the plan says it needs, and the batch that would fit; empty if nothing."""
    try:
        shape = shape_of(_read(recipe), f"{recipe.path}: base")
        made = make(recipe, shape=shape)
        need = next(n for n in made.needs if (n.variant, n.backend, n.options) == (name, choice.name, choice.options))
        if need.need_bytes is None:
            return ""
        needs, has = size_text(need.need_bytes), size_text(made.memory_bytes)
        said = f"; by the plan a batch of {made.batch} needs {needs} of {has} here"
        if need.fits:
            return said
        low, high = 0, made.batch
        while low < high:
            middle = (low + high + 1) // 2
            tried = make(recipe, batch=middle, shape=shape).needs[made.needs.index(need)]
            low, high = (middle, high) if tried.fits else (low, middle - 1)
    except (UserError, WorkFailed, StopIteration):
        return ""
    what = f"a batch of {low}" if low else "no batch, but fewer tokens or a smaller variant"
    return f"{said}, and {what} would fit"


def layers(recipe: Recipe) -> list[LayerKind]:
    """The kinds of decoder layers of a recipe's base, as the calibration pass will see them.

    Raises `UserError` where that pass cannot take the base.
    """
    config = dict(_read(recipe)["config"])
    found: list[LayerKind] = from_json(
        list[LayerKind], ask("workbench.worker.calibration.discover:read", config, limit_s=600)
    )
    return found


def check_context(recipe: Recipe, context_tokens: int, asked: int | None = None) -> list[str]:
    """Refuse what is longer than the model takes: the workload's sequences, and windows to score or to calibrate on.

    `context_tokens`: the model's, 0 where its configuration does not say, which is what is answered then: an engine's
    guess (2,048 in some) would refuse what fits. `asked`: tokens of a sequence where the command line says, instead of
    the workload's.
    """
    parts = [(f"evaluation '{name}'", test.window) for name, test in recipe.evaluations.items()]
    parts += [("calibration", recipe.calibration.window)] if recipe.calibration else []
    longest = [("--context" if asked else "workload", "sequences", asked or recipe.workload.longest)]
    lengths = longest + [(where, "windows", window) for where, window in parts]
    if not context_tokens:
        told = ", ".join(f"{where}: {tokens:,}" for where, _, tokens in lengths)
        return [f"unchecked, since the base's configuration does not say how long its context is, in tokens: {told}"]
    for where, what, tokens in lengths:
        if tokens > context_tokens:
            remedy = "use a shorter `window`" if what == "windows" else "use fewer `prompt_tokens` or `new_tokens`"
            raise UserError(
                f"{recipe.path}: {where}: {what} of {tokens:,} tokens are longer than the model's context of "
                f"{context_tokens:,}: {remedy}"
            )
    return []


def found_in(recipe: Recipe, variant: Variant, shape: Shape) -> dict[str, Stored] | None:
    """By format, what headers say of a variant that others made; None for one that is made here."""
    source = Variant(variant.name, variant.method, variant.options)
    if not making_of(source).headers:
        return None
    options = json.dumps(placed(source, recipe.path.parent).options)
    held = _headers(variant.method, options, shape, recipe.base.trust_remote_code)
    return {variant.form: held[variant.form]} if isinstance(variant, CarriedVariant) else held


@lru_cache(maxsize=1000)
def _headers(method: str, options: str, shape: Shape, allow_remote_code: bool) -> dict[str, Stored]:
    """Read once, whatever is planned with it. `options`: as JSON."""
    worker = making_of(Variant("", method, json.loads(options))).headers
    asked = {"options": json.loads(options), "shape": to_json(shape), "allow_remote_code": allow_remote_code}
    found: dict[str, Stored] = from_json(dict[str, Stored], ask(worker, asked, limit_s=600))
    return found


def _read(recipe: Recipe) -> Described:
    """Ask a worker for the shape."""
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    payload = to_json(BaseRequest(recipe.base.source(recipe.path.parent), equivalent))
    return cast(Described, ask("workbench.worker.base.headers:read", payload, limit_s=600))


def _fitted(
    need: Need,
    shape: Shape,
    variant: Variant,
    choice: BackendChoice,
    point: Sequences,
    cuda: bool,
    memory_bytes: float,
    found: dict[str, Stored] | None = None,
) -> Need:
    """Whether it fits, and if not, the longest context that would."""
    if need.need_bytes is None:
        return need
    memory_bytes *= need.devices if cuda else 1
    if need.need_bytes <= memory_bytes:
        return replace(need, fits=True)
    low, high = 0, point.tokens
    while low < high:
        middle = (low + high + 1) // 2
        shorter = point._replace(tokens=middle, prompt_tokens=min(point.prompt_tokens, middle))
        tried = need_of(shape, variant, choice, shorter, cuda, found)
        if tried.need_bytes is not None and tried.need_bytes <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return replace(need, fits=False, fits_context_tokens=low or None)


def _all_disk(recipe: Recipe, shape: Shape) -> int:
    """Everything a recipe writes: the base where it is rewritten, one conversion, Gram matrices and hidden states that
    are kept, each variant in each form."""
    base_bytes = shape.parameters * DTYPE_BYTES[shape.dtype]
    total = 0 if recipe.base.hub is None and recipe.base.path else base_bytes
    files: dict[tuple[str, str], int] = {}
    for variant in recipe.variants:
        method, options = method_of(variant)
        name = variant.source if isinstance(variant, CarriedVariant) else variant.name
        if held := found_in(recipe, variant, shape):
            forms = {form_for(variant, choice.name) for choice in recipe.backends if choice.takes(variant.name)}
            if name == variant.name:
                # Its own file is downloaded, or used where it lies; further forms of it are made.
                own = next(iter(held))
                forms = forms - {own} | ({own} if variant.options.get("hub") else set())
            files |= {(name, form): held[form].disk_bytes for form in forms & {*held}}
        elif variant.method != BASE and method.making(options, cuda=False).stage != "load":
            forms = {form_for(variant, choice.name) for choice in recipe.backends if choice.takes(variant.name)}
            for form in {forms_of(variant)[0], *forms}:
                files[name, form] = method.sizes(shape, options, form).disk_bytes
        elif variant.method == BASE and wants_gguf_base(recipe.variants, recipe.backends):
            total += base_bytes
            total += method.sizes(shape, options, "gguf").disk_bytes if shape.dtype == "float32" else 0
    grams = _grams_bytes(shape) if any(making_of(variant).grams for variant in recipe.variants) else 0
    return total + grams + _states_bytes(recipe, shape) + sum(files.values())


SHARING = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Tensors of a GGUF file's layer that have the input of another."""


def _grams_bytes(shape: Shape) -> int:
    """Half of a symmetric matrix in float32 for each distinct input of a layer's matrices (`worker/ggml/grams.py`)."""
    inputs = {}
    for tensor in shape.tensors:
        if tensor.layer is not None and len(tensor.shape) == 2:
            name = tensor.name.split(".")[2]
            inputs[tensor.layer, SHARING.get(name, name)] = tensor.shape[-1]
    return sum(columns * (columns + 1) // 2 * 4 for columns in inputs.values())


def _states_bytes(recipe: Recipe, shape: Shape) -> int:
    """The hidden states of all calibration tokens, float32, that a pass backward keeps meanwhile: of every layer, and
    three more (`worker/calibration/gradients.py`)."""
    if recipe.calibration is None or not any(making_of(variant).gradients for variant in recipe.variants):
        return 0
    tokens = recipe.calibration.windows * recipe.calibration.window
    return 4 * tokens * shape.hidden * (shape.traits.layers + 3)


def _existing(folder: Any) -> Any:
    while not folder.exists():
        folder = folder.parent
    return folder
