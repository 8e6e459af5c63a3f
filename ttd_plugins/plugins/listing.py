"""Listings: which plugins, families, backbones and tag extractors there are."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ttd_plugins.adapter import AdapterFamily
from ttd_plugins.errors import TTDError
from ttd_plugins.hookspecs import DEPRECATED_HOOKS
from ttd_plugins.plugins.discovery import get_registry
from ttd_plugins.plugins.registry import DENY_PLUGINS_VARIABLE, Plugin, Registry, TagExtractorFactory, plugin_errors


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as ``ttd plugins`` prints it.

    Attributes:
        name: name of its entry point, or of its module for a built-in one.
        distribution, version: the installed distribution that provides it, or ``None``.
        hooks: names of the hooks that it implements.
        families, tag_extractors: names that it registered, without refused ones.
        error: what was refused and why, one sentence or several; ``None`` without a problem.
    """

    name: str
    distribution: str | None
    version: str | None
    hooks: tuple[str, ...]
    families: tuple[str, ...]
    tag_extractors: tuple[str, ...]
    error: str | None

    @property
    def deprecated_hooks(self) -> tuple[str, ...]:
        """Those of :attr:`hooks` that are accepted and ignored."""
        return tuple(hook for hook in self.hooks if hook in DEPRECATED_HOOKS)


@dataclass(frozen=True)
class BackboneInfo:
    """One architecture: names of its weights (without ``random``), and the default weights of a name without ``@``."""

    model: str
    weights: tuple[str, ...]
    default_weights: str | None


@dataclass(frozen=True)
class FamilyInfo:
    """One adapter family with its architectures; ``error`` says why they could not be listed."""

    family: str
    summary: str
    plugin: str
    backbones: tuple[BackboneInfo, ...]
    error: str | None


def list_plugins() -> list[PluginInfo]:
    """Return all plugins in the order in which they were loaded, broken ones included."""
    registry = get_registry()
    return [plugin_info(registry, plugin) for plugin in registry.plugins]


def plugin_info(registry: Registry, plugin: Plugin) -> PluginInfo:
    """Return the entry of one plugin in :func:`list_plugins`."""
    families, extractors = registry.families(), registry.tag_extractors()
    problems = [*registry.problems(plugin), *plugin.notes]
    if plugin.denied:
        problems.append(f"is not loaded, because {DENY_PLUGINS_VARIABLE} names it")
    return PluginInfo(
        name=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        hooks=plugin.hooks,
        families=tuple(name for name, family in plugin.families if families.get(name) is family),
        tag_extractors=tuple(name for name, factory in plugin.tag_extractors if extractors.get(name) is factory),
        error="; ".join(problems) if problems else None,
    )


def families() -> dict[str, AdapterFamily]:
    """Return the adapter families by name; a name that several plugins registered is left out."""
    return get_registry().families()


def get_family(name: str) -> AdapterFamily:
    """Return the adapter family called ``name``.

    Raises:
        BackboneNameError: it does not exist; the message lists the families.
        AdapterConflictError: several plugins registered the name.
        PluginError: the family was refused, with the reason.
    """
    return get_registry().family(name)[1]


def tag_extractors() -> dict[str, TagExtractorFactory]:
    """Return the factories of tag extractors by name; a name that several plugins registered is left out."""
    return get_registry().tag_extractors()


def list_backbones(family: str | None = None, pattern: str | None = None) -> list[FamilyInfo]:
    """List architectures and weights of one family or of all, without importing a backbone library.

    A family that fails to list its models is returned with ``error``.

    Args:
        family: name of a family; by default all.
        pattern: keeps the backbones of which a name (``model``, ``family:model``, each with and without ``@weights``)
            contains it, or matches it if it contains ``*`` or ``?``; case is ignored.

    Raises:
        BackboneNameError, AdapterConflictError, PluginError: as :func:`get_family`, if ``family`` is passed.
    """
    registry = get_registry()
    names = [family] if family is not None else sorted(registry.families())
    return [_family_info(*registry.family(name), pattern) for name in names]


def _family_info(plugin: Plugin, family: AdapterFamily, pattern: str | None) -> FamilyInfo:
    found: list[BackboneInfo] = []
    error = None
    summary = ""
    try:
        with plugin_errors(plugin.owner, f"list the models of family {family.name!r}"):
            summary = _require_text("summary", family.summary)
            for model in family.models():
                weights = tuple(_require_text("a name of weights", name) for name in family.weights(model))
                info = BackboneInfo(_require_text("a model's name", model), weights, family.default_weights(model))
                if pattern is None or _matches(family.name, info, pattern):
                    found.append(info)
    except TTDError as problem:
        found, error = [], str(problem)
    return FamilyInfo(family.name, summary, plugin.name, tuple(found), error)


def _require_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}, not a string")
    return value


def _matches(family: str, info: BackboneInfo, pattern: str) -> bool:
    glob = pattern.lower() if any(character in pattern for character in "*?") else f"*{pattern.lower()}*"
    models = [info.model, *(f"{info.model}@{tag}" for tag in info.weights)]
    return any(fnmatchcase(name.lower(), glob) for model in models for name in (model, f"{family}:{model}"))
