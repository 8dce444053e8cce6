"""What a server is and how it wants to be asked, found by asking it once."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from workbench.errors import UserError, did_you_mean, short
from workbench.serving.client import Client, Dialect, Wanted
from workbench.serving.faults import Fault, Gone, Refused
from workbench.serving.prompts import Prompts, characters_for
from workbench.serving.stream import How

PROBE_TOKENS = 8


class Model(msgspec.Struct):
    """One that a server has."""

    id: str


class Models(msgspec.Struct):
    """What it lists."""

    data: list[Model]


async def model_of(client: Client, wanted: str | None, key_variable: str | None) -> str:
    """The model to ask for: the one that is named, or the only one. Raises `UserError`, with the server's own list."""
    url = client.address.url
    try:
        listed = [model.id for model in msgspec.json.decode(await client.get("/models"), type=Models).data]
    except Gone as fault:
        raise UserError(f"{url}: {fault}. Start the server, or check the address") from None
    except Refused as fault:
        if fault.status in (401, 403):
            raise key_refused(key_variable) from None
        listed = []
    except (Fault, ValueError):
        raise UserError(f"{url}/models: no list of models. Check the address: most servers have it at /v1") from None
    if wanted is None and len(listed) == 1:
        return listed[0]
    if wanted is None:
        told = f"it has {', '.join(map(short, listed[:20]))}" if listed else "it lists none"
        raise UserError(f"{url}: name a model by --model: {told}")
    if listed and wanted not in listed:
        raise UserError(f"{url} has no model '{short(wanted)}'. {did_you_mean(wanted, map(short, listed))}")
    return wanted


async def dialect_of(client: Client, model: str, key_variable: str | None) -> Dialect:
    """How the server wants to be asked: by completions or else by chats, with what others understand or without. Raises
    `UserError` if it answers in no way."""
    tried: list[str] = []
    for dialect in (
        Dialect(model),
        Dialect(model, extras=False),
        Dialect(model, api="chat"),
        Dialect(model, api="chat", extras=False),
    ):
        try:
            event = await client.complete(dialect, "Once upon a time", 1)
        except Refused as fault:
            if fault.status in (401, 403):
                raise key_refused(key_variable) from None
            tried.append(f"{dialect.path}: {fault}")
        except Fault as fault:
            tried.append(f"{dialect.path}: {fault}")
        else:
            named = event.model or ""
            if named and not named.startswith(model):
                raise UserError(f"asked for '{short(model)}', '{short(named)}' answers: name that by --model")
            return replace(dialect, answers_as=named)
    raise UserError(
        f"{client.address.url} answers no request: {client.address.without_key('; '.join(dict.fromkeys(tried)))}"
    )


async def counting_of(client: Client, dialect: Dialect) -> tuple[Dialect, How]:
    """What its tokens can be counted by, and how it is asked so that they can. Raises `UserError` where they cannot."""
    errors = []
    for asked in (dialect, replace(dialect, by_length=True)):
        answer = await client.stream(asked, Wanted(Prompts(0).text(40), 10, PROBE_TOKENS))
        if answer.how:
            return replace(dialect, by_length=answer.how == "length"), answer.how
        errors.append(answer.request.error)
    raise UserError(f"{client.address.url} cannot be measured: {errors[0]}")


async def length_of(client: Client, dialect: Dialect, prompts: Prompts, tokens: int, new_tokens: int) -> int:
    """Characters of a prompt of so many tokens. Raises `UserError` where the server takes no such prompt."""

    async def count(text: str, answer: int = 1) -> int:
        event = await client.complete(dialect, text, answer)
        return event.usage.prompt_tokens if event.usage else 0

    try:
        characters = await characters_for(prompts, tokens, count)
        # A context that is too small says so before anything is timed.
        await count(prompts.text(characters), new_tokens)
        return characters
    except Fault as fault:
        told = client.address.without_key(str(fault))
        raise UserError(
            f"{client.address.url} takes no prompt of {tokens} tokens with an answer of {new_tokens} ({told}). Its "
            "context may be smaller: give it a larger one, or name smaller --prompt-tokens and --new-tokens"
        ) from None


def key_refused(variable: str | None) -> UserError:
    """The error for a server that wants a key, or another one."""
    if variable is None:
        return UserError("the server wants a key: put it into a variable and name that, --api-key-env VAR")
    return UserError(f"the server refuses the key in {short(variable)}: set the right one; it is never stored")
