"""Experts one by one: transformers has all of a layer's in two three-dimensional parameters, and so have some files.

A layer's experts are replaced by a module of plain linear layers, which computes the same, so that everything else sees
linear layers and the tokens that reach them. Their names come from transformers' own mapping of checkpoints, where that
keeps experts apart, and are else the plainest, which is what engines look for. How the parameters lie (rows or columns,
gate and up in halves or in turn) and what is computed of them is tried on one expert before a layer is taken.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.layers import WAY_OUT, Group, Producer, Stored

TRIED = 8
"""Tokens of the trial, the last of them so large that clamps are felt."""
LARGEST = 10.0
NEAR = 1e-5
"""Relative difference of the trial's outputs that is rounding."""
LEAST = 1e-6
"""Probability that the router gives an expert for a token, at least."""
PAIR, DOWN = "gate_up_proj", "down_proj"
"""What transformers calls its two parameters."""


@dataclass(frozen=True)
class Spelling:
    """A checkpoint's names: of an expert's three linear layers, and of the module that has experts in it."""

    gate: str
    up: str
    down: str
    block: tuple[str, str] | None = None
    """As checkpoints call it, and as transformers does; None if alike."""
    together: bool = False
    """Files hold all experts in one tensor, as transformers does; one by one they are ours to name."""


@dataclass(frozen=True)
class Layout:
    """How the parameters of a module of experts lie, and what it computes of them."""

    transposed: bool = False
    """An expert's matrix is [in, out]."""
    interleaved: bool = False
    """Rows of gate and up in turn, not in two halves."""
    own_gate: bool = False
    """What goes into the way out is its class's own function of both, not `act(gate) * up`."""
    stacked: bool = False
    """It is given all tokens for each expert, one after another, and zeros for those that an expert is not sent."""
    undone: bool = True
    """A factor on what up puts out is undone by its inverse on what the way out is given."""


def take_apart(model_type: str, layers: Sequence[Any]) -> None:
    """Put single experts in the place of those of all layers, which are on the meta device.

    Raises `UserError` for experts that checkpoints keep otherwise, or that compute something else.
    """
    places = [(layer, name) for layer in layers for name, module in layer.named_modules() if _has_experts(module)]
    if not places:
        return
    spelling = _spelling(model_type)
    layouts = dict[type, Layout]()
    for layer, name in places:
        fused = layer.get_submodule(name)
        if type(fused) not in layouts:
            layouts[type(fused)] = _layout(model_type, fused, spelling)
        layout = layouts[type(fused)]
        alone = single(fused, spelling, layout)
        if spelling.together:
            alone.stored = _stored(model_type, name, fused, spelling, layout) + _renamed(model_type, name, layer)
        layer.set_submodule(name, alone)
        if spelling.block:
            theirs, ours = spelling.block
            block = layer._modules.pop(ours)
            layer.add_module(theirs, block)
            # What the layer calls it, but not one of its modules a second time.
            object.__setattr__(layer, ours, block)


def groups_in(layer: Any) -> list[Group]:
    """The groups of a layer's experts: gate and up share the routed tokens, and up produces what down is given."""
    found = []
    for name, module in _all_in(layer):
        words = module.spelling
        for number in range(module.count):
            gate, up, down = (f"{name}.{number}.{word}" for word in (words.gate, words.up, words.down))
            found.append(Group((gate, up), None, routed=name))
            found.append(Group((down,), Producer(up, "linear") if module.layout.undone else None, routed=name))
    return found


def router_of(layer: Any, name: str) -> Any:
    """The module beside a layer's experts that is called with tokens and has a row of weights an expert; None where
    experts are given something else than it is, or there is no such module."""
    experts, beside = layer.get_submodule(name), layer.get_submodule(name.rpartition(".")[0])
    if experts.layout.stacked:
        return None
    shape = (experts.count, experts.get_submodule(f"0.{experts.spelling.up}").in_features)
    own = set(experts.modules())
    for module in beside.modules():
        weight = module._parameters.get("weight")
        if weight is not None and tuple(weight.shape) == shape and module not in own:
            return module
    return None


def probabilities(router: Any, x: Any) -> Any:
    """How likely each expert is for tokens [..., hidden] by a router's rows: float32 [tokens, experts]. None is quite
    nothing, so that they can be divided by their sum."""
    import torch

    weight, bias = router.weight.float(), router._parameters.get("bias")
    logits = torch.nn.functional.linear(
        x.reshape(-1, x.shape[-1]).float(), weight, None if bias is None else bias.float()
    )
    return logits.softmax(-1).clamp(min=LEAST)


def stored_in(layer: Any) -> tuple[Stored, ...]:
    """What files hold of a layer otherwise than it is here."""
    return tuple(each for _, module in _all_in(layer) for each in module.stored)


