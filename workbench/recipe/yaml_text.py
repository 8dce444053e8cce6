"""YAML by the safe loader, and no more than JSON could say: no key twice, few aliases, no deep nesting."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from workbench.errors import UserError, short

MAX_BYTES = 200_000
MAX_ALIASES = 20
"""A YAML bomb needs nested aliases; people need none or a few."""
MAX_DEPTH = 32
"""The parser's time grows with the square of the depth: 100,000 brackets take minutes."""
MAX_VALUES = 10_000
"""Keys among them, and aliases spelt out: to read as many takes a second. `VALUE_LETTERS` of a text count as one."""
VALUE_LETTERS = 40
MAX_DIGITS = 40
"""Of a number; the time to read one grows with their square."""
NO_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters and halves of characters, which an escape in quotes can write."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice, and knows JSON's types only."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    def refuse(problem: str, key: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)

    own: set[str] = set()
    for key, _ in node.value:
        # Before a merge (`<<`) is spelt out, because what is merged may be given again.
        if isinstance(key, yaml.ScalarNode):
            if key.value in own:
                refuse(f"'{short(key.value)}' is given twice", key)
            own.add(key.value)
    loader.flatten_mapping(node)
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            refuse("a key must be a word", key)
        found[key.value] = loader.construct_object(value, deep=True)
    return found


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    if len(node.value) > MAX_DIGITS:
        problem = f"a number of more than {MAX_DIGITS} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    kind = yaml.SafeLoader.construct_yaml_int if node.tag.endswith(":int") else yaml.SafeLoader.construct_yaml_float
    return kind(loader, node)


_SAFE = yaml.SafeLoader.yaml_constructors
_CORE = "tag:yaml.org,2002:"
_Loader.yaml_constructors = {
    **{f"{_CORE}{kind}": _SAFE[f"{_CORE}{kind}"] for kind in ("null", "bool", "str", "seq")},
    **{f"{_CORE}{kind}": _number for kind in ("int", "float")},
    f"{_CORE}map": _mapping,
    # A date is a word.
    f"{_CORE}timestamp": _SAFE[f"{_CORE}str"],
    None: yaml.SafeLoader.construct_undefined,
}


def parse_yaml(text: str, where: str) -> Any:
    try:
        for fault in _faults(text):
            raise UserError(f"{where}: a recipe may {fault}")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {short(error.problem or error, 120)}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {short(str(error).splitlines()[0], 120)}") from None


def _faults(text: str) -> Iterator[str]:
    """What a text has that no recipe may, found before anything is made of it."""
    aliases = size = 0
    held: dict[str | None, int] = {}
    """Anchor -> the size of what it stands for."""
    inside: list[tuple[str | None, int]] = []
    """Anchors of the collections that are open, and the size at which each began."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        before = size
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            size += held.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            size += 1 + len(event.value) // VALUE_LETTERS
            held[event.anchor] = size - before
            if found := NO_TEXT.search(event.value):
                line = f" (line {event.start_mark.line + 1})" if event.start_mark else ""
                yield f"not hold the character U+{ord(found[0]):04X}, which is no text{line}"
        elif isinstance(event, yaml.CollectionStartEvent):
            size += 1
            inside.append((event.anchor, before))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, begun = inside.pop()
            held[anchor] = size - begun
        if aliases > MAX_ALIASES:
            yield f"have {MAX_ALIASES} YAML aliases at most"
        if len(inside) > MAX_DEPTH:
            yield f"be {MAX_DEPTH} levels deep at most"
        if size > MAX_VALUES:
            yield f"hold {MAX_VALUES:,} values at most, aliases spelt out"
