"""A model without its layers, by transformers: it embeds tokens, and knows what each layer is called with.

What a layer is called with (masks, rotary embeddings, sliding windows) is not written here: recorders are put in the
layers' places, and the model's own `forward` is run. Layers are transformers' own classes too, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from workbench.errors import UserError
from workbench.worker.attention import caps_scores
from workbench.worker.calibration.experts import take_apart
from workbench.worker.layers import LAYERS, WAY_OUT


class Call(NamedTuple):
    """What a layer is called with beside its input: masks, rotary embeddings, whatever transformers passes."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class Skeleton:
    """A model of a `config.json`'s whose embedding has so many rows. `layers`: its decoder layers, on the meta device;
    `model`: what is around them, with random weights.

    Raises `UserError` for what transformers cannot build, or where it keeps layers elsewhere than the pass expects.
    """

    def __init__(self, config: Mapping[str, Any], vocab_size: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.config = _parsed(config)
        kind = self.config.model_type
        try:
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(self.config, **_settings(self.config))
            small = _parsed(config)
            small.num_hidden_layers = 0
            small.vocab_size = vocab_size
            small.pad_token_id = None
            self.model = _around_layers(AutoModelForCausalLM.from_config(small, **_settings(self.config)))
        except Exception as error:  # transformers raises whatever a configuration led to
            raise UserError(
                f"model_type '{kind}': transformers builds no such model: {_reason(error)}. {WAY_OUT}."
            ) from None
        layers = getattr(_around_layers(whole), "layers", None)
        if layers is None:
            raise UserError(
                f"model_type '{kind}' keeps its decoder layers elsewhere than in `{LAYERS}`, where the calibration "
                f"pass looks for them. {WAY_OUT}."
            )
        take_apart(kind, layers)
        self.layers = layers
        self.model.config.num_hidden_layers = len(layers)
        self.model.layers = torch.nn.ModuleList(_recorder(layer) for layer in layers)
        self.model.eval()

    @property
    def hidden(self) -> int:
        """Channels of a layer's input."""
        return int(self.config.hidden_size)

    def run(self, ids: Any) -> Any:
        """The first layer's input for token ids [windows, tokens]: [windows, tokens, hidden]."""
        self.model(input_ids=ids, use_cache=False)
        return self.model.layers[0].seen[0]

    def calls(self, ids: Any, device: Any) -> list[Call]:
        """What each layer is called with for these ids [1, tokens]."""
        self.run(ids)
        return [Call(*_moved(recorder.seen[1:], device)) for recorder in self.model.layers]


def output_of(layer: Any, x: Any, call: Call, tensors: Mapping[str, Any] | None = None) -> Any:
    """What a layer makes of its input; with other `tensors` than its own where they are given."""
    import torch

    if tensors is None:
        out = layer(x, *call.positional, **call.named)
    else:
        out = torch.func.functional_call(layer, dict(tensors), (x, *call.positional), call.named)
    return out[0] if isinstance(out, tuple) else out


def _around_layers(whole: Any) -> Any:
    """The module that has the layers in it, if it is where they are looked for: Llama 4's class names another."""
    return getattr(whole, LAYERS.partition(".")[0], None)


def _parsed(config: Mapping[str, Any]) -> Any:
    """transformers' own object of a `config.json`, that never caches."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = str(config.get("model_type", "?"))
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model_type '{kind}' is not known to transformers, whose layers are run. {WAY_OUT}.")
    parsed = CONFIG_MAPPING[kind].from_dict(dict(config))
    if type(parsed) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model_type '{kind}' is no causal language model, and only those are calibrated. {WAY_OUT}.")
    parsed.use_cache = False
    return parsed


def _settings(config: Any) -> dict[str, Any]:
    """Float32, and the plain attention where the fast kernel would leave out part of the arithmetic."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(config)]
    fast = not caps_scores(config) and getattr(kind, "_supports_sdpa", False)
    return {
        "attn_implementation": "sdpa" if fast else "eager",
        "experts_implementation": "eager",
        "dtype": torch.float32,
    }


def _recorder(layer: Any) -> Any:
    import torch

    class Recorder(torch.nn.Module):
        """Stands in a layer's place, lets hidden states through and remembers how it was called."""

        seen: tuple[Any, tuple[Any, ...], dict[str, Any]]

        def forward(self, hidden_states: Any, *positional: Any, **named: Any) -> Any:
            self.seen = (hidden_states, positional, named)
            return hidden_states

        def __getattr__(self, name: str) -> Any:
            # Models ask a layer of which kind it is.
            return getattr(layer, name)

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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
