"""Reading a recipe: every problem at once, each with the nearest valid key; and writing it back in full."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import tomli_w

from personae.attack import Poisoned
from personae.core import NAME_RULE, SAFE_NAME, Method
from personae.errors import ConfigError
from personae.methods import METHODS
from personae.methods import WRAPPERS as OF_METHODS
from personae.recipe.schema import Recipe

INSTEAD = {"backbone.folder": "backbone.preset", "backbone.preset": "backbone.folder"}
"""Of these exactly one stands in a recipe; `--set` of the one replaces the other."""

WRAPPERS: Mapping[str, type] = {"poisoned": Poisoned, **OF_METHODS}
"""Around any method, applied in this order from the inside out: those on the server see what attackers sent."""

STUDY = "study"
"""The key that tells a study from a run."""

SEQUENCE = "continual"
"""The table that tells a recipe of concept after concept from others."""

TITLE = "title"
"""A sentence for people, allowed in every recipe and carried along unread."""


def recipe_folders() -> list[Path]:
    """Where recipes are found by name: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package / "recipes", package.parent.parent / "recipes") if folder.is_dir()]


def find_recipe(recipe: str | Path) -> Path:
    """A file's own path, or a shipped recipe by name ("quickstart", "digits/spire").

    Raises: ConfigError, with the nearest names.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {
        str(file.relative_to(folder).with_suffix("")): file
        for folder in reversed(recipe_folders())
        for file in sorted(folder.rglob("*.toml"))
    }
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    near = difflib.get_close_matches(str(recipe), shipped, n=3, cutoff=0.4) or sorted(shipped)[:8]
    raise ConfigError(f"there is no file and no shipped recipe {str(recipe)!r}; did you mean: {', '.join(near)}?")


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML file or a shipped recipe. Raises: ConfigError, naming every problem."""
    return parse(*read_table(recipe, overrides))


def read_table(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """A recipe as TOML gives it, and where it stands.

    `overrides` are "key.of.table=value" with the value in TOML or a bare word; an empty value leaves the key out.
    Raises: ConfigError.
    """
    path = find_recipe(recipe)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    for override in overrides:
        change(table, override)
    return table, str(path)


def parse(table: Mapping[str, Any], where: str) -> Recipe:
    """From a table as TOML gives it. Raises: ConfigError, naming every problem in `where`."""
    if STUDY in table:
        raise ConfigError(f"{where} is a study, which trains no single model; personae run, resume and report take it")
    if SEQUENCE in table:
        raise ConfigError(f"{where} teaches concept after concept; personae run, resume, learn and report take it")
    table = {key: value for key, value in table.items() if key != TITLE}
    problems: list[str] = []
    method = _method(table.pop("method", None), table.pop("wrap", {}), problems)
    fields = check_fields(Recipe, table, "", problems)
    if fields is not None:
        fields = dataclasses.replace(fields, method=method)
        problems += _together(fields)
    if problems or fields is None or method is None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{where} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:{lines}")
    return fields


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every value filled in, as TOML can hold it; `parse` gives the same recipe back."""
    table = plain({f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name != "method"})
    wraps: dict[str, Any] = {}
    method: Any = recipe.method
    names = {kind: name for name, kind in {**METHODS, **WRAPPERS}.items()}
    while type(method) in WRAPPERS.values():
        wraps[names[type(method)]] = plain(
            {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name != "method"}
        )
        method = method.method
    own = plain({f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    return {**table, "method": {"name": names[type(method)], **own}, "wrap": wraps}


def to_toml(recipe: Recipe) -> str:
    return tomli_w.dumps(to_table(recipe))


def method_name(method: Method) -> str:
    """As people say it, wrappers outside: "server_ema(server_adam(spire))"."""
    names = {kind: name for name, kind in {**METHODS, **WRAPPERS}.items()}
    inner = getattr(method, "method", None)
    return names[type(method)] if inner is None else f"{names[type(method)]}({method_name(inner)})"


# --- the pieces ----------------------------------------------------------------------------------------------


def change(table: dict[str, Any], override: str) -> None:
    """One "key.of.table=value". Raises: ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r} is not of the form key=value, for example --set method.embedding_rate=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _put(table, key.strip(), value, override)
    if key.strip() in INSTEAD and value != "":
        _put(table, INSTEAD[key.strip()], "", override)


