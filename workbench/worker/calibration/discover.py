"""Which linear layers of a decoder layer share an input, and what produces it: found by running the layer.

A layer gets random weights and a few random tokens. Linear layers that are given the same tensor are a group. What
could have produced that tensor channel by channel is then tried: every norm and every linear layer that ran before,
in each way in which its entries or rows can stand for the channels. A candidate is divided by random factors, the
group's columns are multiplied by them, and the layer is run again; where its output is the same to rounding, the
candidate is proven. The factors are powers of two, which products carry exactly, so that what rounds differently is
hardly the fold. A group without a producer (a norm after the linear layers, a norm of each head) is no error: it is
quantized without scales.

Rejected: a table of architectures, which refuses what appeared after it was written; tracing the graph, which needs a
rule for every operation. Running knows no operation and is wrong about none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from workbench.errors import UserError
from workbench.records import LayerKind, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.calibration.experts import groups_in, stored_in
from workbench.worker.calibration.skeleton import Call, Skeleton, output_of
from workbench.worker.layers import WAY_OUT, Group, Producer, Structure, fold, scale_columns

TOKENS = 24
VOCABULARY = 64
SAME = 1e-5
"""Relative difference of two outputs of a layer up to which they are one: the float32 roundings of one layer."""
FELT = 1e-3
"""Relative difference that scaling a group's columns alone must make, or the layer says nothing of its producer."""

Run = Callable[..., Any]
"""A layer's output for one input, with its own weights or with these tensors in their place."""


def read(payload: object, progress: Progress) -> object:
    """Worker: of a `config.json`'s content, the kinds of its decoder layers, as `list[LayerKind]`."""
    config: dict[str, Any] = from_json(dict[str, Any], payload)
    progress(0, 1, "running a layer of each kind")
    return to_json(told(structures_of(config)))


def structures_of(config: Mapping[str, Any]) -> tuple[Structure, ...]:
    """The structure of each decoder layer of a `config.json`'s model; equal layers share one.

    Raises `UserError` for what transformers does not build, and where a layer or its experts cannot be taken.
    """
    import torch

    kind = config.get("model_type")
    if isinstance(config.get("text_config"), dict):
        raise UserError(
            f"model_type '{kind}' is a text model with other senses, and only text models are calibrated. Save its "
            f"text part ({config['text_config'].get('model_type', 'its language model')}) by itself with transformers "
            f"and give that as the base. Or: {WAY_OUT[0].lower()}{WAY_OUT[1:]}."
        )
    try:
        with torch.inference_mode():
            return tuple(_structures(Skeleton(config, VOCABULARY)))
    except UserError:
        raise
    except Exception as error:  # whatever a layer that needs more than its input led to
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model_type '{kind}': its decoder layers do not run one at a time, as the calibration pass has it "
            f"({type(error).__name__}: {reason}). {WAY_OUT}."
        ) from None


def _structures(skeleton: Skeleton) -> Iterator[Structure]:
    """That of each layer, one after another; a layer's weights are there only while it is looked at."""
    import torch

    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 1, TOKENS), generator=chance)
    calls = skeleton.calls(ids[0], torch.device("cpu"))
    check_calls(skeleton.config.model_type, calls, skeleton.calls(ids[1], torch.device("cpu")))
    found: dict[object, Structure] = {}
    for layer, call in zip(skeleton.layers, calls, strict=True):
        look = signature(layer)
        if look not in found:
            x = torch.randn(1, TOKENS, skeleton.hidden, generator=chance)
            tensors = _random_weights(layer, chance)
            layer.load_state_dict(tensors, assign=True)
            layer.eval()
            run = partial(output_of, layer, x, call)
            structure = _with_producers(groups_of(layer, run), layer, tensors, run)
            groups = (*structure.groups, *groups_in(layer))
            grouped = {name for group in groups for name in group.linears}
            kept = tuple(name for name, module in layer.named_modules() if _is_linear(module) and name not in grouped)
            found[look] = replace(structure, groups=groups, kept=kept, stored=stored_in(layer))
            layer.to("meta")
        yield found[look]


