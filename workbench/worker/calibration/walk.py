"""The layer walk: the hidden states of all calibration tokens, pushed through one decoder layer at a time.

What a layer is called with comes from transformers' own model without layers (`skeleton.py`), run once for each length
of window. Layers are transformers' own classes too; only their weights come from the base's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.calibration.discover import proven
from workbench.worker.calibration.experts import probabilities, router_of
from workbench.worker.calibration.gram import Grams, now
from workbench.worker.calibration.skeleton import Skeleton, output_of
from workbench.worker.calibration.weights import Weights, read_layer, read_tensor
from workbench.worker.calibration.windows import FEWEST_TOKENS, Windows
from workbench.worker.layers import WAY_OUT, Structure

FEWEST_ROUTED = FEWEST_TOKENS
"""Tokens that an expert is calibrated on by itself; with fewer it is calibrated on all that its layer's experts see,
weighted by the router."""

Counts = dict[str, list[int]]
"""Module with a layer's experts -> how many tokens each of them was sent."""

ACTIVATIONS = 2**23
"""Numbers in the widest activation of one batch: 32 MiB in float32."""

AddUp = Callable[[Grams, Sequence[str]], None]
"""Given matrices of these inputs over a process's own windows, makes them those over all windows."""


class Walk:
    """The base on its way through the pass: its skeleton with the weights that are outside of layers, and what each
    layer is called with for each length of window. `own`: how many windows, from the first, go through layers here,
    where other processes have the rest; all if None. Then `add_up` is to be set."""

    def __init__(self, weights: Weights, windows: Windows, device: Any, own: int | None = None) -> None:
        import torch

        self.device, self.windows = device, windows
        self.add_up: AddUp = lambda grams, names: None
        # Only the rows of tokens that occur, renumbered: an embedding of 128,256 x 4,096 is 2 GB in float32.
        occurring, self.renumbered = torch.unique(windows.ids, return_inverse=True)
        self.skeleton = Skeleton(weights.config, len(occurring))
        _fill(self.skeleton.model, weights, occurring)
        self.width = max(weights.widest, self.skeleton.hidden)
        self.batches = batches(windows.lengths[:own], self.width)
        self.calls = {
            length: self.skeleton.calls(self.renumbered[:length].view(1, length), device)
            for length in sorted(set(windows.lengths[:own]))
        }

    def embed(self, hidden: Any) -> None:
        """Write the first layer's input for all windows, others' too, [tokens, hidden]."""
        for start, count, length in batches(self.windows.lengths, self.width):
            ids = self.renumbered[start : start + count * length].view(count, length)
            hidden[start : start + count * length] = self.skeleton.run(ids).reshape(count * length, -1)

    def layer(self, index: int, tensors: Tensors, precision: str) -> Any:
        """A decoder layer with its weights in place, ready to be called; frees nothing of `tensors`."""
        import torch

        layer = self.skeleton.layers[index]
        narrow = torch.bfloat16 if precision == "bfloat16" else torch.float32
        state = {name: tensor.to(narrow) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        missing, extra = layer.load_state_dict(state, strict=False, assign=True)
        unset = [name for name, buffer in layer.named_buffers() if buffer.is_meta]
        if missing or extra or unset:
            raise UserError(
                f"layer {index} lacks what transformers expects: {', '.join([*missing, *extra, *unset])}. {WAY_OUT}."
            )
        return layer.eval()

    def autocast(self, precision: str) -> Any:
        """A context in which products are of that precision."""
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")

    def outputs(
        self, index: int, layer: Any, source: Any, precision: str, grams: Grams | None = None
    ) -> Iterator[tuple[slice, Any]]:
        """Run a layer on its input [tokens, hidden], batch by batch: which tokens, and its output for them."""
        with self.autocast(precision):
            for start, count, length in self.batches:
                if grams:
                    grams.start = start
                piece = slice(start, start + count * length)
                x = source[piece].to(self.device).view(count, length, -1)
                yield piece, output_of(layer, x, self.calls[length][index])

    def release(self, index: int) -> None:
        """Drop a layer's weights."""
        self.skeleton.layers[index].to("meta")

    def proven(self, weights: Weights) -> Weights:
        """The base without the producers that do not hold on its own weights: one layer of each kind, one window."""
        length = self.windows.lengths[0]
        x = self.skeleton.run(self.renumbered[:length].view(1, length)).to(self.device)
        found = {}
        for structure, index in weights.kinds().items():
            tensors = read_layer(weights, index, self.device)
            run = partial(output_of, self.layer(index, tensors, "float32"), x, self.calls[length][index])
            found[structure] = proven(structure, tensors, run)
            self.release(index)
        return replace(weights, structures=tuple(found[structure] for structure in weights.structures))


def _fill(model: Any, weights: Weights, occurring: Any) -> None:
    """Put the base's own tensors into what is around its layers; of the embedding the rows of the tokens that occur."""
    import torch

    embedding = model.get_input_embeddings()
    for stem, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = ".".join(filter(None, ("model", stem, leaf)))
            if name not in weights.tensors:
                raise UserError(f"{weights.folder}: tensor '{name}' is missing. {WAY_OUT}.")
            tensor = read_tensor(weights, name)
            tensor = (tensor[occurring] if module is embedding else tensor).to(parameter.dtype)
            setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))


