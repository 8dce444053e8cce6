"""A recipe: YAML read into validated, frozen objects. Loading one touches nothing but the file itself.

Keys are strict, and every name that a person can mistype is answered with the nearest known one. The options
of a method or backend are the dataclass in its own module, so a new one needs no change here. Values are
validated as JSON in pydantic's strict mode: "4" is not 4.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from workbench.disk import expanded
from workbench.errors import LONGEST_PATH, UserError, did_you_mean, short, unknown
from workbench.recipe.choices import BackendChoice, limits_of, meant_by, method_of, parse_backends, parse_variants
from workbench.recipe.endpoints import Endpoint, parse_endpoints
from workbench.recipe.messages import validate
from workbench.recipe.model import Calibration, Document, EvaluationModel, Limits, TaskModel
from workbench.recipe.sources import Base
from workbench.recipe.words import LONGEST_NAME, bad_name, twin
from workbench.recipe.yaml_text import MAX_BYTES, parse_yaml
from workbench.records import TokenSet, Variant, Workload, digest, to_json
from workbench.worker.backends import BACKENDS, backend_named


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `path` is where it was read from; relative paths in it are relative to that."""

    name: str
    model: str
    path: Path
    base: Base
    variants: tuple[Variant, ...]
    backends: tuple[BackendChoice, ...]
    calibration: Calibration | None
    evaluations: dict[str, EvaluationModel]
    """The evaluation sets by name; the first is what tables show."""
    workload: Workload
    limits: Limits
    digest: str
    warnings: tuple[str, ...] = ()
    tasks: dict[str, TaskModel] = field(default_factory=dict)
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    machines: tuple[str, ...] = ()
    """Kinds or labels of machines of a cluster."""

    def variant(self, name: str) -> Variant:
        """The variant of that name, or a `UserError` with the nearest one."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise unknown("variant", name, [v.name for v in self.variants], short(self.path, LONGEST_PATH))

    def matching(self, patterns: list[str]) -> set[str]:
        """The variants that any of the names or patterns (`gguf-*`) means; a `UserError` for one that means none."""
        return meant_by(patterns, self.variants, short(self.path, LONGEST_PATH))

    def backend(self, name: str) -> BackendChoice:
        """The backend of that name, with its defaults if the recipe does not list it."""
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
        return self.choices(name)[0]

    def token_sets(self) -> list[TokenSet]:
        """What is cut into windows: the evaluation sets in their order, then the calibration's, if there is one."""
        folder, look = self.path.parent, self.calibration
        sets = [
            TokenSet(
                "evaluation", name, test.source.resolved(folder), test.window, test.windows, test.score, test.stride
            )
            for name, test in self.evaluations.items()
        ]
        if look:
            source = look.source.resolved(folder)
            sets.append(
                TokenSet("calibration", "calibration", source, look.window, look.windows, "all", seed=look.seed)
            )
        return sets

    def choices(self, name: str) -> list[BackendChoice]:
        """The same for each value of an option that is an axis (`kv_cache: [f16, q8_0]`)."""
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
        return [choice for choice in self.backends if choice.name == name] or [BackendChoice(name, {})]


