"""Flags of a command, generated from the fields of configuration classes with the same names and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ttd_plugins.cli import completion
from ttd_plugins.cli.image_maps import parse_settings, parse_size
from ttd_plugins.errors import InputError
from ttd_plugins.utils.configuration import field_information, help_section, section_of
from ttd_plugins.utils.deprecation import warn_renamed

METAVARS = {
    "int": "N", "float": "NUMBER", "number": "N|SHARE", "numbers": "N,N,...", "size": "N|HxW", "settings": "KEY=VALUE",
    "list": "NAME", "text": "NAME",
}  # fmt: skip
"""What stands for the value of a flag in help texts, by the form of its field."""

COMPLETERS = {"backbone.name": completion.backbones, "extractor": completion.TAG_EXTRACTORS,
              "ttd.extractor": completion.TAG_EXTRACTORS}  # fmt: skip
"""Shell completion of values that are names, by the path of the field."""


@dataclasses.dataclass(frozen=True)
class ConfigFlag:
    """A flag that sets one field.

    Attributes:
        path: dotted name of the field, such as ``optimizer.learning_rate``.
        name: the flag, such as ``--lr``.
        hint: type of the field.
        help: description of the field with its default.
        metavar: its value in help texts, where the type does not say it.
        section: section of the help.
        hidden_for: the current flag, where this is its old name.
    """

    path: str
    name: str
    hint: Any
    help: str
    metavar: str | None = None
    section: str | None = None
    hidden_for: str | None = None

    @property
    def parameter(self) -> str:
        """Name of the function's parameter."""
        return self.name.removeprefix("--").replace("-", "_") + "_flag"

    def annotation(self) -> Any:
        """The typer annotation of the parameter."""
        kind, form = _flag_type(self.hint), _form(self.hint)
        options: dict[str, Any] = {"help": self.help, "show_default": False, "hidden": self.hidden_for is not None}
        options["rich_help_panel"] = self.section
        if form == "literal":
            choices = [str(one) for one in _literals(self.hint)]
            options |= {"metavar": "|".join(choices), "autocompletion": completion.one_of(choices)}
        elif form != "bool":
            options["metavar"] = self.metavar or METAVARS[form]
        if self.path in COMPLETERS:
            options["autocompletion"] = COMPLETERS[self.path]
        names = [f"{self.name}/--no-{self.name.removeprefix('--')}"] if form == "bool" else [self.name]
        return Annotated[kind | None, typer.Option(*names, **options)]

    def convert(self, value: Any) -> Any:
        """Return the value of the field for a value of the flag.

        Raises:
            InputError: the text does not have the form of the field.
        """
        form = _form(self.hint)
        if form == "settings":
            return parse_settings(value)
        if form == "size":
            size = parse_size(value)
            return list(size) if isinstance(size, tuple) else size
        if form == "numbers":
            return self._numbers(value.split(","))
        if form == "number":
            return self._numbers([value])[0]
        return value

    def _numbers(self, texts: Sequence[str]) -> list[int | float]:
        try:
            return [int(text) if text.strip().lstrip("-").isdecimal() else float(text) for text in texts]
        except ValueError as error:
            raise InputError(f"{self.name} takes numbers with commas between them, not {','.join(texts)!r}") from error


def flags_of(
    kind: type[Any],
    prefix: str = "",
    *,
    defaults: Any = None,
    skip: Sequence[str] = (),
    default_note: str = "",
) -> list[ConfigFlag]:
    """Return the flags of a configuration class and of its sections.

    Args:
        kind: a configuration class.
        prefix: dotted name of the section.
        defaults: an object whose values the help shows as defaults; by default those of the class.
        skip: dotted names of fields without a flag.
        default_note: what the help adds to a default, such as ``" in the preset paper"``.
    """
    hints, found = get_type_hints(kind), []
    for name, information in field_information(kind).items():
        path = f"{prefix}{name}"
        if path in skip:
            continue
        default = getattr(defaults, name) if defaults is not None else _default_of(kind, name)
        section = section_of(hints[name])
        if section is not None and dataclasses.is_dataclass(hints[name]):
            found += flags_of(section, f"{path}.", defaults=default, skip=skip, default_note=default_note)
            continue
        if section is not None:
            continue  # an optional object, such as a calibration, has no flag; --set takes it
        extra = information.json_schema_extra
        named: Any = extra if isinstance(extra, dict) else {}
        found.append(
            ConfigFlag(
                path,
                named.get("flag") or f"--{name.replace('_', '-')}",
                hints[name],
                _help(_repeatable(str(information.description), hints[name]), default, default_note),
                named.get("metavar"),
                named.get("section") or help_section(kind),
            )
        )
    return found


