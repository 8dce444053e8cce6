"""The layer walk: the hidden states of all calibration tokens, pushed through one decoder layer at a time.

What a layer is called with (masks, rotary embeddings, sliding windows) is not written here: a model without layers
is built by transformers, recorders are put in the layers' places, and its own `forward` is run once for each
length of window. Layers are transformers' own classes too; only their weights come from the base's files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.architectures import WAY_OUT
from workbench.worker.calibration.gram import Grams, now
from workbench.worker.calibration.weights import Weights, read_tensor
from workbench.worker.calibration.windows import Windows

ACTIVATIONS = 2**23
"""Numbers in the widest activation of one batch: 32 MiB in float32."""

Arguments = dict[str, object]
"""What a layer is called with beside its input: masks, rotary embeddings, whatever transformers passes."""


class Skeleton:
    """transformers' model without its layers: embeds tokens, and knows what each layer is called with."""

    def __init__(self, weights: Weights, windows: Windows, device: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.windows = device, windows
        self.config = AutoConfig.from_pretrained(weights.folder)
        self.config.use_cache = False
        attention = {"attn_implementation": weights.architecture.family.attention, "dtype": torch.float32}
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.config, **attention)
        self.layers = whole.model.layers
        self.batches = batches(windows.lengths, max(weights.widest, self.config.hidden_size))

        # Only the rows of tokens that occur, renumbered: an embedding of 128,256 x 4,096 is 2 GB in float32.
        occurring, self.renumbered = torch.unique(windows.ids, return_inverse=True)
        small = AutoConfig.from_pretrained(weights.folder)
        small.use_cache = False
        small.num_hidden_layers = 0
        small.vocab_size = len(occurring)
        small.pad_token_id = None
        self.model = AutoModelForCausalLM.from_config(small, **attention).model
        rows = read_tensor(weights, "model.embed_tokens.weight")[occurring].to(torch.float32)
        self.model.embed_tokens.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.model.norm = torch.nn.Identity()
        self.model.config.num_hidden_layers = weights.layers
        self.model.layers = torch.nn.ModuleList(_recorder() for _ in range(weights.layers))
        self.model.eval()
        self.calls: dict[int, list[Arguments]] = {}
        for length in sorted(set(windows.lengths)):
            self._run(self.renumbered[:length].view(1, length))
            self.calls[length] = [
                {key: _moved(value, device) for key, value in recorder.seen[1].items()}
                for recorder in self.model.layers
            ]

    def _run(self, ids: Any) -> Any:
        self.model(input_ids=ids, use_cache=False)
        return self.model.layers[0].seen[0]

    def embed(self, hidden: Any) -> None:
        """Write the first layer's input for all windows, [tokens, hidden]."""
        for start, count, length in self.batches:
            ids = self.renumbered[start : start + count * length].view(count, length)
            hidden[start : start + count * length] = self._run(ids).reshape(count * length, -1)

    def layer(self, index: int, tensors: Tensors, precision: str) -> Any:
        """A decoder layer with its weights in place, ready to be called; frees nothing of `tensors`."""
        import torch

        layer = self.layers[index]
        narrow = torch.bfloat16 if precision == "bfloat16" else torch.float32
        state = {name: tensor.to(narrow) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        missing, extra = layer.load_state_dict(state, strict=False, assign=True)
        unset = [name for name, buffer in layer.named_buffers() if buffer.is_meta]
        if missing or extra or unset:
            raise UserError(
                f"layer {index} lacks what transformers expects: {', '.join([*missing, *extra, *unset])}. {WAY_OUT}."
            )
        return layer.eval()

    def release(self, index: int) -> None:
        """Drop a layer's weights."""
        self.layers[index].to("meta")


def forward(
    model: Skeleton,
    weights: Weights,
    index: int,
    tensors: Tensors,
    hidden: Callable[[int], Any],
    precision: str,
    seconds: dict[str, float],
    step: Callable[[float], None],
) -> Tensors:
    """Push all tokens through a layer: its Gram matrices, float32 [in, in] on the device by a group's first linear.

    `hidden(n)` is layer n's input for all tokens, [tokens, hidden]; that of the next layer is written. `seconds`
    gains what was spent under `forward` and `gram`; `step(share)` is called after each batch. Raises `UserError`
    where an input is not finite.
    """
    import torch

    device = model.device
    grams = Grams(index, device, model.windows)
    layer = model.layer(index, tensors, precision)
    hooks = grams.watch(layer, weights.architecture)
    begun = now(device)
    source, target = hidden(index), hidden(index + 1)
    last = index + 1 == weights.layers
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            for start, count, length in model.batches:
                grams.start = start
                piece = slice(start, start + count * length)
                x = source[piece].to(device).view(count, length, -1)
                out = layer(x, **model.calls[length][index])
                out = out[0] if isinstance(out, tuple) else out
                if not last:
                    target[piece] = out.reshape(count * length, -1).to(device="cpu", dtype=torch.float32)
                step(1 / len(model.batches))
    finally:
        for hook in hooks:
            hook.remove()
        model.release(index)
    found = grams.finish()
    seconds["gram"] = seconds.get("gram", 0.0) + grams.seconds
    seconds["forward"] = seconds.get("forward", 0.0) + now(device) - begun - grams.seconds
    return found


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


def _recorder() -> Any:
    import torch

    class Recorder(torch.nn.Module):
        """Stands in a layer's place, lets hidden states through and remembers how it was called."""

        seen: tuple[Any, Arguments]

        def forward(self, hidden_states: Any, **arguments: Any) -> Any:
            self.seen = (hidden_states, arguments)
            return hidden_states

    return Recorder()


def _moved(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
