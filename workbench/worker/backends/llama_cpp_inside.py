"""llama-cpp-python's own server with one address more, as a program: what its model computes of token ids.

`python -m workbench.worker.backends.llama_cpp_inside` is `python -m llama_cpp.server`, by the package's own program and
under its words. Its API takes text alone, which is not every window of ids: what is cut inside a word, or begins
without the blank that SentencePiece adds, is other tokens. What it tells of a prompt (`echo`) is told by the text of
tokens, of which many have the same, and is a place off where the file adds no mark of a text's beginning. So
`/workbench/logits` takes ids and gives the logits as they are, in the server's turn and by the server's model.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


def rows(model: Any, ids: list[int], first: int, last: int, grow: bool) -> bytes:
    """Logits of positions `first` to `last - 1` of these ids, [last - first, vocabulary] float32, by a `Llama` that
    keeps those of all it has computed. Ids that it has just computed are not computed again; `grow`: nor are those
    that it has the beginning of, else they are computed in one piece."""
    kept = model.input_ids[: model.n_tokens].tolist()
    if kept != ids:
        if not grow or kept != ids[: len(kept)]:
            model.reset()
            kept = []
        model.eval(ids[len(kept) :])
    found: bytes = model.scores[first:last].tobytes()
    return found


def main() -> None:
    """The server, until it is ended."""
    from llama_cpp.server import __main__ as program
    from llama_cpp.server import app
    from llama_cpp.server.settings import Settings
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import Response

    async def logits(request: Any) -> Any:
        asked = await request.json()
        async with contextlib.asynccontextmanager(app.get_llama_proxy)() as models:
            return Response(await run_in_threadpool(rows, models(None), **asked))

    app.router.add_route("/workbench/logits", logits, ["POST"])
    # It takes every setting from a variable of that name too, and its host and port before those of its own words.
    named = {name.casefold() for name in Settings.model_fields} | {"config_file"}
    for name in [name for name in os.environ if name.casefold() in named]:
        del os.environ[name]
    program.main()


if __name__ == "__main__":
    main()
