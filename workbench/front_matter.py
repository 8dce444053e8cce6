"""The front matter of a model card: the YAML between two lines of dashes on top of its README.md, which hubs and
converters read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from workbench.errors import importing


def block(fields: Mapping[str, str | list[str] | None]) -> str:
    """The block as text, ready to be followed by the card; what is None is left out.

    Raises `UserError` where huggingface_hub is missing.
    """
    with importing("huggingface_hub, which writes model cards,", "pip install huggingface_hub"):
        from huggingface_hub import ModelCardData
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"  # type: ignore[arg-type]


def fields_of(card: Path) -> Mapping[str, object]:
    """What a card's block says; nothing where there is no card, or none that can be read."""
    try:
        import yaml
        from huggingface_hub import metadata_load
    except ImportError:
        return {}
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # Not there, not UTF-8, not YAML, or no mapping.
        return {}


def stated_licence(card: Path) -> str | None:
    """The licence that a card states, by its own name where the hub has no word for it."""
    fields = fields_of(card)
    stated = fields.get("license_name") if fields.get("license") == "other" else fields.get("license")
    return stated if isinstance(stated, str) else None
