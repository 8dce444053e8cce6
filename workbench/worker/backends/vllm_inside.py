"""What runs inside vLLM's own workers, which may be processes of their own: logits reduced where they are born.

vLLM calls `compute_logits` once a prompt with all rows when prompt log-probabilities are asked for. It is wrapped, and
only the reduction is handed back. Rejected: dictionaries of log-probabilities per token (20 entries cost more than the
forward), and `prompt_logprob_token_ids` (refuses to start on the CPU).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from workbench.first_calls import settle_when_torch_is_imported
from workbench.records import from_json
from workbench.worker.backends import vllm_gguf
from workbench.worker.measure import resident
from workbench.worker.scoring.reducer import Scoring


def allow_amx() -> None:
    """Linux lends a process the registers of Intel's AMX when asked. vLLM's kernels take them without (0.32), which is
    SIGILL where nothing else asked before; torch asks in this function, for which it has no public name."""
    import torch

    torch.cpu._init_amx()


if "vllm" in sys.modules:
    # Which imports this module, by the extension's name, in each of its processes and before it loads a model.
    vllm_gguf.register()
    allow_amx()
    settle_when_torch_is_imported()


class Extension:
    """Methods that vLLM adds to its worker; called by name with `collective_rpc`."""

    def workbench_begin(self, asked: object) -> None:
        """Wrap the model's `compute_logits` so that a `Reducer` sees the logits of all scored rows, in float32; nothing
        `asked`: so that they are kept."""
        from workbench.worker.scoring.reducer import Reducer

        model = self.model_runner.model  # type: ignore[attr-defined]
        self._reducer: Any = Kept() if asked is None else Reducer(from_json(Scoring, asked))
        self._scored_in = ""
        self._window: tuple[int, int, int] | None = None
        self._compute = model.compute_logits
        self._processors = [module for module in model.modules() if hasattr(module, "_apply_head")]
        for processor in self._processors:
            processor._apply_head = _wide(processor._apply_head)

        def compute_logits(hidden_states: Any, *rest: Any, **named: Any) -> Any:
            rows = hidden_states.shape[0]
            if self._window is None or rows < 2:
                return self._compute(hidden_states, *rest, **named)
            index, first, position = self._window
            self._window = (index, first, position + rows)
            skip = min(max(first - position, 0), rows - 1)
            logits = self._compute(hidden_states[skip:], *rest, **named)
            if logits is None:
                return None
            self._reducer(index, position + skip, logits)
            self._scored_in = str(logits.dtype).removeprefix("torch.")
            # vLLM wants as many rows as it gave, for numbers that nobody will read.
            return logits[:1].expand(rows, -1)

        model.compute_logits = compute_logits

    def workbench_window(self, index: int, first: int) -> None:
        """The next prompt is this window."""
        self._window = (index, first, 0)

    def workbench_end(self) -> dict[str, Any]:
        """Unwrap; the reduction as `quality`, and the logits' dtype as `scored_in`."""
        self.model_runner.model.compute_logits = self._compute  # type: ignore[attr-defined]
        for processor in self._processors:
            del processor._apply_head
        return {"quality": self._reducer.result(), "scored_in": self._scored_in}

    def workbench_forget_peak(self) -> None:
        """The workspace is of what comes."""
        import torch

        self._peak = resident.Peak()
        if self.device.type == "cuda":  # type: ignore[attr-defined]
            torch.cuda.reset_peak_memory_stats()

    def workbench_memory(self) -> dict[str, int]:
        """Bytes of weights in this worker, of its key-value cache and its workspace, as far as it knows.

        The workspace is on a GPU all else that is allocated there at the peak, graphs included, and on a CPU what this
        process, which may not be the engine's, grew by."""
        import torch

        runner = self.model_runner  # type: ignore[attr-defined]
        # On a CPU weights are repacked into the kernels' own memory, which no parameter shows.
        weights = int(getattr(runner, "model_memory_usage", 0))
        caches = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(runner.kv_caches)}
        known = ({"weights": weights} if weights else {}) | {"kv_cache_reserved": sum(caches.values())}
        if self.device.type == "cuda":  # type: ignore[attr-defined]
            known["workspace"] = max(0, torch.cuda.max_memory_allocated() - sum(known.values()))
        elif hasattr(self, "_peak") and (grown := self._peak.grown()) is not None:
            known["workspace"] = grown
        return known


class Kept:
    """In the place of a `Reducer`: the logits themselves."""

    def __init__(self) -> None:
        self._rows: list[Any] = []

    def __call__(self, index: int, first_position: int, logits: Any) -> None:
        self._rows.append(logits.float().cpu())

    def result(self) -> Any:
        """[rows, vocabulary] float32."""
        import torch

        return torch.cat(self._rows)


def _wide(apply_head: Any) -> Any:
    """vLLM's product with the head, but in float32 where that is a plain matrix (`worker/scoring/head.py`).

    Its own switch for it, `head_dtype`, is for the engine's whole life and holds the head twice on a CPU.
    """
    from workbench.worker.scoring import head

    def apply(lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
        plain = type(lm_head.quant_method).__name__ in ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
        # Of 16 bits and not packed away, as vLLM on a CPU does with some.
        if plain and head.fits(lm_head.weight):
            return head.product(hidden_states, lm_head.weight, embedding_bias)
        return apply_head(lm_head, hidden_states, embedding_bias)

    return apply


def _tensors(nest: Any) -> Iterator[Any]:
    for item in nest:
        if isinstance(item, list | tuple):
            yield from _tensors(item)
        else:
            yield item
