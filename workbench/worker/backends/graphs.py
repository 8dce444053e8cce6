"""transformers' decoding step as one CUDA graph over a cache of fixed size.

Launched from Python kernel by kernel, a step on a GPU takes as long as Python does, and all variants look alike.

Rejected: `generate` with `cache_implementation="static"`, which compiles the model by torch.compile: minutes for every
variant, and other kernels than the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Step = Callable[[], None]
CHECKED_STEPS = 4
"""Steps that are decoded both ways before a graph is believed."""
ALIKE = 0.01
"""How far their logits may be apart, of the largest: sums may be made in another order."""
WARMUP_STEPS = 3


class Steps:
    """Greedy decoding of `batch` sequences together, of which at most `room` tokens each are fed.

    Raises `ValueError` for a model that keeps more of its past than a graph can hold, and what torch raises for one
    whose step waits for the GPU.
    """

    def __init__(self, model: Any, batch: int, room: int, capture: Callable[[Step, Step], Step] | None = None) -> None:
        import torch

        self.cache = _fixed_cache(model.config, room)
        self._model, self.size = model, (batch, room)
        with torch.inference_mode():
            self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
            """What each sequence is fed next, [batch, 1]."""
            wanted = self._beginning(self._launch)
            self.step = (capture or _captured)(self._launch, self._rewind)
            """Decode one token of each sequence."""
            for launched, replayed in zip(wanted, self._beginning(self.step), strict=True):
                if not (launched - replayed).abs().max() <= ALIKE * launched.abs().max():
                    raise ValueError("replayed, its step computes something else than launched")

    def fits(self, batch: int, tokens: int) -> bool:
        """Whether so many sequences of so many tokens that are fed can be decoded here."""
        return self.size[0] == batch and self.size[1] >= tokens

    def prefill(self, ids: Any) -> None:
        """Forget all, then read a prompt for each sequence, [batch, tokens], and choose its first token."""
        self._rewind()
        self._feed(ids)

    def _launch(self) -> None:
        self._feed(self.token)

    def _feed(self, ids: Any) -> None:
        said = self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        # A replay writes where the captured step wrote.
        self._logits = said.logits[:, -1]
        self.token.copy_(self._logits.argmax(dim=-1, keepdim=True))

    def _rewind(self) -> None:
        # What lies beyond the count is masked, so it may stay.
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()

    def _beginning(self, step: Step) -> list[Any]:
        """The logits after each of the first ids of the vocabulary, [batch, vocabulary]."""
        self._rewind()
        found = []
        for number in range(min(CHECKED_STEPS, self.size[1])):
            self.token.fill_(number)
            step()
            found.append(self._logits.float().clone())
        return found


def _fixed_cache(config: Any, room: int) -> Any:
    """A cache whose place for the next token is counted on the device, so that a replayed step finds it.

    A layer with a window as long as the text keeps the whole text like any other; a shorter one rolls its keys by a
    count of Python's, which a graph does not hold.
    """
    from transformers import StaticCache
    from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

    class Layer(StaticLayer):
        """Attends in a prompt to the prompt alone, as a cache that grows does: what lies behind it is empty."""

        def update(self, key_states: Any, value_states: Any, *rest: Any, **named: Any) -> tuple[Any, Any]:
            held = super().update(key_states, value_states, *rest, **named)
            return held if key_states.shape[-2] == 1 else (key_states, value_states)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return super().get_mask_sizes(query_length) if query_length == 1 else (query_length, 0)

    meant: list[Any] = StaticCache(config=config, max_cache_len=room).layers
    if any(type(each) not in (StaticLayer, StaticSlidingWindowLayer) for each in meant):
        raise ValueError("it keeps more than keys and values")
    if any(each.max_cache_len < room for each in meant):
        raise ValueError(f"it attends to fewer than {room} tokens in some layers")
    return Cache(layers=[Layer(room) for _ in meant])


def _captured(step: Step, rewind: Step) -> Step:
    """The step as a graph that is replayed. Captured after it ran on a side stream, as torch asks: libraries make their
    handles and choose their kernels then."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP_STEPS):
            rewind()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Step = graph.replay
    return replay
