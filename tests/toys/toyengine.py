"""A toy backend: transformers' forward in float32, without a cache, of the base and of what `rtn` makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.records import Artifact, Job, Quality, Row, from_json
from workbench.shape import EngineMemory, Sequences, Shape, Stored
from workbench.worker.scoring.reducer import Scoring

WORD = "Toy engine"
MODULE = "torch"
PACKAGES: tuple[str, ...] = ("torch",)
INSTALL = "pip install a toy"
LOADS: tuple[str, ...] = ("safetensors", "rtn")
ENVIRONMENT: dict[str, str] = {}
AXES: tuple[str, ...] = ("attention",)
MAKES_REFERENCE = False


@dataclass(frozen=True)
class Options:
    """A toy."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    attention: Literal["sdpa", "eager"] = "sdpa"
    """Whose."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """It loads two formats."""
    return None if artifact.format in LOADS else f"the toy does not read {artifact.format}"


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """Nothing."""
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """Float32 and nothing beside it."""
    return EngineMemory(shape.parameters * 4, 0, 12345, 1000)


def serving_command(path: str, row: Row) -> list[str] | None:
    """A server that there is not."""
    return ["toy-server", path, "--attention", str(row.options["attention"])]


def sees_cuda(payload: None, progress: object) -> bool:
    """It computes on a CPU."""
    return False


def load_engine() -> Any:
    """torch."""
    import torch

    return torch


class Engine:
    """One model."""

    continuous = False

    def __init__(self, job: Job) -> None:
        import transformers
        from safetensors.torch import load_file

        self._torch = torch = load_engine()
        path = Path(job.artifact.path)
        how: Options = from_json(Options, job.options)
        config = transformers.AutoConfig.from_pretrained(path)
        weights = {name: w for file in sorted(path.glob("*.safetensors")) for name, w in load_file(file).items()}
        if job.artifact.method == "rtn":
            from workbench.worker.methods.rtn import rounded

            for name in [name for name in weights if name.startswith("model.layers.") and weights[name].dim() == 2]:
                if name.endswith(".weight"):
                    codes, scale = rounded(weights.pop(name), 8)
                    weights[name] = codes * scale
                elif name.endswith(".codes"):
                    weights[name.removesuffix(".codes")] = weights.pop(name) * weights.pop(name[:-5] + "scale")
        self._model = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=config, state_dict=weights, attn_implementation=how.attention, dtype=torch.float32
        )
        self._model.eval()

    def _logits(self, ids: list[list[int]]) -> Any:
        with self._torch.inference_mode():
            return self._model(input_ids=self._torch.tensor(ids), use_cache=False).logits

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """A forward a window."""
        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            progress(index)
            reducer(index, first, self._logits([ids])[0, first:])
        return reducer.result()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """The whole prompt again for every token."""
        prompts = [list(ids) for ids in prompts]
        for _ in range(new_tokens):
            for ids, token in zip(prompts, self._logits(prompts)[:, -1].argmax(-1).tolist(), strict=True):
                ids.append(token)
            yield [1] * len(prompts)

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """One after the other."""
        for ids, most in zip(prompts, new_tokens, strict=True):
            for gained in self.generate([ids], most):
                yield sum(gained)

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """It is asked no tasks."""
        raise NotImplementedError

    def spell(self, ids: list[int]) -> None:
        """It has no words."""

    def memory(self) -> dict[str, int]:
        """Float32."""
        return {"weights": self._model.get_memory_footprint()}

    def settings(self) -> dict[str, object]:
        """A CPU."""
        return {"device": "cpu", "dtype": "float32"}