def _all_in(layer: Any) -> list[tuple[str, Any]]:
    """The modules of single experts of a layer, by name."""
    modules = layer.named_modules()
    return [(name, module) for name, module in modules if isinstance(getattr(module, "spelling", None), Spelling)]


def single(fused: Any, spelling: Spelling, layout: Layout) -> Any:
    """A module of linear layers, on the meta device, for the experts of a fused one."""
    import torch

    count, *sides = getattr(fused, DOWN).shape
    inner, hidden = sides if layout.transposed else reversed(sides)
    biased = f"{DOWN}_bias" in fused._parameters

    class Experts(torch.nn.Module):
        """Called as transformers calls its own: hidden states [tokens, hidden], experts and weights [tokens, top]."""

        def __init__(self) -> None:
            super().__init__()
            self.spelling, self.layout, self.count = spelling, layout, count
            self.stored: tuple[Stored, ...] = ()
            self.activation = getattr(fused, "act_fn", None)
            self.gated = fused._apply_gate if layout.own_gate else None
            with torch.device("meta"):
                for number in range(count):
                    expert = torch.nn.Module()
                    expert.add_module(spelling.gate, torch.nn.Linear(hidden, inner, bias=biased))
                    expert.add_module(spelling.up, torch.nn.Linear(hidden, inner, bias=biased))
                    expert.add_module(spelling.down, torch.nn.Linear(inner, hidden, bias=biased))
                    self.add_module(str(number), expert)

        def forward(self, hidden_states: Any, top_k_index: Any = None, top_k_weights: Any = None) -> Any:
            out = torch.zeros_like(hidden_states)
            if layout.stacked:
                for number, (x, y) in enumerate(zip(hidden_states.chunk(count), out.chunk(count), strict=True)):
                    sent = x.any(-1)
                    if sent.any():
                        y[sent] = self.expert(number, x[sent]).to(out.dtype)
                return out
            for number in top_k_index.unique().tolist():
                if number < count:
                    token, place = torch.where(top_k_index == number)
                    made = self.expert(number, hidden_states[token]) * top_k_weights[token, place, None]
                    out.index_add_(0, token, made.to(out.dtype))
            return out

        def expert(self, number: int, x: Any) -> Any:
            """What one expert makes of tokens [n, hidden]."""
            gate, up, down = (
                self.get_submodule(f"{number}.{word}") for word in (spelling.gate, spelling.up, spelling.down)
            )
            if self.gated:
                pair = (
                    torch.stack((gate(x), up(x)), -1).flatten(-2)
                    if layout.interleaved
                    else torch.cat((gate(x), up(x)), -1)
                )
                return down(self.gated(pair))
            assert self.activation is not None
            return down(self.activation(gate(x)) * up(x))

        def everything(self, hidden_states: Any) -> Any:
            """All tokens that reach any expert, [n, hidden]."""
            return hidden_states[hidden_states.any(-1)] if layout.stacked else hidden_states

    return Experts()


def _has_experts(module: Any) -> bool:
    """Whether a module holds matrices of several experts as one parameter; a convolution's is none."""
    import torch

    named = [] if isinstance(module, torch.nn.Conv1d) else module.named_parameters(recurse=False)
    return any(each.dim() == 3 and (name == "weight" or "proj" in name) for name, each in named)


