"""Tasks of lm-evaluation-harness on our backends: a thin `LM` over what every backend can do.

The harness makes the prompts, asks `loglikelihood` or `generate_until`, and judges; here its text becomes token ids
by its own rules (`TemplateLM`), and ids are answered by the same scoring that perplexity is measured with and by the
same greedy completion. So its numbers are comparable between engines, and an engine it has no model class for needs
none. It has to be installed beside the engine, and its data sets in the hub's cache: workers are offline.

Rejected: its own model classes (they load the model once more, each with another tokenizer and other defaults).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing
from workbench.records import Answers
from workbench.worker.tokens.tasks import TaskFile

METRICS = ("acc", "exact_match", "acc_norm", "em", "f1")
"""What an item is judged by: the first of these that the task has, or its first number."""
NEW_TOKENS = 256
"""New tokens of an answer whose task sets no limit, as the harness has it."""


def run(engine: Any, content: TaskFile, tokenizer: Path) -> Answers:
    """One task of the harness; `tasks.answer` says what is returned, here with the `metric` that judged."""
    with importing("lm-evaluation-harness", "pip install lm-eval"):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    wanted = content["harness"]
    name = wanted["lm_eval"]
    manager = TaskManager(include_path=wanted.get("include"))
    if name not in manager.all_tasks:
        raise UserError(f"task '{name}': lm-evaluation-harness knows no task of that name (lm_eval --tasks list)")
    lm = adapter(engine, content, tokenizer)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=[name],
            num_fewshot=wanted.get("shots"),
            limit=wanted.get("limit"),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (ConnectionError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"task '{name}': its data cannot be read ({text}). Workers are offline: run `lm_eval --model dummy "
            f"--tasks {name} --limit 1` once, which fetches them"
        ) from None
    if len(found["samples"]) != 1:
        names = ", ".join(sorted(found["samples"]))
        raise UserError(f"task '{name}' is a group; name its members one by one: {names[:200]}")
    (samples,) = found["samples"].values()
    # One line an item and filter; the first filter is the one it prints first.
    filters = dict.fromkeys(sample.get("filter") for sample in samples)
    samples = [sample for sample in samples if sample.get("filter") == next(iter(filters), None)]
    samples.sort(key=lambda sample: sample["doc_id"])
    metric = _metric(samples)
    correct = [float(sample[metric]) for sample in samples]
    given = [str(sample.get("filtered_resps"))[:80] for sample in samples]
    warnings = [f"{lm.cut} prompts were longer than {lm.longest} tokens and lost their start"] if lm.cut else []
    return {"correct": correct, "given": given, "metric": metric, "warnings": warnings}


def _metric(samples: list[dict[str, Any]]) -> str:
    first = samples[0] if samples else {}
    own = {"doc_id", "filter"}
    numbers = [name for name, value in first.items() if isinstance(value, int | float) and name not in own]
    chosen = next((name for name in (*METRICS, *numbers) if name in numbers), None)
    if chosen is None:
        raise UserError("the task gives no number for a single item, so it cannot be compared; choose another")
    return chosen


def adapter(engine: Any, content: TaskFile, tokenizer: Path) -> Any:
    """An `lm_eval.api.model.LM` that answers by a backend; `cut` counts prompts that were too long."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    from workbench.worker.measure import likelihoods

    spelling = likelihoods.decoder_of(tokenizer)
    bos, stop, longest = content["bos"], content["stop"], content["longest"]

    class Adapter(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.longest = 0, longest

        @property
        def eot_token_id(self) -> int:
            return int(stop[0] if stop else bos or 0)

        @property
        def prefix_token_id(self) -> int:
            return int(bos if bos is not None else self.eot_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = list(spelling.encode(string, add_special_tokens=False).ids)
            wanted = add_special_tokens is not False and ids[:1] != [bos]
            return [bos, *ids] if bos is not None and wanted else ids

        def _fit(self, ids: list[int], room: int) -> list[int]:
            if len(ids) <= room:
                return ids
            self.cut += 1
            return ids[-room:]

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            asked = []
            for _text, context, continuation in requests:
                ids = self._fit([*context, *continuation], longest)
                asked.append((ids, len(ids) - len(continuation) - 1))
            found = likelihoods.log_likelihoods(engine, asked, content["vocab_size"])
            return [(float("-inf") if total is None else total, greedy) for total, greedy in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            asked, counts = [], []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, longest - 1, 1)
                pairs = [utils.make_disjoint_window(pair) for pair in windows]
                asked += [([*context, *rest], len(context) - 1) for context, rest in pairs]
                counts.append(len(pairs))
            found = iter(likelihoods.log_likelihoods(engine, asked, content["vocab_size"]))
            sums = [[next(found)[0] for _ in range(count)] for count in counts]
            return [float("-inf") if None in each else sum(one or 0.0 for one in each) for each in sums]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            prompts, most, untils = [], [], []
            for request in requests:
                text, options = request.args
                until = options.get("until") or []
                untils.append([until] if isinstance(until, str) else list(until))
                most.append(min(int(options.get("max_gen_toks") or NEW_TOKENS), longest // 2))
                prompts.append(self._fit(self.tok_encode(text), longest - most[-1]))
            answers = engine.complete(prompts, most, stop)
            texts = [spelling.decode(ids, skip_special_tokens=True) for ids in answers]
            return [_before(text, until) for text, until in zip(texts, untils, strict=True)]

    return Adapter()


def _before(text: str, until: list[str]) -> str:
    return text[: min([place for word in until if word and (place := text.find(word)) >= 0], default=len(text))]
