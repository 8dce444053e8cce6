"""Pages that the code writes: every command's help from the command line's own tree, every recipe key from the schema
that editors read. `conf.py` calls `write` before each build, so that neither page can be older than the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from workbench.cli import app
from workbench.recipe.json_schema import schema

SECTIONS = {
    "Base": "base",
    "Equivalent": "equivalent",
    "Calibration": "calibration",
    "EvaluationModel": "evaluation",
    "Source": "source",
    "TaskModel": "tasks",
    "WorkloadModel": "workload",
    "Limits": "limits",
    "TokenPrice": "price",
}
"""Headings of the parts of a recipe, in the order of the page."""
WIDTH = 100
"""Columns of the help texts."""


def write(folder: Path) -> None:
    """Write the pages into a folder."""
    folder.mkdir(exist_ok=True)
    for name, lines in {"commands.md": commands(), "recipe.md": recipe(schema())}.items():
        text = "\n".join(lines) + "\n"
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def commands() -> Iterator[str]:
    """A heading and the help of each command, as the terminal shows it at `WIDTH` columns."""
    yield from ("# Commands", "", "What `workbench COMMAND --help` prints.")
    top = typer.main.get_command(app)
    whole = typer.Context(top, info_name="workbench", terminal_width=WIDTH, help_option_names=["-h", "--help"])
    yield from ("", "```text", top.get_help(whole).rstrip(), "```")
    for path, command in _leaves(top, ()):
        context = typer.Context(command, whole, " ".join(path))
        yield from ("", f"## {' '.join(path)}", "", "```text", command.get_help(context).rstrip(), "```")


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
    for name, each in (inner or {}).items():
        yield from _leaves(each, (*path, name))


def recipe(whole: dict[str, Any]) -> Iterator[str]:
    """A table of keys for each part of a recipe."""
    parts = whole["$defs"]
    yield from ("# Recipe keys", "", "A recipe is a YAML mapping with these keys; `base` and `variants` must be there.")
    first = {name: whole["properties"][name] for name in ("name", "model", "base", "variants", "backends")}
    keys = first | whole["properties"]
    yield from _table({**whole, "properties": {name: _top(name, key) for name, key in keys.items()}})
    for name, heading in SECTIONS.items():
        yield from _section(heading, parts[name])
        if name == "Equivalent":
            yield from _variants(whole["properties"]["variants"]["items"]["anyOf"])
    yield from ("", "## backends", "", "Engines by name, each with options (or none) and `variants`: names or patterns")
    yield "such as `gguf-*` that it runs, default all. A list of such gives variants options of their own."
    yield "A list of names does where no options are needed."
    for name in whole["properties"]["backends"]["anyOf"][0]["properties"]:
        yield from _section(name, parts[name])
    yield from _section("endpoints", whole["properties"]["endpoints"]["anyOf"][0]["additionalProperties"])


def _top(name: str, key: dict[str, Any]) -> dict[str, Any]:
    links = {"variants": "How the model is quantized: a list.", "backends": "The engines; default: all three."}
    links |= {"endpoints": key["description"]} if name == "endpoints" else {}
    return {"description": links[name], "see": name} if name in links else key


def _variants(forms: list[dict[str, Any]]) -> Iterator[str]:
    yield from (
        "",
        "## variants",
        "",
        "A list; each entry is a method's name, or the name with its options, and may have a",
    )
    yield "`name` of its own. The base itself is always there."
    for form in forms:
        for method, options in form.get("properties", {}).items():
            if method != "name":
                yield from _section(method, options["anyOf"][0])


def _section(heading: str, part: dict[str, Any]) -> Iterator[str]:
    yield from ("", f"## {heading}", "", part.get("description", ""))
    yield from _table(part)


def _table(part: dict[str, Any]) -> Iterator[str]:
    yield from ("", "| key | takes | default | what |", "| --- | --- | --- | --- |")
    required = part.get("required", [])
    for name, key in part["properties"].items():
        default = key.get("default")
        said = (
            "required"
            if name in required
            else ""
            if default in (None, []) or isinstance(default, dict)
            else _word(default)
        )
        yield f"| `{name}` | {_takes(key)} | {said} | {_description(key)} |".replace("  ", " ")


def _description(key: dict[str, Any]) -> str:
    forms = [key, *key.get("anyOf", []), *key.get("oneOf", [])]
    return next((form["description"] for form in forms if "description" in form), "").replace("|", "\\|")


def _word(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _takes(key: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "see" in key or "$ref" in key:
        heading = key.get("see") or SECTIONS[key["$ref"].rpartition("/")[2]]
        return f"[{heading}](#{heading})"
    forms = [form for form in (*key.get("anyOf", []), *key.get("oneOf", [])) if form.get("type") != "null"]
    if forms:
        return ", or ".join(dict.fromkeys(map(_takes, forms)))
    if "const" in key or "enum" in key:
        return ", ".join(_word(value) for value in key.get("enum", [key.get("const")]))
    kind = key.get("type")
    if kind == "array":
        return f"a list of: {_takes(key.get('items', {}))}"
    if kind == "object":
        inner = key.get("additionalProperties") or next(iter(key.get("patternProperties", {}).values()), None)
        return f"names, each with: {_takes(inner)}" if isinstance(inner, dict) else "a mapping"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return words.get(str(kind), "anything") + _range(key)


def _range(key: dict[str, Any]) -> str:
    low, over = (
        key.get("exclusiveMinimum", key.get("minimum")),
        ", more than" if "exclusiveMinimum" in key else ", from",
    )
    high = key["exclusiveMaximum"] - 1 if "exclusiveMaximum" in key else key.get("maximum")  # of whole numbers only
    return (f"{over} {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
