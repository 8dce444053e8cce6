"""How a variant is made. A method is one module and one line here; the recipe's word is the key.

A method module has, readable by the parent without any engine: `Options` (a frozen dataclass: the recipe's
keys), `FORMAT`, `default_name(options)`, `needs_calibration(options)` and `limits(options)` (backend name ->
why that engine cannot load what these options make).
"""

METHODS = {
    "gguf": "workbench.worker.methods.gguf",
    "awq": "workbench.worker.methods.awq",
    "gptq": "workbench.worker.methods.gptq",
}
