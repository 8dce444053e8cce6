"""What `test_encode.py` runs in a child: every mixture asked for, made by both encoders, and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def both(payload: Any, progress: Any) -> list[dict[str, Any]]:
    """Payload: `source` (GGUF file), `matrix` (file), `folder`, `mixtures`, `ids` (to ask the model, if any).

    A reply for every mixture, without and with the importance matrix: the two workers' answers and files.
    """
    from tests.worker.engine_logits import llama_logits
    from workbench.worker.methods import gguf

    made = []
    for kind in payload["mixtures"]:
        for matrix in (None, payload["matrix"]):
            reply: dict[str, Any] = {"type": kind, "imatrix": bool(matrix)}
            for encoder in ("llamacpp", "workbench"):
                out = Path(payload["folder"]) / f"{kind}-{bool(matrix)}-{encoder}.gguf"
                job = {"source": payload["source"], "out": str(out), "type": kind, "imatrix": matrix, "threads": 1}
                answer = gguf.quantize({**job, "encoder": encoder}, progress)
                reply[encoder] = {**answer, "path": str(out)}
            if payload.get("ids"):
                reply["logits"] = llama_logits({"path": reply["workbench"]["path"], "ids": payload["ids"]}, progress)
            made.append(reply)
    return made