def forward(
    model: Walk,
    weights: Weights,
    index: int,
    structure: Structure,
    tensors: Tensors,
    hidden: Callable[[int], Any],
    precision: str,
    seconds: dict[str, float],
    step: Callable[[float], None],
) -> tuple[Tensors, Counts]:
    """Push all tokens through a layer: the Gram matrices of a `structure`, which is all of the layer or a part, float32
    [in, in] on the device by a group's first linear, and how many tokens reached each of its experts.

    `hidden(n)` is layer n's input for all tokens, [tokens, hidden]; that of the next layer is written. `seconds`
    gains what was spent under `forward` and `gram`; `step(share)` is called after each batch. Raises `UserError`
    where an input is not finite.
    """
    import torch

    device = model.device
    grams = Grams(index, device, model.windows)
    layer = model.layer(index, tensors, precision)
    hooks = grams.watch(layer, structure)
    begun = now(device)
    target = hidden(index + 1)
    last = index + 1 == weights.layers
    try:
        for piece, out in model.outputs(index, layer, hidden(index), precision, grams):
            if not last:
                target[piece] = out.reshape(-1, out.shape[-1]).to(device="cpu", dtype=torch.float32)
            step(1 / len(model.batches))
        model.add_up(grams, [group.linears[0] for group in structure.groups])
        counts = {
            name: [int(grams.counts.get(group.linears[0], 0)) for group in groups[::2]]
            for name, groups in structure.experts.items()
        }
        _feed_the_starved(model, index, layer, hidden(index), precision, grams, counts, structure)
    finally:
        for hook in hooks:
            hook.remove()
        model.release(index)
    found = grams.finish()
    seconds["gram"] = seconds.get("gram", 0.0) + grams.seconds
    seconds["forward"] = seconds.get("forward", 0.0) + now(device) - begun - grams.seconds
    return found, counts


def _feed_the_starved(
    model: Walk,
    index: int,
    layer: Any,
    source: Any,
    precision: str,
    grams: Grams,
    counts: Counts,
    structure: Structure,
) -> None:
    """Run experts that saw fewer than `FEWEST_ROUTED` tokens on all that reach their layer's experts, so that their
    Gram matrices are of these, each by the router's probability of that expert (`benchmarks/starved_experts.py`)."""
    for name, seen in counts.items():
        groups = structure.experts[name]
        few = [2 * place for place, count in enumerate(seen) if count < FEWEST_ROUTED]
        if not few:
            continue
        starved = [int(groups[place].linears[0].removeprefix(f"{name}.").partition(".")[0]) for place in few]
        names = [group.linears[0] for place in few for group in groups[place : place + 2]]
        firsts = frozenset(names)

        chances: list[Any] = []

        def look(module: Any, inputs: tuple[Any, ...], chances: list[Any] = chances) -> None:
            chances[:] = [probabilities(module, inputs[0])]

        def feed(
            module: Any,
            inputs: tuple[Any, ...],
            starved: list[int] = starved,
            firsts: Any = firsts,
            chances: list[Any] = chances,
        ) -> None:
            grams.listening = firsts
            reaching = module.everything(inputs[0])
            for number in starved:
                grams.weights = chances[0][:, number] if chances else None
                module.expert(number, reaching)
            grams.listening, grams.weights = frozenset(), None

        experts = layer.get_submodule(name)
        hooks = [experts.register_forward_pre_hook(feed)]
        if router := router_of(layer, name):
            hooks.append(router.register_forward_pre_hook(look))
        grams.forget(firsts)
        grams.listening = frozenset()
        try:
            for _ in model.outputs(index, layer, source, precision, grams):
                pass
        finally:
            for hook in hooks:
                hook.remove()
        model.add_up(grams, names)


def does_not_fit(index: int, device: Any) -> UserError:
    """The error for a layer whose forward pass is too large for a device's memory."""
    return UserError(
        f"layer {index} and its Gram matrices do not fit into the free memory of {device}: free some, or set "
        "CUDA_VISIBLE_DEVICES to another device, or to nothing for the CPU; finished layers are kept"
    )


def batches(lengths: list[int], width: int) -> list[tuple[int, int, int]]:
    """(first token, windows, tokens of each) of batches of equal windows that keep activations small."""
    found, start, place = [], 0, 0
    while place < len(lengths):
        length = lengths[place]
        most = max(1, ACTIVATIONS // (width * length))
        count = 1
        while count < most and place + count < len(lengths) and lengths[place + count] == length:
            count += 1
        found.append((start, count, length))
        start, place = start + count * length, place + count
    return found