def check_calls(kind: str, calls: Sequence[Call], others: Sequence[Call]) -> None:
    """Refuse layers that are given more than the hidden states: something of the tokens, or of another layer."""
    import torch

    def plain(value: Any, other: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return torch.equal(value, other)
        if isinstance(value, tuple):
            return all(map(plain, value, other))
        return value is None or isinstance(value, bool | int | float | str | torch.dtype)

    for index, (one, two) in enumerate(zip(calls, others, strict=True)):
        named = {str(place): pair for place, pair in enumerate(zip(one.positional, two.positional, strict=True))}
        named |= {name: (value, two.named[name]) for name, value in one.named.items()}
        for name, pair in named.items():
            if not plain(*pair):
                raise UserError(
                    f"model_type '{kind}': layer {index} is given more than hidden states (`{name}`), and the "
                    f"calibration pass runs a layer on those alone. {WAY_OUT}."
                )


def signature(layer: Any) -> object:
    """What two layers have in common that are of one kind: modules, their plain settings, shapes of their tensors."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(tensor.shape)) for key, tensor in module.named_parameters(recurse=False)),
            tuple(
                sorted(
                    (key, value)
                    for key, value in vars(module).items()
                    if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "training")
                )
            ),
        )
        for name, module in layer.named_modules()
    )


# --- groups -------------------------------------------------------------------------------------


def groups_of(layer: Any, run: Callable[[], Any]) -> list[tuple[str, ...]]:
    """Linear layers by the tensor that they are given, in the order in which they run; `run` runs the layer once."""
    given: dict[tuple[int, int, int], list[str]] = {}
    kept = []
    often: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            often[name] = often.get(name, 0) + 1
            x = inputs[0]
            if x.shape[:-1].numel() == TOKENS:
                kept.append(x)  # As long as it lives, no other tensor has its place.
                given.setdefault((x.data_ptr(), x.numel(), x.shape[-1]), []).append(name)

        return before

    of_experts = {name for group in groups_in(layer) for name in group.linears}
    linears = {
        name: module
        for name, module in layer.named_modules()
        # One channel is no matrix but a gate.
        if _is_linear(module) and module.out_features > 1 and name not in of_experts
    }
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        run()
    finally:
        for each in hooks:
            each.remove()
    # What runs twice, or not over the tokens, has no Gram matrix of its own and stays as it is.
    groups = [[name for name in linears if name in names and often[name] == 1] for names in given.values()]
    return [tuple(group) for group in groups if group]


# --- producers ----------------------------------------------------------------------------------


def _with_producers(groups: Sequence[tuple[str, ...]], layer: Any, tensors: Tensors, run: Run) -> Structure:
    """The groups, each with the first candidate that proves to produce its input."""
    before = run(tensors)
    found = []
    for number, linears in enumerate(groups):
        bare = Group(linears, None)
        earlier = [name for group in groups[:number] for name in group]
        candidates = (replace(bare, producer=each) for each in _candidates(bare, earlier, layer, tensors))
        felt = _difference(before, run(_changed(tensors, bare, scale_columns))) > FELT
        found.append(next((group for group in candidates if felt and holds(group, tensors, run, before)), bare))
    pairs = ((a, b) for group in groups for a in group for b in group if a != b)
    return Structure(
        tuple(found), scores=next((pair for pair in pairs if _only_product(pair, tensors, run, before)), None)
    )


def proven(structure: Structure, tensors: Tensors, run: Run) -> Structure:
    """The structure without the producers that do not hold on these weights."""
    before = run(tensors)
    return replace(
        structure,
        groups=tuple(
            # What experts compute is written here (`experts.py`), and not all of them are sent tokens.
            group
            if group.producer is None or group.routed or holds(group, tensors, run, before)
            else replace(group, producer=None)
            for group in structure.groups
        ),
    )


def holds(group: Group, tensors: Tensors, run: Run, before: Any) -> bool:
    """Whether the layer's output stays what it was `before` when the group's columns are scaled and the producer is
    divided."""
    return _difference(before, run(_changed(tensors, group, fold))) < SAME


def _changed(tensors: Tensors, group: Group, change: Callable[[Tensors, Group, Any], None]) -> Tensors:
    """A copy of the tensors, changed by factors of a half or two."""
    import torch

    weight = tensors[f"{group.linears[0]}.weight"]
    chance = torch.Generator().manual_seed(weight.shape[1])
    factors = torch.randint(2, (weight.shape[1],), generator=chance).mul(2).sub(1).float().exp2().to(weight.device)
    if group.producer is not None and group.producer.repeats > 1:
        heads = factors.view(-1, group.producer.repeats, group.producer.head_dim)
        factors = heads[:, :1].expand_as(heads).reshape(-1)
    copy = dict(tensors)
    change(copy, group, factors)
    return copy


def _candidates(group: Group, earlier: Sequence[str], layer: Any, tensors: Tensors) -> Iterator[Producer]:
    """What could produce a group's input: norms, then the linear layers that ran before it, the nearest first."""
    inputs = tensors[f"{group.linears[0]}.weight"].shape[1]
    norms = [name for name, module in layer.named_modules() if _is_norm(module)]
    for name in norms:
        size = len(tensors[f"{name}.weight"])
        for one_plus in (False, True):
            if inputs % size == 0:
                yield Producer(name, "norm", one_plus, repeats=inputs // size, head_dim=size)
    heads = [size for size in _head_sizes(layer) if inputs % size == 0]
    for name in reversed(earlier):
        rows = tensors[f"{name}.weight"].shape[0]
        if rows == inputs:
            yield Producer(name, "linear")
        if rows > inputs:
            yield Producer(name, "linear", rows=(rows - inputs, rows))
            yield Producer(name, "linear", rows=(0, inputs))
        for head_dim in heads:
            yield from _heads(name, rows, inputs // head_dim, head_dim)


def _heads(name: str, rows: int, heads: int, head_dim: int) -> Iterator[Producer]:
    """A linear layer whose rows hold heads of values, each repeated for several heads of the input.

    The values are all of its rows, the last of them, or the last of each run of rows that belongs to a head.
    """
    for repeats in (each for each in range(1, heads + 1) if heads % each == 0):
        groups = heads // repeats
        values = groups * head_dim
        if rows == values and repeats > 1:
            yield Producer(name, "linear", repeats=repeats, head_dim=head_dim)
        if rows == values * 2 + heads * head_dim and repeats > 1:
            yield Producer(name, "linear", rows=(rows - values, rows), repeats=repeats, head_dim=head_dim)
        if rows > values and groups > 1 and rows % groups == 0:
            run = rows // groups
            yield Producer(name, "linear", False, (run - head_dim, run), groups, repeats, head_dim)


def _is_linear(module: Any) -> bool:
    import torch

    return type(module) is torch.nn.Linear


def _is_norm(module: Any) -> bool:
    """Whether all that a module has is a vector of weights, and perhaps of biases."""
    names = {name: tensor.dim() for name, tensor in module.named_parameters()}
    return names in ({"weight": 1}, {"weight": 1, "bias": 1})


def _head_sizes(layer: Any) -> list[int]:
    """Sizes of a head that the layer's modules name."""
    named = {
        value
        for module in layer.modules()
        for key, value in vars(module).items()
        if "head" in key and "dim" in key and isinstance(value, int) and value > 0
    }
    return sorted(named)


def _only_product(pair: tuple[str, str], tensors: Tensors, run: Run, before: Any) -> bool:
    """Whether a factor on all that one linear layer puts out is undone by its inverse on another."""
    copy, alone = dict(tensors), dict(tensors)
    for name, factor in zip(pair, (2.0, 0.5), strict=True):
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in tensors:
                copy[key] = tensors[key] * factor
    alone |= {key: tensor for key, tensor in copy.items() if key.startswith(f"{pair[0]}.")}
    return _difference(before, run(copy)) < SAME and _difference(before, run(alone)) > FELT


def _difference(before: Any, after: Any) -> float:
    return float((after - before).norm() / before.norm())


def _random_weights(layer: Any, chance: Any) -> Tensors:
    """Weights that let every part of a layer matter: matrices that keep their input's size, vectors away from zero.
    All experts of a layer share theirs, which do not fit beside each other in every memory."""
    import torch

    drawn = {
        name: torch.randn(tensor.shape, generator=chance) / max(1, tensor[0].numel()) ** 0.5
        if tensor.dim() > 1
        else torch.rand(tensor.shape, generator=chance) + 0.5
        for name, tensor in layer.state_dict().items()
        if not (shared := re.search(r"\.experts\.\d+\.", name)) or shared[0] == ".experts.0."
    }
    return {name: drawn[re.sub(r"\.experts\.\d+\.", ".experts.0.", name)] for name in layer.state_dict()}


# --- told ---------------------------------------------------------------------------------------


def told(structures: Sequence[Structure]) -> list[LayerKind]:
    """Structures in words, those of equal layers together."""
    return [
        LayerKind(
            _ranges([index for index, other in enumerate(structures) if other == each]),
            [words(group) for group in each.groups if not group.routed]
            + [_experts(name, groups) for name, groups in each.experts.items()],
        )
        for each in dict.fromkeys(structures)
    ]


def words(group: Group) -> str:
    """A group and its producer: `self_attn.o_proj <- self_attn.v_proj, each row for 3 channels`."""
    producer = group.producer
    if producer is None:
        return f"{', '.join(group.linears)} <- nothing that can be scaled"
    more = [" (1 + weight)" if producer.one_plus else ""]
    more += [f" rows {producer.rows[0]} to {producer.rows[1] - 1}" if producer.rows else ""]
    more += [f" of each of {producer.blocks} runs" if producer.blocks > 1 else ""]
    more += [f", each for {producer.repeats} heads" if producer.repeats > 1 else ""]
    return f"{', '.join(group.linears)} <- {producer.module}{''.join(more)}"


def _experts(name: str, groups: Sequence[Group]) -> str:
    """The groups of a layer's experts: `mlp.experts.0 to 63: gate_proj, up_proj <- ...; down_proj <- up_proj`."""
    first = [words(group).replace(f"{name}.0.", "") for group in groups[:2]]
    return f"{name}.0 to {len(groups) // 2 - 1}, each: {'; '.join(first)}"


def _ranges(numbers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)