def old_flags(flags: Sequence[ConfigFlag], renamed: Mapping[str, str]) -> list[ConfigFlag]:
    """Return hidden flags with old names.

    Args:
        flags: the current flags.
        renamed: old flag to current flag.
    """
    by_name = {flag.name: flag for flag in flags}
    return [dataclasses.replace(by_name[new], name=old, hidden_for=new) for old, new in renamed.items()]


def with_flags(flags: Sequence[ConfigFlag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds flags to a command.

    The command has a keyword parameter ``given``. It receives a mapping from the dotted names of fields to the values
    of the flags that were given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "given"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(flag.parameter, keyword, default=None, annotation=flag.annotation()) for flag in flags
        ]

        @wraps(command)
        def wrapped(**arguments: Any) -> None:
            given: dict[str, Any] = {}
            for flag in flags:
                value = arguments.pop(flag.parameter)
                if value is None or value == []:
                    continue
                if flag.hidden_for is not None:
                    warn_renamed(flag.name, flag.hidden_for)
                given[flag.path] = flag.convert(value)
            command(**arguments, given=given)

        positional = [parameter.replace(kind=keyword) for parameter in own]
        wrapped.__signature__ = inspect.Signature([*positional, *added])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
        return wrapped

    return decorate


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries for values by dotted names."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return found


def _default_of(kind: type[Any], name: str) -> Any:
    (one,) = (one for one in dataclasses.fields(kind) if one.name == name)
    if one.default is not dataclasses.MISSING:
        return one.default
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else None


def _help(description: str, default: Any, note: str) -> str:
    """Return the help of a flag: the description, in which null is no value of a flag, and the default."""
    # "null where" is about Python, where an object is passed instead of a name.
    text, null, meaning = description.removesuffix(".").partition("; null ")
    if null and not meaning.startswith(("means ", "where ")):
        text, meaning = description.removesuffix("."), ""
    if default is None and meaning.startswith("where "):
        return f"{text}.  [required here or in the YAML file]"
    if default is None and meaning.startswith("means "):
        return f"{text}.  [default{note}: {meaning.removeprefix('means ')}]"
    if default is None or default == {} or default == ():
        return f"{text}."
    if isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text}.  [default{note}: {shown}]"


def _repeatable(description: str, hint: Any) -> str:
    """Say that a flag may be given several times, where it may."""
    if _form(hint) not in ("settings", "list") or "repeatable" in description:
        return description
    return f"{description.removesuffix('.')}; repeatable."


def _flag_type(hint: Any) -> Any:
    form = _form(hint)
    simple = {"bool": bool, "int": int, "float": float, "list": list[str], "settings": list[str]}
    return simple.get(form, str)


def _form(hint: Any) -> str:
    """How a field is written on the command line."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = [one for one in arguments if one is not type(None)]
        if len(members) == 1:
            return _form(members[0])
        return "size" if any(get_origin(one) is tuple for one in members) else "number"
    if origin is Literal:
        return "literal"
    if origin is dict:
        return "settings"
    if origin is tuple:
        return "list" if arguments[0] is str else "numbers"
    return {bool: "bool", int: "int", float: "float"}.get(hint, "text")


def _literals(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for one in get_args(hint) if (found := _literals(one))), ())


def print_json(value: Any) -> None:
    """Print a value as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
