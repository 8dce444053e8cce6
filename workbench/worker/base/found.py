"""What others made, measured as it is: where it lies, links to it, and in what it is not what was made of the base.

Nothing is copied: an artifact's folder holds links into the hub's own cache, or to the person's own files, and the
artifact's record has their checksums. What would make numbers of two models pass for those of one (another
architecture, shape, vocabulary) is refused; what a reader should know (another chat template, another rope) is a
warning of the row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import UserError, short
from workbench.shape import Shape
from workbench.worker import Progress
from workbench.worker.base.hub import BLOB
from workbench.worker.tokens.spelling import OTHERWISE

ADVICE = "Give one that was made of this base"
SHOWN = 3
"""Names of tensors in a message."""


@dataclass(frozen=True)
class HeadersRequest:
    """A worker of `Making.headers`: what the headers say of an artifact that is found, without its weights. It answers
    with a `Stored` for each of its formats."""

    options: dict[str, str]
    shape: Shape
    """The base's."""
    allow_remote_code: bool = False


def check_place(word: str, hub: str, path: str, revision: str) -> None:
    """Refuse, when the recipe is read, a variant `word` that is in no place, in two, or in none that there can be."""
    if bool(hub) == bool(path):
        raise UserError(f"{word}: give exactly one of hub, path (found {'both' if hub else 'none'})")
    if hub and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub):
        raise UserError(f"{word}: '{short(hub)}' is not a repository's name; write `owner/name`")
    if path and revision:
        raise UserError(f"{word}: a revision is a hub repository's; leave it out beside `path`")


def default_name(hub: str, stem: str) -> str:
    """`X-Q4_K_M`, of a hub `owner-X-Q4_K_M`: many people upload files of one name."""
    owner = hub.partition("/")[0]
    return re.sub(r"[^\w.-]+", "-", f"{owner}-{stem}" if owner else stem).lstrip("._-")


def checksums(files: Sequence[Path], progress: Progress, fetched: bool) -> dict[str, str]:
    """SHA-256 of each file, by its name. `fetched`: just now from the hub, whose cache names large files by it: they
    were read through then."""
    found = {}
    for place, file in enumerate(files):
        if fetched and BLOB.fullmatch(file.resolve().name):
            found[file.name] = file.resolve().name
            continue
        progress(place, len(files), f"reading {file.name}")
        with open(file, "rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def link(file: Path, to: Path) -> None:
    """A link of that name, in the place of whatever an interrupted attempt left."""
    file.unlink(missing_ok=True)
    file.symlink_to(to.absolute())


def told(hub: str, commit: str, name: str, more: str) -> str:
    """Whose it is, for the row; a repository as a whole has no `name`."""
    where = ", ".join(part for part in (hub and f"{hub} at {commit[:12]}", name) if part)
    return f"made by others, measured as it is: {where}{more}"


def stated(options: Mapping[str, object]) -> dict[str, object]:
    """Options as a row has them: a path by its last name, since a row names no folder of the machine that made it."""
    said = {key: value for key, value in options.items() if value}
    return said | ({"path": Path(str(said["path"])).name} if "path" in said else {})


def respelt(ours: Sequence[str | None], theirs: Sequence[str | None], name: str) -> list[str]:
    """Warnings of tokens that are not the base's, by their ids; `UserError` where it is another vocabulary.

    Formats write a few tokens in ways of their own (unused and added ones), as in `tokens/spelling.py`.
    """
    pairs = [(token, a, b) for token, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a and b]
    other = [pair for pair in pairs if pair[1] != pair[2]]
    if not other:
        return [] if pairs else ["it has no vocabulary to compare with the base's"]
    token, *words = other[0]
    a, b = (short(repr(word)) for word in words)
    said = f"{len(other)} of {len(pairs)} tokens are not the base's (id {token}: {a} in the base, {b} here)"
    if len(other) * OTHERWISE > len(pairs):
        raise UserError(f"{name} has another tokenizer than the base: {said}. {ADVICE}")
    return [said]


def other_template(ours: object, theirs: object) -> list[str]:
    """A warning where chats are written otherwise than the base's are."""
    texts = [str(text or "").strip() for text in (ours, theirs)]
    if texts[0] == texts[1]:
        return []
    if not texts[1]:
        return ["it has no chat template, and the base has one"]
    return ["its chat template is not the base's" if texts[0] else "it has a chat template, and the base has none"]


def check_counts(theirs: tuple[int, int], ours: tuple[int, int], name: str) -> None:
    """Refuse another number of tokens, or of decoder layers."""
    if theirs[0] != ours[0]:
        raise UserError(f"{name} has a vocabulary of {theirs[0]} tokens, the base of {ours[0]}. {ADVICE}")
    if theirs[1] != ours[1]:
        raise UserError(f"{name} has {theirs[1]} decoder layers, the base {ours[1]}. {ADVICE}")


def check_shapes(
    ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]], name: str, optional: re.Pattern[str]
) -> list[str]:
    """Warnings of tensors that the base has not, or only it has; `UserError` unless all that count are there in the
    base's shape. `optional`: names of those that do not; shapes have their rows first."""
    for tensor, shape in ours.items():
        if tensor in theirs and list(theirs[tensor]) != list(shape):
            sizes = (" x ".join(map(str, each)) for each in (theirs[tensor], shape))
            raise UserError(
                f"{name} is not of the base's shape: {tensor} is {next(sizes)}, in the base {next(sizes)}. {ADVICE}"
            )
    lacks = [tensor for tensor in ours if tensor not in theirs]
    needed = [tensor for tensor in lacks if not optional.search(tensor)]
    if needed:
        raise UserError(f"{name} lacks {len(needed)} of the base's tensors ({_names(needed)}). {ADVICE}")
    extra = [tensor for tensor in theirs if tensor not in ours]
    found = [f"it has tensors that the base has not: {_names(extra)}"] if extra else []
    return found + ([f"it lacks tensors of the base: {_names(lacks)}"] if lacks else [])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
