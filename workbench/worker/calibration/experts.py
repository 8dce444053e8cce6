"""Experts one by one, as checkpoints keep them: transformers has all of a layer's in two three-dimensional parameters.

A layer's experts are replaced by a module of plain linear layers under the checkpoint's own names, which computes the
same, so that everything else sees linear layers and the tokens that reach them. The names come from transformers' own
mapping of checkpoints; that the function is the same is tried on one expert before a layer is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import UserError
from workbench.worker.layers import WAY_OUT, Group, Producer

TRIED = 8
"""Tokens of the trial."""
NEAR = 1e-5
"""Relative difference of the trial's outputs that is rounding."""


@dataclass(frozen=True)
class Spelling:
    """A checkpoint's names: of an expert's three linear layers, and of the module that has experts in it."""

    gate: str
    up: str
    down: str
    block: tuple[str, str] | None = None
    """As checkpoints call it, and as transformers does; None if alike."""


def take_apart(model_type: str, layers: Sequence[Any]) -> None:
    """Put single experts in the place of those of all layers, which are on the meta device.

    Raises `UserError` for experts that checkpoints keep otherwise, or that compute something else.
    """
    places = [(layer, name) for layer in layers for name, module in layer.named_modules() if _has_experts(module)]
    if not places:
        return
    spelling = _spelling(model_type)
    tried = set()
    for layer, name in places:
        fused = layer.get_submodule(name)
        if type(fused) not in tried:
            _try(model_type, fused, spelling)
            tried.add(type(fused))
        layer.set_submodule(name, single(fused, spelling))
        if spelling.block:
            theirs, ours = spelling.block
            block = layer._modules.pop(ours)
            layer.add_module(theirs, block)
            # What the layer calls it, but not one of its modules a second time.
            object.__setattr__(layer, ours, block)


def groups_in(layer: Any) -> list[Group]:
    """The groups of a layer's experts: gate and up share the routed tokens, and up produces what down is given."""
    found = []
    for name, module in layer.named_modules():
        if isinstance(getattr(module, "spelling", None), Spelling):
            words = module.spelling
            for number in range(module.count):
                gate, up, down = (f"{name}.{number}.{word}" for word in (words.gate, words.up, words.down))
                found.append(Group((gate, up), None, routed=name))
                found.append(Group((down,), Producer(up, "linear"), routed=name))
    return found


def single(fused: Any, spelling: Spelling) -> Any:
    """A module of linear layers, on the meta device, for the experts of a fused one."""
    import torch

    count, twice, hidden = fused.gate_up_proj.shape

    class Experts(torch.nn.Module):
        """Called as transformers calls its own: hidden states [tokens, hidden], experts and weights [tokens, top]."""

        def __init__(self) -> None:
            super().__init__()
            self.spelling, self.count, self.activation = spelling, count, fused.act_fn
            with torch.device("meta"):
                for number in range(count):
                    expert = torch.nn.Module()
                    expert.add_module(spelling.gate, torch.nn.Linear(hidden, twice // 2, bias=False))
                    expert.add_module(spelling.up, torch.nn.Linear(hidden, twice // 2, bias=False))
                    expert.add_module(spelling.down, torch.nn.Linear(twice // 2, hidden, bias=False))
                    self.add_module(str(number), expert)

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            out = torch.zeros_like(hidden_states)
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
            return down(self.activation(gate(x)) * up(x))

    return Experts()


def _has_experts(module: Any) -> bool:
    """Whether a module holds matrices of several experts as one parameter."""
    return any(each.dim() == 3 and "proj" in name for name, each in module.named_parameters(recurse=False))


def _spelling(model_type: str) -> Spelling:
    """How checkpoints of a model type name their experts, by transformers' mapping of names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    block, words = None, list[str]()
    for entry in get_checkpoint_conversion_mapping(model_type) or []:
        sources, (target, *_) = entry.source_patterns, entry.target_patterns
        if all(".experts.*." in source for source in sources) and target.endswith(("gate_up_proj", "down_proj")):
            words += [source.split(".")[-2] for source in sources]
        elif sources[0].strip(".").isidentifier() and target.strip(".").isidentifier():
            block = sources[0].strip("."), target.strip(".")
    if len(words) != 3:
        raise UserError(
            f"model_type '{model_type}': its checkpoints keep a layer's experts in one tensor, and the pass takes "
            f"those that keep each by itself. {WAY_OUT}."
        )
    gate, up, down = words
    return Spelling(gate, up, down, block)


def _try(model_type: str, fused: Any, spelling: Spelling) -> None:
    """Refuse experts that do not compute `down(act(gate x) * up x)`; one expert with random weights is run."""
    import torch

    refusal = UserError(
        f"model_type '{model_type}': its experts are no gated pair of linear layers, and the calibration pass takes no "
        f"others yet. {WAY_OUT}."
    )
    own = {name: parameter.dim() for name, parameter in fused.named_parameters()}
    if own != {"gate_up_proj": 3, "down_proj": 3} or not hasattr(fused, "act_fn"):
        raise refusal
    chance = torch.Generator().manual_seed(0)
    before = fused.gate_up_proj, fused.down_proj
    pair, down = (torch.randn(1, *each.shape[1:], generator=chance) / each.shape[2] ** 0.5 for each in before)
    x, index = torch.randn(TRIED, pair.shape[2], generator=chance), torch.zeros(TRIED, 1, dtype=torch.int64)
    weights = torch.rand(TRIED, 1, generator=chance)
    fused.gate_up_proj, fused.down_proj = (torch.nn.Parameter(each, requires_grad=False) for each in (pair, down))
    alone = single(fused, spelling)
    gate, up = pair[0].chunk(2)
    words = zip((spelling.gate, spelling.up, spelling.down), (gate, up, down[0]), strict=True)
    alone.load_state_dict({f"0.{word}.weight": tensor for word, tensor in words}, assign=True)
    try:
        one, other = fused(x, index, weights), alone(x, index, weights)
    except Exception:  # whatever another layout led to
        raise refusal from None
    finally:
        fused.gate_up_proj, fused.down_proj = before
    if float((one - other).norm() / one.norm()) > NEAR:
        raise refusal
