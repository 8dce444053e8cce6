"""The engines. A backend is one module and one line here; the recipe's word is the key.

A backend module has, readable by the parent without its engine: `Options` (a frozen dataclass: the recipe's
keys), `PACKAGES` (distributions whose versions identify it), `INSTALL` (the command), `FORMATS`,
`unsupported(artifact, cuda)` (why a pair cannot run, or None), `ENVIRONMENT` (for its worker), and

    def load_engine() -> object     imports the engine; so that importing is not counted as loading the model
    class Backend:
        def __init__(self, job)     loads the model
        def score(self, windows, spec)      what `quality.Reducer(spec).result()` says of all windows
        def generate(self, prompts, new_tokens)   yields the tokens gained by each sequence, step by step
        def memory(self)            bytes, as the engine itself states them
        def settings(self)          dtype, threads, kernels: what it really runs with
        def close(self)

A backend speaks token ids only and holds no clock. `score` takes the reducer's JSON spec instead
of yielding logits, because vLLM's logits are born in a process of its own, where the reducer must be built.
"""

import os

BACKENDS = {
    "transformers": "workbench.worker.backends.transformers",
    "vllm": "workbench.worker.backends.vllm",
    "llamacpp": "workbench.worker.backends.llamacpp",
}

if os.environ.get("WORKBENCH_FAKE_BACKEND"):
    # For tests of what a real engine cannot be made to do on demand; never offered to people.
    BACKENDS["fake"] = "workbench.worker.backends.fake"
