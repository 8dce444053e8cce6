"""YAML by the safe loader: no key twice, few aliases, no deep nesting."""

from __future__ import annotations

from typing import Any

import yaml

from workbench.errors import UserError

MAX_BYTES = 200_000
MAX_ALIASES = 20
"""A YAML bomb needs nested aliases; people need none or a few."""
MAX_DEPTH = 32
"""The parser's time grows with the square of the depth: 100,000 brackets take minutes."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    # Before a merge (`<<`) is spelt out, because what is merged may be given again.
    own: set[str] = set()
    for key_node, _ in node.value:
        word = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if word is None or word in own:
            problem = "a key must be a word" if word is None else f"'{word}' is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        own.add(word)
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    try:
        aliases = depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if aliases > MAX_ALIASES:
                raise UserError(f"{where}: a recipe may have {MAX_ALIASES} YAML aliases at most")
            if depth > MAX_DEPTH:
                raise UserError(f"{where}: a recipe may be {MAX_DEPTH} levels deep at most")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
