"""What a config.json may say of a decoder: types, ranges, and sizes that agree, before anything is built from it.

Readers take a text for a flag as true, a rotation by no angle, a context of minus one, and build a billion layers one
by one. The ranges are wide: they end where a number cannot be meant. Standard library only: plans read it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from workbench.errors import UserError
from workbench.worker.architectures import ALIASES, sizes_of, stated

LARGEST = {
    "hidden_size": 1 << 20,
    "num_hidden_layers": 1 << 11,
    "num_attention_heads": 1 << 13,
    "num_key_value_heads": 1 << 13,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}
"""Whole numbers from 1 to these, where a configuration has them."""
UNUSED = {"sliding_window": "use_sliding_window", "head_dim": "qk_nope_head_dim"}
"""Of these, which may be 0, beside which other entry."""
PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Of these, what some configurations list layer by layer."""
BETWEEN = {
    "rope_theta": (1.0, 1e12),
    "rope_local_base_freq": (1.0, 1e12),
    "factor": (0.0, 1e6),
    "attention_factor": (0.0, 1e6),
    "partial_rotary_factor": (0.0, 1.0),
    "_eps": (0.0, 0.1),
}
"""Numbers above the first, up to the second; `_eps` is whatever ends so, or in `_epsilon`."""
EPS = re.compile(r"_eps(ilon)?$")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window")
LEVELS = 16
"""Objects and lists inside each other."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a multimodal configuration keeps its language model's sizes."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def context_tokens(config: Mapping[str, Any]) -> int:
    """The longest context a configuration allows, 0 if it does not say."""
    return int(stated(text_config(config), "max_position_embeddings") or 0)


def window_tokens(config: Mapping[str, Any]) -> int:
    """The sliding window of a configuration's windowed layers, 0 if it has none."""
    text = text_config(config)
    kinds = text.get("layer_types") or ["sliding_attention"]
    used = text.get("use_sliding_window", True) and "sliding_attention" in kinds
    return int(text.get("sliding_window") or 0) if used else 0


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a configuration for an entry that no model can have; `where` names it. Raises `UserError`."""
    text = text_config(config)
    _check_depth(config, where)
    for named in (config, text):
        for flag in FLAGS:
            if not isinstance(named.get(flag), bool | None):
                _refuse(where, flag, named[flag], "true or false")
    for name, largest in LARGEST.items():
        for key in (name, *ALIASES.get(name, ())):
            for value in _each(name, text.get(key)):
                unused = type(value) is int and value == 0 and UNUSED.get(key, "") in text
                if not unused and (type(value) is not int or not 1 <= value <= largest):
                    _refuse(where, key, value, f"a whole number from 1 to {largest}")
    for part in (text, *_ropes(text, where)):
        for key, value in part.items():
            limits = BETWEEN.get("_eps" if EPS.search(key) else key)
            if limits and value is not None and not (type(value) in (int, float) and limits[0] < value <= limits[1]):
                _refuse(where, key, value, f"a number above {limits[0]:g}, up to {limits[1]:g}")
    try:
        sizes = sizes_of(text)
    except (KeyError, TypeError):
        return  # No decoder with attention in every layer, or sizes that differ from layer to layer.
    if sizes.heads % sizes.kv_heads:
        _refuse(where, "num_key_value_heads", sizes.kv_heads, f"a divisor of its {sizes.heads} attention heads")


def _refuse(where: object, key: str, value: object, wanted: str) -> NoReturn:
    raise UserError(f"{where}: `{key}` is {repr(value)[:40]}, not {wanted}.")


def _each(name: str, value: object) -> list[Any]:
    """A size, or those of all layers."""
    if isinstance(value, list) and value and name in PER_LAYER:
        return value
    return [] if value is None else [value]


def _ropes(text: Mapping[str, Any], where: object) -> list[Mapping[str, Any]]:
    """What is said of rotations, perhaps of each kind of layer apart."""
    found: list[Mapping[str, Any]] = []
    for key in ("rope_scaling", "rope_parameters"):
        value = text.get(key) or {}
        if not isinstance(value, dict):
            _refuse(where, key, value, "an object")
        found += [value, *(part for part in value.values() if isinstance(part, dict))]
    return found


def _check_depth(value: object, where: object, level: int = 0) -> None:
    if level > LEVELS:
        raise UserError(f"{where}: its entries lie more than {LEVELS} deep in each other: no model's. Fetch it again.")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, where, level + 1)
