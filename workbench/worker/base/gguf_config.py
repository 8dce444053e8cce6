"""The model that a GGUF file holds, in transformers' words: every key and every tensor of it, or the file is refused.

transformers reads a GGUF file's sizes, leaves the other keys out, drops the tensors that its model has no place for
and fills those that the file lacks with random numbers, all without a word. Here what it leaves out is put back
(biases, rope scaling, partial rotation, the scale of Gemma's attention, which llama.cpp computes and no file states),
and what cannot be is refused by its name: an engine would run another model, and a base would be one for all engines.

Rejected: a list of architectures that are right. A key says more: Mixtral's files call themselves `llama`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from workbench.errors import UserError
from workbench.worker.base.gguf_file import field_of, open_gguf, parsed_once

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
"""Key behind the architecture's name -> where a configuration keeps it (the first that it has)."""

BESIDE = ("feed_forward_length", "context_length")
"""Of these, what an architecture may do without: tensors say the first, the second is no part of the function."""
SHAPING = ("attention.key_length", "attention.value_length")
ROPE = (
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
REQUIRED = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
NOTES = ("GGUF", "general", "split", "quantize", "imatrix")
"""First words of keys that say nothing of the function."""
TOKENIZER = re.compile(
    r"tokenizer\.(chat_templates?(\..*)?|huggingface\.json|ggml\.(model|pre|tokens|token_type|token_type_count|scores|"
    r"merges|precompiled_charsmap|add_(bos|eos|sep)_token|add_space_prefix|remove_extra_whitespaces|eog_token_ids|(bos|"
    r"eos|eot|eom|unknown|sep[ae]rator|padding|mask|cls|prefix|suffix|middle|fim_(pre|suf|mid|pad|rep|sep))_token_id))"
)
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of a GGUF file that are part of the configuration in transformers."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""By which llama.cpp knows the one size of each that scales its attention by the mean width of a head."""
USE_SAFETENSORS = "Use the model's safetensors."


class GgufModel(NamedTuple):
    """A GGUF file's reader, transformers' configuration of it, and which of its entries transformers got wrong."""

    reader: Any
    config: Any
    carried: list[str]


def read_gguf(path: Path) -> GgufModel:
    """A GGUF file, all of it carried. Raises `UserError` that names what cannot be.

    transformers' model of that configuration has a place for every tensor of the file, and a tensor for every place.
    """
    from transformers import AutoConfig

    reader = open_gguf(path)
    architecture = str(field_of(reader, "general.architecture"))
    try:
        check_keys(path, reader, architecture)
        with parsed_once(path, reader):
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        before = config.to_dict()
        _carry(path, reader, architecture, config)
        _check_tensors(path, reader, architecture, config)
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever an impossible configuration led to
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(
            f"{path}: transformers cannot read GGUF files of the architecture '{architecture}' ({reason}). "
            f"{USE_SAFETENSORS}"
        ) from None
    after = config.to_dict()
    return GgufModel(reader, config, sorted(key for key in after if after[key] != before.get(key)))


def load_gguf(path: Path, arguments: Mapping[str, object], read: GgufModel | None = None) -> Any:
    """transformers' model of a GGUF file, de-quantized; `arguments`: of `from_pretrained`, `read`: of `read_gguf`."""
    from transformers import AutoModelForCausalLM, GgufConfig

    reader, config, _ = read or read_gguf(path)
    where = {"gguf_file": path.name, "config": config, "quantization_config": GgufConfig(dequantize=True)}
    kind: Any = AutoModelForCausalLM
    with parsed_once(path, reader):
        return kind.from_pretrained(str(path.parent), **where, **arguments)


def names_in(model: Any, path: Path, reader: Any, config: Any) -> tuple[dict[str, str], Any]:
    """The names that a file's tensors have in transformers' model, and its processor, which undoes what was rearranged
    in them."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind_of: Any = TENSOR_PROCESSORS.get(str(field_of(reader, "general.architecture")), TensorProcessor)
    processor = kind_of(config=config.to_dict())
    with parsed_once(path, reader):
        return get_gguf_hf_weights_map(model, processor), processor


def lost(path: Path, what: str) -> UserError:
    """The refusal of a file for something that would be left out."""
    return UserError(f"{path}: {what} cannot be carried into a Hugging Face configuration. {USE_SAFETENSORS}")


def check_keys(path: Path, reader: Any, architecture: str) -> None:
    """Refuse a file for a key that nobody reads, a size that its tensors contradict, or one that is not there."""
    for key, field in reader.fields.items():
        first, _, rest = key.partition(".")
        if key.startswith(f"{architecture}."):
            rest = key.removeprefix(f"{architecture}.")
            known = rest in ATTRIBUTES or rest in SHAPING or rest in ROPE
            if not known and field.contents() not in (0, False, None, ""):
                raise lost(path, f"its '{key}'")
        elif first == "tokenizer":
            if not TOKENIZER.fullmatch(key):
                raise lost(path, f"its '{key}'")
        elif first not in NOTES and (rest in (*ATTRIBUTES, *SHAPING, *ROPE) or not isinstance(field.contents(), str)):
            raise lost(path, f"its '{key}', which is no key of the architecture '{architecture}',")
    sizes = {key: field_of(reader, f"{architecture}.{key}") for key in REQUIRED}
    for key, value in sizes.items():
        if not isinstance(value, int) or not 0 < value < 1 << 31:
            raise UserError(f"{path} has no '{architecture}.{key}' that a model can have: {value}. Fetch it again.")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    tokens = reader.get_field("tokenizer.ggml.tokens")
    embedding = shapes.get("token_embd.weight")
    if (
        embedding is None
        or len(embedding) != 2
        or embedding[0] != sizes["embedding_length"]
        or len(layers) != sizes["block_count"]
    ):
        raise UserError(
            f"{path}: its '{architecture}.embedding_length' and '{architecture}.block_count' are not those of its "
            "tensors. Fetch it again."
        )
    vocabulary = {
        "tokenizer.ggml.tokens": None if tokens is None else len(tokens.data),
        f"{architecture}.vocab_size": field_of(reader, f"{architecture}.vocab_size"),
    }
    for key, field in reader.fields.items():
        if key.startswith("tokenizer.") and key.endswith("_token_id") and not 0 <= field.contents() < embedding[1]:
            raise UserError(f"{path}: its '{key}' is {field.contents()}, of {embedding[1]} tokens. Fetch it again.")
    for key, count in vocabulary.items():
        if count is not None and count != embedding[1]:
            raise UserError(f"{path}: '{key}' counts {count} tokens, its embedding {embedding[1]}. Fetch it again.")


def _carry(path: Path, reader: Any, architecture: str, config: Any) -> None:
    """Put into a configuration that transformers read from a GGUF file all that the file says."""
    said = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{architecture}.")
    }
    names = {tensor.name for tensor in reader.tensors}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for key, value in said.items():
        if key not in ATTRIBUTES or not value:
            continue
        attribute = next((name for name in ATTRIBUTES[key] if hasattr(config, name)), None)
        if attribute is None and key in BESIDE:
            continue
        if attribute is None or isinstance(value, list):
            raise lost(path, f"its '{architecture}.{key}' ({str(value)[:40]})")
        setattr(config, attribute, value)
    eps = [key for key in ATTRIBUTES if key.endswith("epsilon") and said.get(key)]
    if not eps or not all(1e-12 < float(said[key]) < 0.1 for key in eps):
        raise UserError(f"{path} has no '{architecture}.attention.layer_norm_rms_epsilon' that a model can have.")
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = said.get("attention.head_count_kv") or config.num_attention_heads
    head = config.hidden_size // config.num_attention_heads
    lengths = {said.get(key, head) for key in SHAPING}
    if len(lengths) > 1:
        raise lost(path, f"its '{architecture}.attention.key_length', which is not its value_length,")
    (head_dim,) = lengths
    if head_dim != head or hasattr(config, "head_dim"):
        config.head_dim = head_dim
    for attribute, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_gate.bias")):
        if hasattr(config, attribute):
            setattr(config, attribute, tensor in names)
    if hasattr(config, "query_pre_attn_scalar"):
        as_27b = config.num_hidden_layers == GEMMA_27B_LAYERS.get(architecture)
        config.query_pre_attn_scalar = head if as_27b else head_dim
    if hasattr(config, "sliding_window"):
        _window(path, said, architecture, config)
    if getattr(config, "rope_parameters", None) is not None:
        _rope(path, reader, said, config, head_dim)
    elif said.keys() & set(ROPE):
        raise lost(path, f"its '{architecture}.{min(said.keys() & set(ROPE))}'")


def _window(path: Path, said: dict[str, Any], architecture: str, config: Any) -> None:
    """The sliding window: Gemma 2 has one where the file has not, others have none."""
    window = said.get("attention.sliding_window")
    kinds = getattr(config, "layer_types", None)
    if window and kinds and "sliding_attention" not in kinds and window < config.max_position_embeddings:
        raise lost(path, f"its '{architecture}.attention.sliding_window'")
    if not window and architecture != "gemma2":
        if kinds and "sliding_attention" in kinds:
            raise UserError(f"{path} has no '{architecture}.attention.sliding_window'. Fetch it again.")
        config.sliding_window = None


def _rope(path: Path, reader: Any, said: dict[str, Any], config: Any, head_dim: int) -> None:
    """Set `rope_parameters`: base, scaling, and how much of a head is rotated."""
    base = float(said.get("rope.freq_base", 10000.0))
    dimensions = int(said.get("rope.dimension_count", head_dim))
    if not 100 <= base <= 1e12 or not 0 < dimensions <= head_dim:
        raise UserError(f"{path}: its rope (base {base}, {dimensions} dimensions) is no model's. Fetch it again.")
    rope = {"rope_type": "default", **_scaling(path, reader, said, base, config), "rope_theta": base}
    present = config.rope_parameters
    if dimensions != head_dim or "partial_rotary_factor" in present:
        rope["partial_rotary_factor"] = dimensions / head_dim
    if "sliding_attention" in present:
        # llama.cpp scales only the layers that see everything.
        local = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base_swa", 10000.0))}
        config.rope_parameters = {"full_attention": rope, "sliding_attention": local}
    elif "rope.freq_base_swa" in said:
        raise lost(path, "its 'rope.freq_base_swa'")
    else:
        config.rope_parameters = rope


def _scaling(path: Path, reader: Any, said: dict[str, Any], base: float, config: Any) -> dict[str, Any]:
    """Rope scaling, as `rope_parameters` says it; empty if there is none.

    llama.cpp stores Llama 3's as a tensor of divisors, one a frequency (`rope_freqs.weight`). The formula that made
    them is public (Llama 3.1's model code), so its free parameters are read off them (the factor is the largest; a
    divisor between 1 and it tells the original context) and the result is compared with the whole tensor.
    """
    import numpy as np

    tensors = {t.name: np.asarray(t.data, dtype=np.float64).reshape(-1) for t in reader.tensors if "rope_f" in t.name}
    original = int(said.get("rope.scaling.original_context_length") or 0)
    kind, factor = said.get("rope.scaling.type"), float(said.get("rope.scaling.factor") or 1.0)
    attention = float(said.get("rope.scaling.attn_factor") or 1.0)
    refused = lost(path, "its rope scaling")
    if not all(math.isfinite(value) and 0.1 < value < 1e6 for value in (factor, attention)):
        raise refused
    if "rope_freqs.weight" in tensors and not np.allclose(tensors["rope_freqs.weight"], 1):
        divisors, scaling = tensors["rope_freqs.weight"], dict[str, Any]()
        for context in (original or 8192, _original_context(divisors, base)):
            scaling = {
                "rope_type": "llama3",
                "factor": float(round(float(divisors.max()), 3)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
            if np.allclose(llama3_divisors(base, 2 * len(divisors), scaling), divisors, rtol=1e-3):
                return scaling
        raise refused
    if "rope_factors_long.weight" in tensors:
        if not original or factor != 1.0 or "original_max_position_embeddings" not in config.to_dict():
            raise refused
        config.original_max_position_embeddings = original
        short, long = (tensors[f"rope_factors_{word}.weight"].tolist() for word in ("short", "long"))
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention}
        return {**scaling, "original_max_position_embeddings": original}
    if attention != 1.0:
        raise refused
    if factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        betas = {
            word: float(said[f"rope.scaling.yarn_{word}"])
            for word in ("beta_fast", "beta_slow")
            if f"rope.scaling.yarn_{word}" in said
        }
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    raise refused


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> Any:
    """What Llama 3.1 divides each of the `head_dim / 2` rope frequencies by."""
    import numpy as np

    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _original_context(divisors: Any, theta: float) -> int:
    """The original context (tokens) that the first divisor between 1 and the largest was made of, or 8192."""
    largest = float(divisors.max())
    for place, divisor in enumerate(divisors.tolist()):
        if 1.001 < divisor < 0.999 * largest:
            smooth = (1 / divisor - 1 / largest) / (1 - 1 / largest)
            return int(round(2 * math.pi * (1 + 3 * smooth) * theta ** (place / len(divisors))))
    return 8192


def _check_tensors(path: Path, reader: Any, architecture: str, config: Any) -> None:
    """Refuse a file unless its tensors are all of transformers' model of the configuration, and no others."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names, _ = names_in(model, path, reader, config)
    places, filled = model.state_dict(), set[str]()
    for tensor in reader.tensors:
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            if tensor.name in ROPE_TENSORS:
                continue
            raise UserError(f"{path}: tensor {tensor.name} has no place in transformers' {type(model).__name__}")
        filled.add(name)
        found, wanted = ([n for n in shape if n != 1] for shape in (tensor.shape.tolist(), places[name].shape))
        if sorted(found) != sorted(wanted) and "_exps" not in tensor.name:
            raise UserError(f"{path}: tensor {tensor.name} is {found[::-1]}, its header says {wanted}. Fetch it again.")
        if re.match(r"I\d", tensor.tensor_type.name):
            raise UserError(f"{path}: tensor {tensor.name} is of type {tensor.tensor_type.name}. Fetch it again.")
    missing = [name for name, _ in model.named_parameters() if name not in filled]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{path}: it has no tensor for {missing[0]}{more} of "
            f"transformers' {type(model).__name__}. Fetch it again, or use the model's safetensors."
        )
    turned = {2 * len(m.inv_freq) for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)}
    dimensions = field_of(reader, f"{architecture}.rope.dimension_count")
    if dimensions and turned and turned != {int(dimensions)}:
        raise lost(path, f"its '{architecture}.rope.dimension_count'")
