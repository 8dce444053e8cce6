"""A model card: the front matter that the hub reads, the measured table, and where the files come from.

The numbers are those of stored rows, the words those of the tables; nothing is claimed that was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from workbench.errors import UserError, unknown
from workbench.front_matter import block
from workbench.hub.licences import known_licence, refusal
from workbench.records import Row
from workbench.report.formats.markdown import markdown
from workbench.report.selection import evaluation_digest
from workbench.report.store import machine_of
from workbench.report.table import build
from workbench.worker.backends import serving_command
from workbench.worker.methods import BASE, METHODS, Method, method_named


def find(rows: Sequence[Row], variant: str, recipe: str | None = None) -> Row:
    """The newest row with an artifact of that variant, of its own format before those that it was carried to. Raises
    `UserError` with the nearest name."""
    own = [row for row in rows if row.artifact.path and recipe in (None, row.recipe)]
    made = [row for row in own if row.artifact.variant == variant and row.artifact.method != BASE]
    if not made:
        raise unknown(
            "variant", variant, {row.artifact.variant for row in own if row.artifact.method != BASE}, "results"
        )
    models = {row.base for row in made}
    if len(models) > 1:
        raise UserError(
            f"{variant} is there of {len(models)} bases ({', '.join(sorted(models))}): name one with --recipe"
        )

    def order(row: Row) -> tuple[bool, bool, str]:
        own = _method(row.artifact.method).WRITES[0] == row.artifact.format
        return row.measurement is not None, own, row.started_at

    return max(made, key=order)


def _method(word: str) -> Method:
    """The method of that word, or what the base says if none is."""
    return method_named(word if word in METHODS else BASE)


def base_model(row: Row) -> str | None:
    """The base's name on the hub, if it came from there."""
    source = row.artifact.provenance.get("source") or {}
    return source.get("hub")


def front_matter(row: Row, licence: str | None, author: str = "") -> dict[str, str | list[str]]:
    """What the hub reads of a card."""
    base = base_model(row)
    known = known_licence(licence)
    standard = known is not None and known.standard
    # What was carried is opened by what opens its format, which is called as that is where it is no method's.
    form = row.artifact.format
    method = _method(form if form in METHODS else row.artifact.method)
    library, tags = (form, (form,)) if form in method.WRITES[1:] else (method.LIBRARY, method.TAGS)
    fields = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "quantized_by": author or None,
        "license": known.id if known and standard else "other" if licence else None,
        "license_name": None if standard else licence,
        "license_link": known.link if known and not standard else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["quantized", *tags, "workbench"],
    }
    return {name: value for name, value in fields.items() if value is not None}


def card(rows: Sequence[Row], row: Row, licence: str | None = None, author: str = "") -> str:
    """The card of the artifact that `row` is of, with the rows of all engines beside the base's."""
    artifact = row.artifact
    base = base_model(row)
    shown = [
        each
        for each in rows
        if each.base == row.base
        and machine_of(each) == machine_of(row)
        and (each.artifact.digest == artifact.digest or (each.artifact.method == BASE and each.measurement))
        and not each.unsupported
        # Else the newest of the base's rows, of another recipe's text, would leave no room for the artifact's own.
        and (evaluation_digest(each), each.measurement_version) == (evaluation_digest(row), row.measurement_version)
    ]
    known = known_licence(licence)
    bits = f"{artifact.bits_per_weight:.2f} bits a weight, " if artifact.bits_per_weight else ""
    of = f"[{_text(base)}](https://huggingface.co/{_link(base)})" if base else _text(row.base)
    lines = [
        block(front_matter(row, licence, author)),
        f"# {_text(row.base)}, {_text(artifact.variant)}",
        "",
        f"A quantized form of {of}: {bits}{artifact.disk_bytes / 2**20:,.1f} MiB of weights, format {artifact.format}.",
    ]
    lines += [f"\n- {_text(warning)}" for warning in artifact.warnings]
    name = artifact.path.rstrip("/").rpartition("/")[2]
    # Not with the threads and the memory of the machine that it was measured on.
    command = serving_command(replace(row, artifact=replace(artifact, path=name), measurement=None))
    if command:
        lines += ["", "```sh", command.replace("`", "'"), "```"]
    if any(each.measurement for each in shown):
        lines += ["", "## Measured", "", markdown(build(shown)).strip()]
    lines += ["", "## Where it comes from", ""]
    lines += [f"- {name}: {_text(value)}" for name, value in _provenance(row) if value]
    lines += ["", "## Licence", ""]
    if known:
        lines.append(f"The base is under the [{known.name}]({known.link}). It asks whoever passes this on to:")
        lines += ["", *(f"- {ask}" for ask in known.asks)]
    else:
        reason = refusal(licence, row.base) or ""
        lines.append(_text(reason[:1].upper() + reason[1:]))
    return "\n".join(lines) + "\n"


def _provenance(row: Row) -> list[tuple[str, str]]:
    found = row.artifact.provenance
    versions = found.get("versions") or {}
    options = found.get("options") or {}
    return [
        ("method", f"{row.artifact.method}, {', '.join(f'{k} {v}' for k, v in options.items() if v is not None)}"),
        ("base", f"digest {found.get('base', '')}, revision {found.get('revision') or 'not known'}"),
        ("calibration tokens", str(found.get("calibration") or "none")),
        ("recipe", f"{found.get('recipe', row.recipe)} ({found.get('recipe_digest', row.recipe_digest)})"),
        ("made with", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("blocks", _encoder(found.get("encoder") or {})),
        ("carried", _carried(found.get("carried") or {})),
        ("artifact", row.artifact.digest),
    ]


def _encoder(by: Mapping[str, object]) -> str:
    """Who made a GGUF's blocks; nothing for other formats, and for files from before there was a choice."""
    made = f"made by {by.get('name')} on {by.get('device')}" if by else ""
    if "rows_checked" in by:
        made += f", {by.get('rows_equal')} of {by['rows_checked']} rows compared are llama.cpp's"
    return made


def _carried(how: Mapping[str, object]) -> str:
    """What a file was carried from, if it was; the artifact's warnings say how exactly."""
    types = how.get("types")
    return f"from {how.get('from')}, in {', '.join(types) if isinstance(types, list) else types}" if how else ""


def _text(words: object) -> str:
    """Text that markdown and HTML show as it is, on one line."""
    plain = "".join(mark if mark.isprintable() else " " for mark in str(words))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|]", r"\\\g<0>", plain)


def _link(words: str) -> str:
    return re.sub(r"[^\w./-]", "", words)