def _mapping(model_type: str) -> Sequence[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return get_checkpoint_conversion_mapping(model_type) or []


def _spelling(model_type: str) -> Spelling:
    """How checkpoints of a model type name their experts, by transformers' mapping of names."""
    block, words = None, list[str]()
    for entry in _mapping(model_type):
        sources, (target, *_) = entry.source_patterns, entry.target_patterns
        if all(".experts.*." in source for source in sources) and target.endswith((PAIR, DOWN)):
            words += [source.split(".")[-2] for source in sources]
        elif sources[0].strip(".").isidentifier() and target.strip(".").isidentifier():
            block = sources[0].strip("."), target.strip(".")
    if not words:
        return Spelling("gate_proj", "up_proj", "down_proj", together=True)
    if len(words) != 3:
        raise _refusal(model_type)
    gate, up, down = words
    return Spelling(gate, up, down, block)


def _stored(model_type: str, name: str, fused: Any, spelling: Spelling, layout: Layout) -> tuple[Stored, ...]:
    """What each parameter of a fused module holds; `name`: of the module, in its layer."""
    found = []
    for parameter, words in ((PAIR, (spelling.gate, spelling.up)), (DOWN, (spelling.down,))):
        for leaf, own in (("weight", parameter), ("bias", f"{parameter}_bias")):
            if own in fused._parameters:
                parts = tuple(f"{name}.{{}}.{word}.{leaf}" for word in words)
                turned = layout.transposed and leaf == "weight"
                in_turn = layout.interleaved and len(words) > 1
                found.append(Stored(_names(model_type, f"{name}.{own}"), parts, turned, in_turn))
    return tuple(found)


def _renamed(model_type: str, name: str, layer: Any) -> tuple[Stored, ...]:
    """The other parameters of a layer that files may have by other names."""
    others = [other for other, _ in layer.named_parameters() if not other.startswith(f"{name}.")]
    return tuple(Stored(names, (other,)) for other in others if len(names := _names(model_type, other)) > 1)


def _names(model_type: str, name: str) -> tuple[str, ...]:
    """A parameter's names in files: those that transformers maps to it, and its own."""
    found = []
    for entry in _mapping(model_type):
        source, target = entry.source_patterns[0].replace("\\", ""), entry.target_patterns[0].replace("\\", "")
        if len(entry.source_patterns) == 1 and re.fullmatch(r"[\w.]+", source) and name.endswith(target):
            found.append(name.removesuffix(target) + source)
    return (*found, name)


def _refusal(model_type: str) -> UserError:
    return UserError(
        f"model_type '{model_type}': its experts are no gated pair of linear layers, and the calibration pass takes no "
        f"others yet. {WAY_OUT}."
    )


def _layout(model_type: str, fused: Any, spelling: Spelling) -> Layout:
    """How a module's parameters lie, by running one expert with random weights; `UserError` for experts that compute
    something else than a gated pair of linear layers."""
    import torch

    own = {name: parameter.dim() for name, parameter in fused.named_parameters()}
    plain = {PAIR: 3, DOWN: 3}
    if own not in (plain, plain | {f"{PAIR}_bias": 2, f"{DOWN}_bias": 2}):
        raise _refusal(model_type)
    chance = torch.Generator().manual_seed(0)
    before = {name: getattr(fused, name) for name in own}
    drawn = {
        name: torch.randn(1, *each.shape[1:], generator=chance) / (each.shape[2] if each.dim() > 2 else 1) ** 0.5
        for name, each in before.items()
    }
    stacked = len(inspect.signature(fused.forward).parameters) == 1
    given: list[Any] = [torch.zeros(TRIED, 1, dtype=torch.int64), torch.rand(TRIED, 1, generator=chance)]
    for name, tensor in drawn.items():
        setattr(fused, name, torch.nn.Parameter(tensor, requires_grad=False))
    try:
        for transposed, interleaved, own_gate in itertools.product((False, True), repeat=3):
            layout = Layout(transposed, interleaved, own_gate, stacked)
            found = _tried(model_type, fused, spelling, layout, drawn, [] if stacked else given)
            if found:
                return found
    finally:
        for name, parameter in before.items():
            setattr(fused, name, parameter)
    raise _refusal(model_type)


def _tried(
    model_type: str, fused: Any, spelling: Spelling, layout: Layout, drawn: Tensors, given: list[Any]
) -> Layout | None:
    """The layout, if one expert alone computes with it what the module does; `given`: beside the tokens."""
    import torch

    state = {
        part.format(0).removeprefix("x."): each.part(drawn[each.names[-1].removeprefix("x.")][0], place)
        for each in _stored(model_type, "x", fused, spelling, layout)
        for place, part in enumerate(each.parts)
    }
    try:
        alone = single(fused, spelling, layout)
        alone.load_state_dict(state, assign=True)
        chance = torch.Generator().manual_seed(1)
        x = torch.randn(TRIED, alone.get_submodule(f"0.{spelling.up}").in_features, generator=chance)
        x *= torch.logspace(0, 1, TRIED, LARGEST)[:, None]
        one = fused(x, *given)
        if not _same(one, alone(x, *given)):
            return None
        up, down = f"0.{spelling.up}.", f"0.{spelling.down}."
        inner = state[f"{down}weight"].shape[1]
        order, factors = torch.randperm(inner, generator=chance), torch.randint(2, (inner,), generator=chance)
        # Halves that are none compute the same too, but not with their channels in another order.
        for name, tensor in state.items():
            if not name.startswith(down):
                state[name] = tensor[order]
        state[f"{down}weight"] = state[f"{down}weight"][:, order]
        alone.load_state_dict(state, assign=True)
        if not _same(one, alone(x, *given)):
            return None
        factors = factors.mul(2).sub(1).float().exp2()
        for name, tensor in state.items():
            if name.startswith(up):
                state[name] = (tensor.t() * factors).t()
        state[f"{down}weight"] = state[f"{down}weight"] / factors
        alone.load_state_dict(state, assign=True)
        return replace(layout, undone=_same(one, alone(x, *given)))
    except Exception:  # whatever another layout led to
        return None


def _same(one: Any, other: Any) -> bool:
    """Whether outputs [tokens, hidden] differ by rounding, token for token."""
    return bool(((one - other).norm(dim=-1) <= NEAR * one.norm(dim=-1)).all())