def load(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises `UserError` with file, place and remedy."""
    file, said = expanded(path), short(path, LONGEST_PATH)
    try:
        if stat.S_ISFIFO(file.stat().st_mode):
            # To open one may wait for ever.
            raise UserError(f"{said}: a pipe, not a recipe: write it into a file")
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8") if len(data) <= MAX_BYTES else ""
    except FileNotFoundError:
        folders = (file.parent, file.parent / "recipes")
        near = [str(p) for folder in folders for p in folder.glob("[!.]*.y*ml")]
        raise UserError(f"{said}: no such recipe. {did_you_mean(str(path), near)}".rstrip()) from None
    except IsADirectoryError:
        raise UserError(f"{said}: a folder, not a recipe") from None
    except OSError as error:
        raise UserError(f"{said}: cannot be read as text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{said}:{line}: cannot be read as text: {error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{said}: too large for a recipe (at most {MAX_BYTES} bytes)")
    return parse(parse_yaml(text, said), file)


def parse(data: Any, path: Path) -> Recipe:
    """A recipe from its plain data; `path` names it in messages and anchors relative paths."""
    where = short(path, LONGEST_PATH)
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a mapping with at least `base` and `variants`")
    data = dict(data)
    extra = {"variants", "backends", "endpoints"}
    for key in data:
        if key not in Document.model_fields and key not in extra:
            known = set(Document.model_fields) | extra
            raise UserError(f"{where}: unknown key '{short(key)}'. {did_you_mean(key, known)}")
    data["evaluation"], further = _evaluations(data.get("evaluation"), where)
    raw_variants, raw_backends, raw_endpoints = (data.pop(name, None) for name in ("variants", "backends", "endpoints"))
    document = validate(TypeAdapter(Document), data, where, "")
    variants = parse_variants(raw_variants, where)
    backends = parse_backends(raw_backends, where, variants)
    endpoints = parse_endpoints(raw_endpoints, where, variants)
    workload = document.workload.workload()
    for choice in backends:
        most = getattr(backend_named(choice.name), "MOST_SEQUENCES", math.inf)
        if max(workload.batches) > most:
            raise UserError(
                f"{where}: workload.batch: {choice.name} takes {most} sequences at once at most, not "
                f"{max(workload.batches)}: ask for fewer, or leave {choice.name} out of `backends`"
            )
    sets = {test.name or "evaluation": test for test in (document.evaluation, *further) if test}
    warnings = []
    if document.calibration is None:
        # The base stands before what the recipe lists.
        for i, variant in enumerate(variants):
            method, options = method_of(variant)
            if method.making(options, cuda=False).calibration:
                raise UserError(
                    f"{where}: variants[{i - 1}] ({variant.name}) looks at calibration tokens: add a `calibration`"
                )
    for variant in variants:
        for backend, reason in limits_of(variant).items():
            if any(choice.name == backend and choice.takes(variant.name) for choice in backends):
                warnings.append(f"{variant.name} will not run on {backend}: {reason}")
    return Recipe(
        # A file may be called anything.
        name=document.name or "".join(c if c.isprintable() else "-" for c in path.stem[:LONGEST_NAME]),
        model=document.model or document.base.stem(),
        path=path,
        base=document.base,
        variants=variants,
        backends=backends,
        calibration=document.calibration,
        evaluations=sets,
        tasks=document.tasks,
        endpoints=endpoints,
        machines=tuple(document.machines),
        workload=workload,
        limits=document.limits,
        digest=digest(
            [
                # The same recipe wherever it runs.
                document.model_dump(mode="json", exclude={"machines"}),
                to_json(variants),
                to_json(backends),
                *(test.model_dump(mode="json") for test in further),
                # Where there are none a recipe keeps the digest that it had before there could be any.
                *({name: each.model_dump(mode="json")} for name, each in endpoints.items()),
            ]
        ),
        warnings=tuple(warnings),
    )


def _evaluations(raw: Any, where: str) -> tuple[Any, list[EvaluationModel]]:
    """The first evaluation set as it stands in the recipe, still to be checked, and the further ones of a mapping
    from names to sets."""
    keys = set(EvaluationModel.model_fields)
    several = (
        isinstance(raw, dict)
        and raw
        and not keys & set(raw)
        and all(isinstance(value, dict) for value in raw.values())
        and any(keys & set(value) for value in raw.values())
    )
    if not several:
        return raw, []
    checked = list[EvaluationModel]()
    for name, value in raw.items():
        place = f"evaluation.{short(name)}"
        if reason := bad_name(name):
            raise UserError(f"{where}: {place}: a name has {reason}")
        if other := twin(name, [test.name for test in checked if test.name]):
            raise UserError(f"{where}: {place}: a set named '{short(other)}' is already there")
        if "name" in value:
            raise UserError(f"{where}: {place}: '{name}' is its name; leave the `name` inside out")
        checked.append(validate(TypeAdapter(EvaluationModel), {**value, "name": str(name)}, where, place))
    first = next(iter(raw.items()))
    return {**first[1], "name": str(first[0])}, checked[1:]
