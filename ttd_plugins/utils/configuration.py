"""Configuration classes: frozen pydantic dataclasses whose mistakes are one sentence, with their YAML and JSON schema.

This module imports neither torch nor numpy, so that the command line can build its flags from the classes.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic
from pydantic import ConfigDict, Field, Strict, TypeAdapter
from pydantic.fields import FieldInfo

from ttd_plugins.errors import InputError, MissingDependencyError, choices_sentence, one_sentence
from ttd_plugins.utils.deprecation import rename_keys

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
"""A finite number; whole numbers are accepted too, texts are not."""
Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]

MAX_SEED = 2**63 - 1
"""Largest seed: torch's generators take 64 bits, of which one is a sign."""

_C = TypeVar("_C")


def option(
    description: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    section: str | None = None,
    **constraints: Any,
) -> Any:
    """Return the metadata of a field, for ``Annotated``.

    Args:
        description: one sentence for help texts, the JSON schema and the documentation; where ``None`` is a value, it
            ends with "; null means" and what it means.
        flag: flag on the command line where it is not ``--`` and the field's name.
        metavar: the flag's value in help texts, where the type does not say it, such as ``"FOLDER"``.
        section: section of the flag in help texts, where it is not that of the class.
        **constraints: of :func:`pydantic.Field`, such as ``ge`` and ``lt``.
    """
    named = {"flag": flag, "metavar": metavar, "section": section}
    extra: Any = {name: value for name, value in named.items() if value is not None} or None
    return Field(description=description, json_schema_extra=extra, **constraints)


@dataclass_transform(frozen_default=True)
def configuration(
    *, renamed: Mapping[str, str] | None = None, section: str | None = None
) -> Callable[[type[_C]], type[_C]]:
    """Class decorator: a frozen dataclass that validates its fields and refuses unknown ones.

    A mistake raises :class:`~ttd_plugins.errors.InputError`, one sentence that names the field.
    ``dataclasses.replace``, ``fields`` and ``asdict`` work as for any dataclass.

    Args:
        renamed: old field name to new field name; old names are accepted with a ``FutureWarning``.
        section: section of the flags in help texts, such as ``"Data"``.
    """

    def decorate(cls: type[_C]) -> type[_C]:
        built: Any = pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
        built.__renamed_fields__ = dict(renamed or {})
        built.__help_section__ = section
        validate = built.__init__

        @wraps(validate)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                kwargs = rename_keys(kwargs, built.__renamed_fields__, built.__name__)
            except ValueError as error:
                raise InputError(str(error)) from None
            try:
                validate(self, *args, **kwargs)
            except pydantic.ValidationError as error:
                raise InputError(mistake_sentence(built, error)) from None
            except TypeError as error:
                raise InputError(f"{built.__name__}: {one_sentence(error)}") from None

        built.__init__ = init
        return built  # type: ignore[no-any-return]

    return decorate


def check_seed(seed: object) -> None:
    """Check that a seed is a whole number from 0 to :data:`MAX_SEED`.

    Raises:
        InputError: it is not.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {describe_value(seed)}")


def field_information(kind: type[Any]) -> dict[str, FieldInfo]:
    """Return the fields of a configuration class by name, with description, default and annotation."""
    return dict(kind.__pydantic_fields__)  # type: ignore[attr-defined]


def renamed_fields(kind: type[Any]) -> dict[str, str]:
    """Return the old names of a configuration class's fields, mapped to the new ones."""
    return dict(getattr(kind, "__renamed_fields__", {}))


def help_section(kind: type[Any]) -> str | None:
    """Return the section of a configuration class's flags in help texts."""
    return getattr(kind, "__help_section__", None)


def section_of(hint: Any) -> type[Any] | None:
    """Return the configuration class of a field that is a section, also where the field may be ``None``."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        found = [one for one in map(section_of, get_args(hint)) if one is not None]
        return found[0] if len(found) == 1 else None
    return None


# From mappings and YAML ----------------------------------------------------------------------------------------------


def from_mapping(kind: type[_C], values: Any, where: str) -> _C:
    """Return a configuration from nested mappings; missing keys have their defaults.

    Args:
        kind: a configuration class.
        values: keys and values; sections are mappings, and an empty section may be ``None``.
        where: name of the source, for messages.

    Raises:
        InputError: a key is unknown, or a value has the wrong type or range; the message names both.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must have sections of keys, not {describe_value(values)}")
    try:
        prepared = _prepare(kind, values)
        return TypeAdapter(kind).validate_python(prepared)
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {mistake_sentence(kind, error, values)}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def has_only_joint_mistakes(kind: type[Any], values: Mapping[str, Any]) -> bool:
    """Whether ``values`` are wrong, and only because of how sections go together, which other sources may change."""
    try:
        TypeAdapter(kind).validate_python(_prepare(kind, values))
    except pydantic.ValidationError as error:
        return all(not one["loc"] for one in error.errors())
    except ValueError:
        return False
    return False


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the JSON schema of a configuration class, for editors."""
    return TypeAdapter(kind).json_schema()


def plain_values(value: Any) -> Any:
    """Return nested dictionaries and lists of values that YAML and JSON can store."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain_values(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def read_yaml(text: str) -> Any:
    """Read YAML 1.1, in which ``1e-4`` is a number too.

    Raises:
        InputError: the text is not YAML.
        MissingDependencyError: PyYAML is not installed.
    """
    yaml = import_yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """PyYAML's safe loader, which reads 1e-4 as a text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML: {one_sentence(error)}") from error


def import_yaml() -> Any:
    """Return PyYAML, or raise MissingDependencyError."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "configurations are YAML files and need PyYAML, which is not installed; run: pip install "
            "'ttd-plugins[train]'"
        ) from error
    return yaml