def _put(table: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a table")
    if value == "":
        table.pop(last, None)
    else:
        table[last] = value


def _method(table: Any, wraps: Any, problems: list[str]) -> Method | None:
    """The method with its wrappers around it, in the order of WRAPPERS from the inside out."""
    method: Any = None
    if not isinstance(table, dict) or "name" not in table:
        problems.append(f"method: a table [method] with a name is needed; names are {', '.join(METHODS)}")
    elif not isinstance(name := table["name"], str) or name not in METHODS:
        problems.append(f"method.name: {name!r} is unknown{nearest(str(name), METHODS)}")
    else:
        method = check_fields(METHODS[name], {k: v for k, v in table.items() if k != "name"}, "method.", problems)
    if not isinstance(wraps, dict):
        problems.append("wrap: expected tables such as [wrap.server_ema]")
        return None
    problems += [f"wrap.{key}: unknown{nearest(key, WRAPPERS)}" for key in wraps if key not in WRAPPERS]
    for key, kind in WRAPPERS.items():
        if key in wraps:
            method = check_fields(kind, wraps[key], f"wrap.{key}.", problems, method=method)
    return typing.cast("Method | None", method)


def check_fields(kind: type, table: Any, where: str, problems: list[str], **given: Any) -> Any:
    """Make `kind` from a table, or add to `problems` and return None. `given` are fields that no table holds."""
    if not isinstance(table, dict):
        problems.append(f"{where.rstrip('.')}: expected a table")
        return None
    try:
        checked = _model(kind).model_validate_json(json.dumps(table, default=str), strict=True)
    except pydantic.ValidationError as error:
        problems += [_explain(kind, where, problem) for problem in error.errors()]
        return None
    return _build(kind, checked, given, where, problems)


@cache
def _model(kind: type) -> type[pydantic.BaseModel]:
    """A strict pydantic model with the fields of a dataclass, nested ones likewise, without those of type Method."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if hints[field.name] is Method:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        fields[field.name] = (_translated(hints[field.name]), ... if required else None)
    config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
    return pydantic.create_model(kind.__name__, __config__=config, **fields)


def _translated(hint: Any) -> Any:
    """A type with every dataclass in it replaced by its model."""
    if dataclasses.is_dataclass(hint):
        return _model(typing.cast("type", hint))
    if typing.get_origin(hint) is not None and typing.get_origin(hint) is not typing.Literal:
        parts = tuple(_translated(part) for part in typing.get_args(hint))
        origin = typing.get_origin(hint)
        return typing.Union[parts] if origin in (typing.Union, type(int | str)) else origin[parts]  # noqa: UP007
    return hint


def _build(kind: type, checked: pydantic.BaseModel, given: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """Make `kind`, whose constructor may find problems of its own."""
    hints = typing.get_type_hints(kind)
    values = dict(given)
    for name in (field.name for field in dataclasses.fields(kind) if field.name in checked.model_fields_set):
        value = getattr(checked, name)
        if isinstance(value, pydantic.BaseModel):
            value = _build(_dataclass_in(hints[name]), value, {}, f"{where}{name}.", problems)
        elif isinstance(value, tuple) and value and isinstance(value[0], pydantic.BaseModel):
            inner = _dataclass_in(hints[name])
            value = tuple(_build(inner, v, {}, f"{where}{name}.{i}.", problems) for i, v in enumerate(value))
            if None in value:
                return None
        values[name] = value
    if kind is Recipe:
        values["method"] = None
    try:
        return kind(**values)
    except ConfigError as error:
        here = f"{where.rstrip('.')}: " if where else ""
        problems.append(here + str(error).removeprefix("training: "))
        return None


def _explain(kind: type, where: str, problem: Any) -> str:
    """One pydantic error in our words, with the nearest valid key for an unknown one."""
    path = [str(part) for part in problem["loc"]]
    name = where + ".".join(path)
    if problem["type"] == "extra_forbidden":
        for part in (part for part in path[:-1] if not part.isdigit()):  # a table's place in a list of tables
            hint = typing.get_type_hints(kind)[part]
            kind = _dataclass_in(hint)
        valid = [field.name for field in dataclasses.fields(kind) if field.name != "method" or kind is not Recipe]
        return f"{name}: unknown key{nearest(path[-1], valid)}"
    if problem["type"] == "missing":
        return f"{name}: missing"
    found = problem.get("input")
    shown = "" if isinstance(found, dict) else f", found {found!r}"
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}{shown}"


def _dataclass_in(hint: Any) -> type:
    """The dataclass that a hint is or allows beside None."""
    return next(
        part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)
    )


def nearest(word: str, valid: Any) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; valid are {', '.join(valid) or 'none'}"


def _together(recipe: Recipe) -> list[str]:
    """Problems that no single field shows."""
    parts = (_federation, _by_style, _data, _partition, _model_and_machine)
    return [problem for part in parts for problem in part(recipe)]


def _federation(recipe: Recipe) -> list[str]:
    from personae.aggregate import RULES
    from personae.engine import ENGINES
    from personae.recipe.build import patience

    problems, cohort, minimum = [], recipe.cohort, recipe.federation.minimum
    if recipe.rounds < 1:
        problems.append(f"rounds: {recipe.rounds}, expected at least 1")
    if cohort is not None and cohort < 1:
        problems.append(f"cohort: {cohort}, expected at least 1, or left out for all clients")
    if recipe.engine not in ENGINES:
        problems.append(f"engine: {recipe.engine!r} is unknown{nearest(recipe.engine, ENGINES)}")
    if recipe.aggregation.rule not in RULES:
        problems.append(
            f"aggregation.rule: {recipe.aggregation.rule!r} is unknown{nearest(recipe.aggregation.rule, RULES)}"
        )
    else:
        problems += _attackers(recipe)
    if (norm := recipe.aggregation.clip_norm) is not None and not 0 < norm < math.inf:
        problems.append(f"aggregation.clip_norm: {norm}, expected above 0, or left out for no clipping")
    if minimum is not None and not 1 <= minimum <= (cohort or math.inf):
        problems.append(f"federation.minimum: {minimum}, expected 1 to {cohort or 'all'}, the cohort")
    try:
        patience(recipe)
    except ConfigError as error:
        problems.append(str(error))
    if recipe.engine == "flower" and recipe.data.pooled:
        problems.append("data.pooled: everybody's images in one place need the engine 'in_process'")
    return problems


def _by_style(recipe: Recipe) -> list[str]:
    """What adapters by style do by themselves, or would undo."""
    from personae.methods import ClusterLora, ServerAdam, ServerEma

    method, wraps = recipe.method, []
    while (inner := getattr(method, "method", None)) is not None:
        wraps.append(method)
        method = inner
    if not isinstance(method, ClusterLora):
        return []
    problems = []
    if recipe.aggregation.rule != "mean" or recipe.aggregation.clip_norm is not None:
        problems.append("aggregation: cluster_lora combines adapters itself; leave it out, and set method.inside")
    if any(isinstance(wrap, ServerAdam | ServerEma) for wrap in wraps):
        problems.append("wrap: server_adam and server_ema change what nobody gets from cluster_lora; leave them out")
    if recipe.backbone.lora is not None and recipe.backbone.lora.alpha is not None:
        problems.append("backbone.lora.alpha: cluster_lora stacks adapters, to other ranks; leave it out")
    return problems


ALONE = ("folder", "identity", "thing")
"""Sources that without a partition are the images of one client."""


def _data(recipe: Recipe) -> list[str]:
    problems, data = [], recipe.data
    for name, share in (("heldout", data.heldout), ("heldout_new", data.heldout_new)):
        if share is not None and not 0 < share < 1:
            problems.append(f"data.{name}: {share}, expected between 0 and 1")
    if data.source in ("clients", "folder") and data.path is None:
        problems.append(f"data.path: needed for source {data.source!r}")
    if data.source in ("clients", "folder") and data.size is None:
        problems.append(f"data.size: needed for source {data.source!r}, in pixels")
    if not SAFE_NAME.fullmatch(data.name):
        problems.append(f"data.name is {data.name!r}, expected {NAME_RULE}")
    if data.source == "clients" and data.partition is not None:
        problems.append("data.partition: source 'clients' is already spread over clients; leave it out")
    if data.source not in ("clients", *ALONE) and data.partition is None:
        problems.append("data.partition: missing; it says how the images are spread over clients")
    return problems


def _partition(recipe: Recipe) -> list[str]:
    if (p := recipe.data.partition) is None:
        return []
    problems = []
    if not p.num_clients - p.num_new >= 1:
        problems.append(f"data.partition: {p.num_clients} clients of which {p.num_new} are new leave none to train")
    if p.num_new < 0:
        problems.append(f"data.partition.num_new: {p.num_new}, expected at least 0")
    if p.kind == "dirichlet" and p.alpha is None:
        problems.append("data.partition.alpha: missing; the concentration of 'dirichlet'")
    if p.kind == "unseen" and None in (p.images_per_client, p.images_per_new):
        problems.append("data.partition: 'unseen' needs images_per_client and images_per_new")
    if p.kind == "fixed_new" and None in (p.alpha, p.classes_per_client, p.images_per_new):
        problems.append("data.partition: 'fixed_new' needs alpha, classes_per_client and images_per_new")
    if p.kind == "by_label" and p.classes_per_client is None:
        problems.append("data.partition.classes_per_client: missing for 'by_label'")
    if recipe.cohort is not None and recipe.cohort > p.num_clients - p.num_new >= 1:
        problems.append(f"cohort: {recipe.cohort}, but only {p.num_clients - p.num_new} clients train")
    return problems


AT_LEAST = {
    "evaluation": {
        "num_images": 1,
        "loss_grid": 1,
        "loss_draws": 1,
        "kid_subsets": 1,
        "kid_subset_size": 2,
        "preview_rounds": 0,
    },
}


def _model_and_machine(recipe: Recipe) -> list[str]:
    from personae.infer.samplers import check_steps

    problems = []
    if (recipe.backbone.preset is None) == (recipe.backbone.folder is None):
        problems.append("backbone: exactly one of preset and folder is needed")
    parts = ("frozen", "half", "recompute", "lora", "delta", "words")
    if recipe.backbone.folder is None and (named := [name for name in parts if getattr(recipe.backbone, name)]):
        problems += [f"backbone.{name}: needs backbone.folder, a text-to-image pipeline" for name in named]
    for table, fields in AT_LEAST.items():
        found = {name: getattr(getattr(recipe, table), name) for name in fields}
        problems += [f"{table}.{n}: {found[n]}, expected at least {low}" for n, low in fields.items() if found[n] < low]
    if recipe.backbone.folder is None:
        try:
            check_steps(recipe.sampling.sampler, recipe.sampling.steps, recipe.backbone.num_timesteps)
        except ConfigError as error:
            problems.append(f"sampling.steps: {error}")
    return problems


def _attackers(recipe: Recipe) -> list[str]:
    """Whether the rule can withstand so many attackers in a cohort of this size, where that is known without data."""
    from personae.aggregate import NEEDED, fewest

    rule, attackers = recipe.aggregation.rule, recipe.aggregation.attackers
    if attackers < 0:
        return [f"aggregation.attackers: {attackers}, expected at least 0"]
    if rule not in NEEDED:
        robust = ", ".join(NEEDED)
        return [f"aggregation.attackers: {attackers}, but rule {rule!r} withstands none; {robust} do"] * (attackers > 0)
    if attackers == 0 and rule not in ("median", "geometric_median"):
        return [f"aggregation.attackers: missing; how many clients of a round rule {rule!r} is to withstand"]
    partition, cohort, minimum = recipe.data.partition, recipe.cohort, recipe.federation.minimum
    if recipe.data.pooled:
        cohort = 1
    elif cohort is None and partition is not None:
        cohort = partition.num_clients - partition.num_new
    (a, b), least = NEEDED[rule], fewest(rule, attackers)
    needs = f"{attackers}, against which rule {rule!r} needs {a} x {attackers} + {b} = {least} clients in a round"
    if cohort is not None and cohort < least:
        return [f"aggregation.attackers: {needs}, and there are {cohort}"]
    if minimum is not None and minimum < least:
        return [f"aggregation.attackers: {needs}, and federation.minimum lets {minimum} do"]
    return []


def plain(value: Any) -> Any:
    """Dataclasses as tables, tuples as lists, None left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
