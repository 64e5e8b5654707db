"""One experiment is one YAML, checked by a pydantic model; the command line overrides single keys with dots.

The model is the schema, the YAML is the experiment, the command line is the exception.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict

from reelhf.errors import UserError, did_you_mean

PACKAGED_CONFIGS = Path(__file__).parent / "_configs"  # inside a wheel
CHECKOUT_CONFIGS = Path(__file__).parent.parent / "configs"  # inside a clone
MAX_ERRORS_SHOWN = 3
MAX_NAMES_SHOWN = 12


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, the docstring under a field is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: plain YAML 1.1 reads `1e-4` as a string."""


_Loader.yaml_implicit_resolvers = {
    k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(
    cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Read a YAML file, apply `key.sub=value` overrides, and check the result against `cls`.

    Args:
        path: looked up from the working directory, then among the configs that ship with the
            package; None starts from the defaults.
        overrides: `optimizer.lr=1e-4`, `rewards.0.weight=2`; the value is read as YAML.
    Raises: UserError naming the key, the value that came, what was expected, the nearest name.
    """
    source = "the command line"
    data: dict[str, Any] = {}
    if path is not None:
        found = find_config(path)
        source = str(found)
        data = _read_yaml(found)
    for override in overrides:
        _apply_override(data, override)
    try:
        return cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_explain(cls, error)}") from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, in field order; `load_config` reads it back to an equal config."""
    text: str = yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )
    return text


def find_config(path: str | Path) -> Path:
    """The file a config name stands for: as given, else the packaged one of the same relative name."""
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if given.is_dir():
        raise UserError(f"{given} is a folder; expected a YAML file.")
    name = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    if not given.is_absolute():
        for root in (PACKAGED_CONFIGS, CHECKOUT_CONFIGS):
            if (root / name).is_file():
                return root / name
    known = [f"configs/{name}" for name in packaged_configs()]
    raise UserError(f"no config file at {given}.{did_you_mean(str(given), known)}")


def packaged_configs() -> list[str]:
    """Names of the configs that ship with the package, such as `rlhf/toy_direct.yaml`."""
    for root in (PACKAGED_CONFIGS, CHECKOUT_CONFIGS):
        if root.is_dir():
            return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))
    return []


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}; expected `key: value` lines.")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}' has no '='; expected key=value, such as seed=1.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    *parents, last = key.strip().split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _list_index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(
            f"override '{override}': '{part}' is not a position in a list of {len(items)} items "
            f"(0 to {len(items) - 1})."
        )
    return int(part)


def _explain(cls: type[Config], error: pydantic.ValidationError) -> str:
    details = error.errors(include_url=False)
    lines = [_explain_one(cls, detail) for detail in details[:MAX_ERRORS_SHOWN]]
    if len(details) > MAX_ERRORS_SHOWN:
        lines.append(f"and {len(details) - MAX_ERRORS_SHOWN} more")
    return "; ".join(lines)


def _explain_one(cls: type[Config], detail: Any) -> str:
    location = detail["loc"]
    key = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        names = _field_names(cls, location[:-1])
        suggestion = did_you_mean(str(location[-1]), names)
        few = 0 < len(names) <= MAX_NAMES_SHOWN
        expected = f" Expected one of: {', '.join(names)}." if few and not suggestion else ""
        return f"unknown key '{key}' (value {detail['input']!r}).{suggestion}{expected}"
    if detail["type"] == "missing":
        return f"key '{key}' is missing and has no default"
    message: str = detail["msg"].removeprefix("Value error, ")
    if not key:  # a check over several fields speaks for itself
        return message
    suggestion = ""
    if detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        suggestion = did_you_mean(str(detail["input"]), choices)
    return f"key '{key}' is {detail['input']!r}: {message}.{suggestion}"


def _field_names(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Field names of the config that sits at `location` inside `cls`."""
    candidates: list[type[BaseModel]] = [cls]
    for part in location:
        deeper: list[type[BaseModel]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                deeper += _models_in(field.annotation)
        if deeper:  # a list position or a union tag names no field: stay where we are
            candidates = deeper
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for arg in typing.get_args(annotation) for model in _models_in(arg)]
