"""A whole model's decoding in transformers with 4-bit weights, beside the same model in fp16, on this machine's GPU.

    python kernels/bench_decode.py [--layout Q4_K] [--tokens 128] [--out results/<machine>/decode.jsonl]

The shape is Llama-3.1-8B's and the weights are random: what is measured is speed and memory, and both are the same for
any weights. A GGUF type packs the embedding and the head too, as a GGUF file does; AWQ and GPTQ leave them in fp16,
which alone is 0.13 of an 8B model. One sequence, a static cache, every step one replay of a CUDA graph (both models),
so that neither pays for launching from Python. Prints tokens a second, bytes of weights, and the two ratios.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from bench import GROUP, append, event_seconds, machine, operations  # noqa: E402

CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
REPEATS = 5


def build(layout: str, config: dict[str, float], device: str = "cuda") -> Any:
    """A Llama in fp16 with small random weights, its linear layers in `layout` (`fp16`: as they are)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from workbench_kernels.modules import AwqLinear, BlockEmbedding, BlockLinear, GptqLinear

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config)).half()
    if layout != "fp16":
        known = operations(device)[layout]
        with_head = not layout.startswith(("awq", "gptq"))
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and (with_head or name != "lm_head"):
                weight = known.make(module.out_features, module.in_features)
                if layout.startswith("awq"):
                    packed: torch.nn.Module = AwqLinear(*weight)
                elif layout.startswith("gptq"):
                    packed = GptqLinear(weight[0], weight[1], weight[2], weight[3], int(layout.split("-")[1]))
                else:
                    packed = BlockLinear(weight[0], layout)
                model.set_submodule(name, packed)
        if with_head:
            rows = known.make(model.config.vocab_size, model.config.hidden_size)[0]
            model.set_input_embeddings(BlockEmbedding(rows, layout, torch.float16))
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None and tensor.is_meta:
                value = torch.randn(tensor.shape, dtype=torch.float16, device=device) * 0.02
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    return model.eval()


def stepper(model: Any, tokens: int, prompt: int = 64) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: decode one token after a random prompt (to be called `tokens` times at most), and go back to it.

    A static cache counts on its device what it holds, and writes where that count says: going back sets the count.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt + tokens)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    ids = torch.randint(0, 1000, (1, prompt), device=model.device)
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        with torch.inference_mode():
            token.copy_(model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

    def rewind() -> None:
        with torch.inference_mode():
            token.zero_()
            layers: list[Any] = cache.layers
            for layer in layers:
                layer.cumulative_length.fill_(prompt)

    return step, rewind


def decode_seconds(model: Any, tokens: int) -> list[float]:
    """Seconds a token over `tokens` replays of one captured step, one sample a repeat."""
    step, rewind = stepper(model, tokens)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(min(3, tokens)):
            step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def sequence() -> None:
        for _ in range(tokens):
            graph.replay()

    samples = []
    for _ in range(REPEATS):
        rewind()
        samples.append(event_seconds(sequence) / tokens)
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", default="Q4_K", help="as bench.py names them, of 4 bits")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="a file that a JSON row is appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_decode.py measures a GPU, and torch sees none here.", file=sys.stderr)
        return 2
    row: dict[str, object] = {"layout": arguments.layout, "group": GROUP, "tokens": arguments.tokens, **machine()}
    weight_bytes, seconds = {}, {}
    for name, layout in (("fp16", "fp16"), ("packed", arguments.layout)):
        model = build(layout, CONFIG)
        tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        weight_bytes[name] = sum(tensors.values())
        samples_s = decode_seconds(model, arguments.tokens)
        seconds[name] = statistics.median(samples_s)
        row |= {f"{name}_weight_bytes": weight_bytes[name], f"{name}_samples_s": samples_s}
        del model, tensors
        gc.collect()
        torch.cuda.empty_cache()
    speed, memory = seconds["fp16"] / seconds["packed"], weight_bytes["packed"] / weight_bytes["fp16"]
    print(
        f"{row['gpu']}: fp16 {1 / seconds['fp16']:.1f} tokens/s, {arguments.layout} {1 / seconds['packed']:.1f}: "
        f"{speed:.2f} x (goal 2); weights {memory:.2f} of fp16's (goal 0.35)"
    )
    append(arguments.out, row | {"speed_ratio": speed, "memory_ratio": memory})
    return 0


if __name__ == "__main__":
    sys.exit(main())
