"""A server that somebody else started, as far as it can be scored and asked: by what it tells, found by asking it once.

    llama-server    all that may come next, at its own address: perplexity and divergence
    vLLM            a prompt's own tokens; with `--max-logprobs -1` all that may come next too
    others          a prompt's own tokens by `echo` and `logprobs`: perplexity
    llama_cpp.server   the same of texts, where its file adds a mark of a text's beginning

Each is asked with token ids, or with a text that it reads as these ids, so that it is scored on what every engine is
scored on; a server that does neither, or tells nothing of a prompt, is not scored, and its row says why. So are tasks:
prompts as ids where they are taken, chats as messages, which its own template makes a prompt of.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import UserError
from workbench.records import Job, Quality, from_json
from workbench.worker.backends import next_token
from workbench.worker.backends.served import NotScored, answer_of, in_chat
from workbench.worker.scoring.reducer import Scoring, of_losses
from workbench.worker.tokens.spelling import as_spelt, check_spelling

if TYPE_CHECKING:
    from workbench.serving.likelihoods import Own

MOST_BYTES = 1 << 28
"""Of an answer with a whole vocabulary, or with a log-probability for each token of a long prompt."""
TRIED = 16
"""Tokens that it is asked with to find out what it tells."""
BUSY_S = (1.0, 4.0, 15.0, 60.0)
"""How long is waited for a server that takes no more."""
OWN_ALONE = "the server tells the log-probabilities of a prompt's own tokens alone"
Progress = Callable[[int], object]
Way = Callable[[Scoring, Progress], Quality]


@dataclass(frozen=True)
class Asked:
    """How it wants to be asked, as was found before."""

    url: str
    model: str
    api: str = "completions"
    api_key_env: str | None = None


class Engine:
    """A server by its address; what it tells is found when it is first needed. Every fault of it is a `NotScored`."""

    def __init__(self, job: Job) -> None:
        from workbench.serving.address import address_of
        from workbench.serving.client import Client

        self._asked: Asked = from_json(Asked, job.options)
        self._variant = job.artifact.variant
        self._runner = asyncio.Runner()
        self._client = Client(address_of(self._asked.url, self._asked.api_key_env))
        self._runner.run(self._client.__aenter__())
        self._way: Way | None = None
        self._why_not = self._tells = ""
        self._doubts: list[str] = []

    def close(self) -> None:
        """End its connections."""
        self._runner.run(self._client.__aexit__())
        self._runner.close()

    def settings(self) -> dict[str, object]:
        """What it was scored by."""
        return {"quality by": self._tells} if self._tells else {}

    def doubts(self) -> list[str]:
        """What is to be known of its quality."""
        return self._doubts

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """Not asked for itself: what it tells of the first window spells ids too."""
        return None

    def score(self, asked: Scoring, progress: Progress) -> Quality:
        """By what it tells. Raises `NotScored` with the reason where that is not enough."""
        try:
            if self._why_not:
                raise NotScored(self._why_not)
            self._way = self._way or self._found(asked)
            return self._way(asked, progress)
        except RuntimeError as reason:
            raise NotScored(str(reason)) from None

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """Answers in ids, which few servers have: not asked for."""
        raise NotScored("it would have to answer in token ids, which is not asked of a server of somebody else's")

    def say(self, prompts: list[list[int]], new_tokens: list[int]) -> list[str]:
        """The text that it continues each prompt with. Raises `NotScored`."""
        if self._asked.api != "completions":
            raise NotScored("the server only chats: give the task `chat: true`")
        pairs = zip(prompts, new_tokens, strict=True)
        return [answer_of(self._post("/completions", self._body(ids, max_tokens=most))) for ids, most in pairs]

    def chat(self, messages: list[str], new_tokens: list[int]) -> list[str]:
        """What it answers to each message, in its own template. Raises `NotScored`."""
        pairs = zip(messages, new_tokens, strict=True)
        asked = [in_chat(self._asked.model, text, most) for text, most in pairs]
        return [answer_of(self._post("/chat/completions", each)) for each in asked]

    def _found(self, asked: Scoring) -> Way:
        """How it is scored, found with the first window. Raises `NotScored` where it tells nothing."""
        from workbench.serving.likelihoods import OURS

        if self._asked.api != "completions":
            self._why_not = "the server only chats, and tells nothing of a prompt's tokens"
            raise NotScored(self._why_not)
        ways: dict[str, Callable[[], Way]] = {"n_probs": lambda: self._whole_by_llama_server(asked)}
        ways |= {dialect: functools.partial(self._by_own_tokens, asked, dialect) for dialect in OURS}
        ways |= {"echo of text": lambda: self._by_text(asked)}
        tried = []
        for name, way in ways.items():
            try:
                return way()
            except (NotScored, RuntimeError) as reason:
                tried.append(f"{name}: {reason}")
            except UserError as reason:
                # Its tokens are others': nothing of it is comparable, whoever is asked how.
                self._why_not = str(reason)
                raise NotScored(self._why_not) from None
        self._why_not = f"the server tells no log-probabilities of a prompt in token ids ({'; '.join(tried)})"
        raise NotScored(self._why_not)

    def _whole_by_llama_server(self, asked: Scoring) -> Way:
        from workbench.serving.native import likely_next, plain_token

        plain = plain_token(self._native)
        found = likely_next(self._native, asked.tokens.windows[0][:TRIED], plain)
        next_token.row([(each.id, each.logprob) for each in found], asked.tokens.vocab_size)
        self._check(asked, {each.id: each.token for each in found})
        self._tells = "n_probs of the whole vocabulary"

        def score(asked: Scoring, progress: Progress) -> Quality:
            quality, doubts = next_token.by_llama_server(asked, progress, self._native)
            self._doubts = self._doubts or doubts
            return quality

        return score

    def _by_own_tokens(self, asked: Scoring, dialect: str) -> Way:
        ids = asked.tokens.windows[0]
        own = self._own_tokens(dialect, ids)
        self._check(asked, dict(zip(ids[1:], (each.text for each in own), strict=True)))
        self._tells = dialect
        if dialect == "prompt_logprobs":
            try:
                next_token.row(self._next(ids[:TRIED], asked.tokens.vocab_size), asked.tokens.vocab_size)
            except (NotScored, RuntimeError) as reason:
                why = f"vLLM tells all that may come next if started with --max-logprobs -1 ({reason})"
            else:
                self._tells = "logprobs of the whole vocabulary"
                return self._whole_by_vllm
        else:
            why = OWN_ALONE
        return self._of_own_tokens(functools.partial(self._own_tokens, dialect), why)

    def _of_own_tokens(self, told: Callable[[list[int]], Sequence[Own | None]], why: str) -> Way:
        """By what is `told` of every id of a window but the first; `why` there is no divergence."""
        self._doubts = [f"no divergence: {why}"]

        def score(asked: Scoring, progress: Progress) -> Quality:
            losses = []
            for index, ids, first in asked.windows:
                progress(index)
                scored = [own for own in told(ids)[first:] if own]
                if len(scored) < len(ids) - 1 - first:
                    raise NotScored("nothing is told of a window's first tokens: take `score: second-half`")
                losses.append(([-each.logprob for each in scored], [each.likeliest for each in scored]))
            return of_losses(asked, losses)

        return score

    def _by_text(self, asked: Scoring) -> Way:
        from workbench.serving.by_text import ECHO, Otherwise, echoed, text_of
        from workbench.serving.faults import Fault

        def told(ids: list[int]) -> list[Own | None]:
            try:
                text = text_of(self._native, ids)
                own = echoed(ids, self._post("/completions", self._body(text, max_tokens=1, **ECHO)))
            except Fault as fault:
                raise NotScored(str(fault)) from None
            self._check(asked, {token: each.text for token, each in zip(ids[1:], own, strict=True) if each})
            return own

        if asked.tokens.bos is None:
            # It leaves that mark out of what it echoes; without one it takes the first token for it.
            raise NotScored("what it echoes is a place off where a file adds no mark of a text's beginning")
        with contextlib.suppress(Otherwise):  # It may read the next one as it is.
            told(asked.tokens.windows[0])
        self._tells = "echo of text"
        return self._of_own_tokens(told, OWN_ALONE)

    def _whole_by_vllm(self, asked: Scoring, progress: Progress) -> Quality:
        def told(prefix: list[int]) -> next_token.Told:
            return self._next(prefix, asked.tokens.vocab_size)

        return next_token.score(asked, progress, "vLLM", told)

    def _own_tokens(self, dialect: str, ids: list[int]) -> list[Own]:
        from workbench.serving.faults import Fault
        from workbench.serving.likelihoods import OURS, own_tokens

        try:
            return own_tokens(dialect, ids, self._post("/completions", self._body(ids, max_tokens=1, **OURS[dialect])))
        except Fault as fault:
            raise NotScored(str(fault)) from None

    def _next(self, prefix: list[int], vocab_size: int) -> next_token.Told:
        from workbench.serving.faults import Fault
        from workbench.serving.likelihoods import next_ids

        asked = self._body(prefix, max_tokens=1, logprobs=vocab_size, return_tokens_as_token_ids=True)
        try:
            return next_ids(self._post("/completions", asked))
        except Fault as fault:
            raise NotScored(str(fault)) from None

    def _check(self, asked: Scoring, texts: dict[int, str | None]) -> None:
        """Raises `UserError` where ids mean something else to the server."""
        ours = {token: piece for token, piece in asked.tokens.spelling.items() if int(token) in texts}
        told = [as_spelt(piece, texts[int(token)]) for token, piece in ours.items()]
        check_spelling(ours, lambda _: told, self._variant)

    def _body(self, prompt: list[int] | str, **more: object) -> dict[str, object]:
        return {"model": self._asked.model, "prompt": prompt, "temperature": 0, **more}

    def _native(self, path: str, body: object) -> bytes:
        return self._post(self._client.address.root + path, body)

    def _post(self, path: str, body: object) -> bytes:
        """What it answers; one that takes no more for now is waited for. Raises `NotScored`."""
        from workbench.serving.faults import Busy, Fault

        for wait_s in (*BUSY_S, None):
            try:
                return self._runner.run(self._client.ask(path, body, MOST_BYTES))
            except Busy as fault:
                if wait_s is None:
                    raise NotScored(self._client.address.without_key(str(fault))) from None
                time.sleep(wait_s)
            except Fault as fault:
                raise NotScored(self._client.address.without_key(str(fault))) from None
        raise AssertionError("the last wait is none")