def _prepare(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename old keys and drop empty sections, at every level."""
    hints = get_type_hints(kind)
    renamed = rename_keys({str(key): value for key, value in values.items()}, renamed_fields(kind), kind.__name__)
    prepared = {}
    for key, value in renamed.items():
        section = section_of(hints[key]) if key in hints else None
        if section is not None and value is None and dataclasses.is_dataclass(hints[key]):
            continue
        is_section = section is not None and isinstance(value, Mapping)
        prepared[key] = _prepare(section, value) if is_section and section is not None else value
    return prepared


# Messages ------------------------------------------------------------------------------------------------------------


def mistake_sentence(kind: type[Any], error: pydantic.ValidationError, values: Mapping[str, Any] | None = None) -> str:
    """Return one sentence for the first mistake: which key, what it must be, and what it is."""
    first = error.errors(include_url=False)[0]
    names, hint, metadata = _locate(kind, first["loc"])
    path = ".".join(names)
    given = _look_up(values, names, first["input"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _owner(kind, names[:-1])
        known = [".".join([*names[:-1], one]) for one in field_information(owner)]
        return choices_sentence("key" if values is not None else f"option of {owner.__name__}", path, known)
    if first["type"] in ("value_error", "assertion_error"):
        message = str(first["ctx"]["error"])
        return f"{path}: {message}" if path else message
    if first["type"] == "literal_error" or _literals(hint):
        return choices_sentence(f"value of {path}", str(given), [str(one) for one in _literals(hint)])
    limits = _limits(metadata)
    if first["type"] == "finite_number":
        return f"{path} must be a finite number{f', {limits}' if limits else ''}, not {describe_value(given)}"
    if limits and first["type"] in ("greater_than_equal", "greater_than", "less_than", "less_than_equal"):
        value = list(given) if isinstance(given, list | tuple) else given
        return f"{path} must be {limits}, not {describe_value(value)}"
    return f"{path} must be {describe_type(hint)}, not {describe_value(given)}"


def describe_type(hint: Any) -> str:
    """Return a type in plain words, such as "a whole number or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(one) for one in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in arguments)
    if origin in (tuple, list):
        if origin is list or arguments[-1] is Ellipsis:
            return f"a list, each item {describe_type(arguments[0])}"
        return f"a list of {len(arguments)}, each item {describe_type(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "keys and values"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def describe_value(value: Any) -> str:
    """Return a value as a message quotes it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    text = f"the text {value!r}" if isinstance(value, str) else str(value)
    return one_sentence(ValueError(text), 80)


def _locate(kind: type[Any], location: Sequence[Any]) -> tuple[list[str], Any, list[Any]]:
    """The keys of pydantic's location, without its tags of union members and its indices; the hint there, metadata."""
    names: list[str] = []
    hint: Any = kind
    metadata: list[Any] = []
    for part in location:
        owner = section_of(hint)
        if owner is kind and isinstance(part, int) and not names:
            part = list(field_information(kind))[part]  # a positional argument
        if owner is None or not isinstance(part, str):
            break
        if part not in field_information(owner):
            if part == getattr(owner, "__name__", None):
                continue
            names.append(part)
            return names, Any, []
        names.append(part)
        metadata = _metadata(get_type_hints(owner, include_extras=True)[part])
        hint = get_type_hints(owner)[part]
    return names, hint, metadata


def _metadata(hint: Any) -> list[Any]:
    """Metadata of a hint and of everything inside it."""
    found: list[Any] = []
    if get_origin(hint) is Annotated:
        for one in hint.__metadata__:
            found += [one, *(one.metadata if isinstance(one, FieldInfo) else [])]
    for argument in get_args(hint):
        found += _metadata(argument)
    return found


def _limits(metadata: Sequence[Any]) -> str:
    """Bounds in words, such as "at least 0 and below 1"."""
    bounds = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "lt", "le") if hasattr(one, name)}
    # Whole numbers in full: %g would round a large one.
    shown = {name: str(value) if isinstance(value, int) else f"{value:g}" for name, value in bounds.items()}
    low = f"at least {shown['ge']}" if "ge" in shown else f"above {shown['gt']}" if "gt" in shown else ""
    high = f"below {shown['lt']}" if "lt" in shown else f"at most {shown['le']}" if "le" in shown else ""
    if low and not high and "ge" in shown:
        return f"{shown['ge']} or more"
    return " and ".join(one for one in (low, high) if one)


def _literals(hint: Any) -> tuple[Any, ...]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return arguments
    if origin in (Union, types.UnionType):
        return next((found for one in arguments if (found := _literals(one))), ())
    return ()


def _owner(kind: type[Any], names: Sequence[str]) -> type[Any]:
    for name in names:
        kind = section_of(get_type_hints(kind)[name]) or kind
    return kind


def _look_up(values: Mapping[str, Any] | None, names: Sequence[str], otherwise: Any) -> Any:
    found: Any = values
    for name in names:
        if not isinstance(found, Mapping) or name not in found:
            return otherwise
        found = found[name]
    return otherwise if found is None and values is None else found
