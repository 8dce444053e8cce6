"""The engines. A backend is one module and one line here; the recipe's word is the key.

A backend module has, readable by the parent without its engine: `Options` (a frozen dataclass: the recipe's
keys), `PACKAGES` (distributions whose versions identify it), `INSTALL` (the command), `FORMATS`,
`unsupported(artifact, cuda)` (why a pair cannot run, or None), `ENVIRONMENT` (for its worker), and

    def load_engine() -> object     imports the engine; so that importing is not counted as loading the model
    class Backend:
        def __init__(self, job)     loads the model
        def score(self, windows, spec)      what `quality.Reducer(spec).result()` says of all windows
        def prepare(self, batch, tokens)    optional: make room for so many sequences of so many tokens
        def generate(self, prompts, new_tokens)   yields the tokens gained by each sequence, step by step
        def serve(self, prompts, new_tokens, slots)   yields the tokens gained by all in each step; so many for each
                                    prompt, so many prompts at once. `continuous`: a free slot is filled at once
        def complete(self, prompts, new_tokens, stop)   the likeliest continuation of each prompt (as ids), of at most
                                    so many tokens, without the first of `stop` and what follows it
        def spell(self, ids)        each id as the artifact's own vocabulary has it; None where it cannot be told
        def memory(self)            bytes, as the engine itself states them: `weights`, `kv_cache` at the workload's
                                    length, `workspace` where it knows; `kv_cache_reserved` if it reserves more
        def settings(self)          dtype, threads, kernels: what it really runs with
        def close(self)

A backend speaks token ids only and holds no clock. `score` takes the reducer's JSON spec instead
of yielding logits, because vLLM's logits are born in a process of its own, where the reducer must be built.
"""

from __future__ import annotations

import os

BACKENDS = {
    "transformers": "workbench.worker.backends.transformers",
    "vllm": "workbench.worker.backends.vllm",
    "llamacpp": "workbench.worker.backends.llamacpp",
}

if os.environ.get("WORKBENCH_FAKE_BACKEND"):
    # For tests of what a real engine cannot be made to do on demand; never offered to people.
    BACKENDS["fake"] = "workbench.worker.backends.fake"
