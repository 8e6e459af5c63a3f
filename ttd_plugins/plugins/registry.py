"""The registry: plugins with the families and tag extractors that they registered, and conflicts between them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import pluggy

from ttd_plugins import hookspecs
from ttd_plugins.adapter import SUPPORTED_API_VERSIONS, AdapterFamily
from ttd_plugins.errors import (
    AdapterConflictError,
    BackboneNameError,
    PluginError,
    TagExtractionError,
    TTDError,
    choices_sentence,
    one_sentence,
)
from ttd_plugins.hookspecs import DEPRECATED_HOOKS, PROJECT_NAME
from ttd_plugins.plugins.isolation import stdout_to_stderr
from ttd_plugins.tags import TagExtractor

LOAD_PLUGINS_VARIABLE = "TTD_LOAD_PLUGINS"
"""Environment variable that limits loading to some entry points or distributions (a comma list; empty means none)."""

DENY_PLUGINS_VARIABLE = "TTD_PLUGINS_DENY"
"""Environment variable with the entry points or distributions that are not loaded (a comma list)."""

OWN_DISTRIBUTION = "ttd-plugins"

TagExtractorFactory = Callable[..., TagExtractor]
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_T = TypeVar("_T")


@contextmanager
def plugin_errors(owner: str, task: str) -> Iterator[None]:
    """Convert any exception of a plugin, except a :class:`TTDError`, to a :class:`PluginError` that names the plugin.

    Args:
        owner: the plugin, as messages name it.
        task: what the plugin was called for, an infinitive such as ``"list the models"``.
    """
    try:
        with stdout_to_stderr():
            yield
    except TTDError:
        raise
    # A plugin that calls sys.exit() must not end the caller's program.
    except (Exception, SystemExit) as error:
        raise PluginError(f"{owner} failed to {task}: {type(error).__name__}: {one_sentence(error)}") from error


@dataclass(eq=False)
class Plugin:
    """One plugin: its origin, what it registered, and what was refused.

    Attributes:
        name: name of its entry point, or of its module for a built-in one.
        distribution, version: the installed distribution that provides it, or ``None``.
        hooks: names of the hooks that it implements.
        families, tag_extractors: accepted registrations, in order.
        refused: for each refused family its reason.
        problems: one sentence per problem.
        notes: one sentence per change of global state that was undone.
        denied: whether ``TTD_PLUGINS_DENY`` names it, so that it was not loaded.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    hooks: tuple[str, ...] = ()
    families: list[tuple[str, AdapterFamily]] = field(default_factory=list)
    tag_extractors: list[tuple[str, TagExtractorFactory]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    denied: bool = False

    @property
    def owner(self) -> str:
        """The plugin as messages name it."""
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"plugin {self.name!r}{origin}"

    def discard(self, problem: str) -> None:
        """Remove everything that the plugin registered, because of ``problem``."""
        self.hooks = ()
        self.families.clear()
        self.tag_extractors.clear()
        self.problems = [problem]


class Registry:
    """The plugins of this process. Each is registered separately, so that a broken one affects no other."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT_NAME)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self.reserved: set[str] = set()
        """Names of the entry points of our own distribution, which are those of its families and tag extractors."""

    def register(self, plugin: Plugin, implementation: object) -> None:
        """Register ``implementation`` (a module or object with hook implementations) and call its registration hooks.

        Raises:
            PluginError: the plugin cannot be used at all; nothing of it stays registered.
        """
        if self.manager.has_plugin(plugin.name) and plugin.distribution is not None:
            plugin.name = f"{plugin.name}@{plugin.distribution}"
        if self.manager.has_plugin(plugin.name):
            raise PluginError("is not registered, because another plugin has its name")
        if self.manager.is_registered(implementation):
            raise PluginError(f"is registered already, as plugin {self.manager.get_name(implementation)!r}")
        try:
            self.manager.register(implementation, name=plugin.name)
            plugin.hooks = self._checked_hooks(implementation)
            self._call_registration_hooks(plugin, implementation)
        except (Exception, SystemExit) as error:
            self.manager.unregister(name=plugin.name)
            if isinstance(error, PluginError):
                raise
            raise PluginError(f"could not be registered: {one_sentence(error)}") from error
        self.plugins.append(plugin)
        plugin.problems += _unmarked_hooks(implementation, plugin.hooks)
        ignored = [hook for hook in plugin.hooks if hook in DEPRECATED_HOOKS]
        if ignored:
            warnings.warn(
                f"{plugin.owner} implements the hook {', '.join(ignored)}, which is ignored, because "
                "AdapterFamily.claims alone decides; delete it: the next minor release refuses the hook",
                FutureWarning,
                stacklevel=2,
            )

    def unregister(self, plugin: Plugin) -> None:
        """Remove a registered plugin."""
        self.manager.unregister(name=plugin.name)
        self.plugins.remove(plugin)

    def _checked_hooks(self, implementation: object) -> tuple[str, ...]:
        """Return the names of a plugin's hooks; refuse unknown ones as pluggy's ``check_pending`` does for all."""
        callers = self.manager.get_hookcallers(implementation) or []
        known = [caller.name for caller in vars(self.manager.hook).values() if caller.has_spec()]
        for caller in callers:
            implementations = [impl for impl in caller.get_hookimpls() if impl.plugin is implementation]
            if not caller.has_spec() and not all(impl.optionalhook for impl in implementations):
                raise PluginError(f"implements an {choices_sentence('hook', caller.name, known)}")
        return tuple(sorted(caller.name for caller in callers if caller.has_spec()))

    def _call_registration_hooks(self, plugin: Plugin, implementation: object) -> None:
        def register_family(family: AdapterFamily) -> None:
            problem = _family_problem(family)
            if problem is None and any(name == family.name for name, _ in plugin.families):
                plugin.problems.append(f"registers family {family.name!r} twice; the first counts")
            elif problem is None:
                plugin.families.append((family.name, family))
            else:
                plugin.problems.append(problem)
                plugin.refused[str(getattr(family, "name", ""))] = problem

        def register_extractor(name: str, factory: TagExtractorFactory) -> None:
            if not isinstance(name, str) or not _NAME.fullmatch(name) or not callable(factory):
                plugin.problems.append(
                    f"tag extractor {name!r} is refused: it needs a name of lower-case letters, digits and "
                    "underscores, and a callable that builds the extractor"
                )
            elif any(name == other for other, _ in plugin.tag_extractors):
                plugin.problems.append(f"registers tag extractor {name!r} twice; the first counts")
            else:
                plugin.tag_extractors.append((name, factory))

        # Each plugin is called separately, so that an exception can be attributed to it.
        others = [other for other in self.manager.get_plugins() if other is not implementation]
        for hook, register in (
            ("register_adapters", register_family),
            ("register_tag_extractors", register_extractor),
        ):
            try:
                self.manager.subset_hook_caller(hook, remove_plugins=others)(register=register)
            except (Exception, SystemExit) as error:
                raise PluginError(f"raised in {hook}: {type(error).__name__}: {one_sentence(error)}") from error

    # Names ---------------------------------------------------------------------------------------------------------

    def families(self) -> dict[str, AdapterFamily]:
        """Return the families by name, sorted; a name that several plugins registered is left out."""
        return {name: owners[0][1] for name, owners in sorted(self.family_owners().items()) if len(owners) == 1}

    def tag_extractors(self) -> dict[str, TagExtractorFactory]:
        """Return the factories of tag extractors by name, sorted; a name of several plugins is left out."""
        return {name: owners[0][1] for name, owners in sorted(self.extractor_owners().items()) if len(owners) == 1}

    def family_owners(self) -> dict[str, list[tuple[Plugin, AdapterFamily]]]:
        """Return every family name with all plugins that registered it."""
        owners: dict[str, list[tuple[Plugin, AdapterFamily]]] = {}
        for plugin in self.plugins:
            for name, family in plugin.families:
                owners.setdefault(name, []).append((plugin, family))
        return {name: _own_first(found) for name, found in owners.items()}

    def extractor_owners(self) -> dict[str, list[tuple[Plugin, TagExtractorFactory]]]:
        """Return every tag extractor's name with all plugins that registered it."""
        owners: dict[str, list[tuple[Plugin, TagExtractorFactory]]] = {}
        for plugin in self.plugins:
            for name, factory in plugin.tag_extractors:
                owners.setdefault(name, []).append((plugin, factory))
        return {name: _own_first(found) for name, found in owners.items()}

    def family(self, name: str) -> tuple[Plugin, AdapterFamily]:
        """Return the family called ``name``, with its plugin.

        Raises:
            BackboneNameError: no plugin registered the name; the message lists the families.
            AdapterConflictError: several plugins registered the name.
            PluginError: the family was refused, with the reason.
        """
        owners = self.family_owners()
        if name not in owners:
            for plugin in self.plugins:
                if name in plugin.refused:
                    raise PluginError(f"{plugin.owner}: {plugin.refused[name]}")
            raise BackboneNameError(choices_sentence("family", name, owners) + self.not_loaded())
        return _single_owner("family", name, owners[name])

    def tag_extractor(self, name: str) -> tuple[Plugin, TagExtractorFactory]:
        """Return the factory of the tag extractor called ``name``, with its plugin.

        Raises:
            TagExtractionError: no plugin registered the name; the message lists the tag extractors.
            AdapterConflictError: several plugins registered the name.
        """
        owners = self.extractor_owners()
        if name not in owners:
            raise TagExtractionError(choices_sentence("tag extractor", name, owners) + self.not_loaded())
        return _single_owner("tag extractor", name, owners[name])

    def problems(self, plugin: Plugin) -> list[str]:
        """Return one sentence per problem of ``plugin``, conflicts with other plugins included."""
        conflicts = [
            *(_conflict("family", name, owners) for name, owners in self.family_owners().items()),
            *(_conflict("tag extractor", name, owners) for name, owners in self.extractor_owners().items()),
        ]
        return [
            *plugin.problems,
            *self._taken_names(plugin),
            *(sentence for owners, sentence in conflicts if len(owners) > 1 and plugin in owners),
        ]

    def _taken_names(self, plugin: Plugin) -> list[str]:
        """Return one sentence per name of our own distribution that another plugin registers."""
        if plugin.distribution == OWN_DISTRIBUTION:
            return []
        found = []
        for kind, registered, owners in (
            ("family", plugin.families, self.family_owners()),
            ("tag extractor", plugin.tag_extractors, self.extractor_owners()),
        ):
            for name, _ in registered:
                if all(owner is not plugin for owner, _ in owners[name]):
                    found.append(f"registers {kind} {name!r}, which is a name of {OWN_DISTRIBUTION}; it is ignored")
                elif name in self.reserved:
                    found.append(
                        f"registers {kind} {name!r}, which is a name of {OWN_DISTRIBUTION} whose own plugin is not "
                        "loaded; it is used in its place"
                    )
        return found

    def not_loaded(self) -> str:
        """Return the end of a sentence about an unknown name: plugins that failed, which may have provided it."""
        broken = [plugin.owner for plugin in self.plugins if plugin.problems]
        denied = [plugin.owner for plugin in self.plugins if plugin.denied]
        return (f"; not loaded: {', '.join(broken)}, see `ttd plugins`" if broken else "") + (
            f"; denied by {DENY_PLUGINS_VARIABLE}: {', '.join(denied)}" if denied else ""
        )


def _own_first(owners: list[tuple[Plugin, _T]]) -> list[tuple[Plugin, _T]]:
    """Return the registrations that count: those of our own distribution if there is one, and all otherwise."""
    return [pair for pair in owners if pair[0].distribution == OWN_DISTRIBUTION] or owners


def _unmarked_hooks(implementation: object, hooks: tuple[str, ...]) -> list[str]:
    """Return one sentence if functions with the names of hooks lack their mark, or if there are no hooks at all."""
    known = [name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{PROJECT_NAME}_spec")]
    unmarked = [name for name in known if name not in hooks and callable(getattr(implementation, name, None))]
    if unmarked:
        return [
            f"has {' and '.join(unmarked)} without @hookimpl of ttd_plugins, so that nothing calls it; write @hookimpl "
            "above it"
        ]
    if not hooks:
        return [f"has no hook, so that it does nothing; mark a function with @hookimpl: {', '.join(known)}"]
    return []


def _conflict(kind: str, name: str, owners: list[tuple[Plugin, _T]]) -> tuple[list[Plugin], str]:
    """Return the plugins that registered a name, and the sentence that says so."""
    plugins = [plugin for plugin, _ in owners]
    return plugins, (
        f"{kind} {name!r} is registered by {' and by '.join(plugin.owner for plugin in plugins)}, so the name is "
        f"ambiguous and cannot be used; uninstall one, or name the plugins to load in {LOAD_PLUGINS_VARIABLE} or one "
        f"to leave out in {DENY_PLUGINS_VARIABLE}"
    )


def _single_owner(kind: str, name: str, owners: list[tuple[Plugin, _T]]) -> tuple[Plugin, _T]:
    if len(owners) > 1:
        raise AdapterConflictError(_conflict(kind, name, owners)[1])
    return owners[0]


def _family_problem(family: object) -> str | None:
    """Return why a family is refused, or ``None``."""
    if not isinstance(family, AdapterFamily):
        return f"{family!r} is refused: a family is an instance of a subclass of ttd_plugins.adapter.AdapterFamily"
    name = getattr(family, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"family {name!r} is refused: its name may contain lower-case letters, digits and underscores only"
    version = family.api_version
    if not isinstance(version, int) or isinstance(version, bool):
        return (
            f"family {name!r} is refused: its api_version is {version!r} of the type {type(version).__name__}; write "
            f"the whole number, as in api_version = {SUPPORTED_API_VERSIONS[-1]}"
        )
    if version not in SUPPORTED_API_VERSIONS:
        supported = " or ".join(map(str, SUPPORTED_API_VERSIONS))
        return (
            f"family {name!r} is refused: it implements version {version} of the adapter contract, and this "
            f"release of ttd-plugins supports version {supported}; install versions that fit together"
        )
    return None
