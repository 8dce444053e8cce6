"""Small GGUF files, for the tests of what reads them as bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_gguf(
    path: Path, quantized: str = "Q8_0", divisors: Any = None, architecture: str = "llama", half_norms: bool = True
) -> None:
    """A llama GGUF of random weights with a byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, head_dim, mlp, vocab = 64, 4, 2, 16, 96, 259
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    kind = gguf.GGMLQuantizationType[quantized]
    shapes = {
        "token_embd": (vocab, hidden),
        "blk.0.attn_q": (heads * head_dim, hidden),
        "blk.0.attn_k": (kv_heads * head_dim, hidden),
        "blk.0.attn_v": (kv_heads * head_dim, hidden),
        "blk.0.attn_output": (hidden, heads * head_dim),
        "blk.0.ffn_gate": (mlp, hidden),
        "blk.0.ffn_up": (mlp, hidden),
        "blk.0.ffn_down": (hidden, mlp),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2 + (len(shape) == 1)
        if len(shape) == 1:
            if half_norms:
                values = values.astype(np.float16).astype(np.float32)
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
