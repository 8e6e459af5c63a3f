"""Discovery of plugins, and the two ways to an adapter: :func:`load` by name and :func:`wrap` for a model object.

Plugins are found through the entry-point group ``ttd_plugins`` and loaded once, on first use. Each is loaded on its
own: one that cannot be imported, breaks the contract or raises is left out with a reason (:func:`list_plugins`, and a
:class:`~ttd_plugins.errors.PluginWarning`), and the others keep working. No answer here depends on the order in which
plugins are found.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import pluggy
import torch
from torch import nn

from ttd_plugins import hookspecs
from ttd_plugins.adapter import SUPPORTED_API_VERSIONS, AdapterFamily, BackboneDescription, DenseAdapter
from ttd_plugins.errors import (
    AdapterConflictError,
    BackboneNameError,
    InputError,
    PluginError,
    PluginWarning,
    TagExtractionError,
    TTDError,
    UnsupportedModelError,
    choices_sentence,
    listed,
    one_sentence,
)
from ttd_plugins.hookspecs import DEPRECATED_HOOKS, PROJECT_NAME
from ttd_plugins.tags import TagExtractor

DEFAULT_PLUGINS = ("ttd_plugins.tags",)
"""Modules that are always loaded; all other plugins, ours included, come through entry points."""

ENTRY_POINT_GROUP = PROJECT_NAME
LOAD_PLUGINS_VARIABLE = "TTD_LOAD_PLUGINS"
"""Environment variable that limits loading to some entry points or distributions (a comma list; empty means none)."""

RANDOM_WEIGHTS = "random"
ADAPTER_GUIDE = "docs/writing-an-adapter.md"

TagExtractorFactory = Callable[..., TagExtractor]
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_T = TypeVar("_T")


# What the listings return --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, as ``ttd plugins`` shows it.

    Attributes:
        name: name of its entry point, or of its module for a built-in one.
        distribution, version: the distribution that brought it, where one did.
        hooks: names of the hooks that it implements.
        families, tag_extractors: names that it registered, refused ones left out.
        error: what was refused and why, in one sentence or several; ``None`` when all is well.
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
    """One architecture: names of its weights (``@random`` left out), and the ones that a name without ``@`` means."""

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


@dataclass(frozen=True)
class BackboneName:
    """The three parts of ``family:model@weights``."""

    family: str
    model: str
    weights: str

    def __str__(self) -> str:
        return f"{self.family}:{self.model}@{self.weights}"


# The registry --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Plugin:
    """One plugin with what it registered and what was refused."""

    name: str
    distribution: str | None = None
    version: str | None = None
    hooks: tuple[str, ...] = ()
    families: list[tuple[str, AdapterFamily]] = field(default_factory=list)
    tag_extractors: list[tuple[str, TagExtractorFactory]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def deprecated_hooks(self) -> tuple[str, ...]:
        """The implemented hooks that are accepted and ignored."""
        return tuple(hook for hook in self.hooks if hook in DEPRECATED_HOOKS)

    @property
    def owner(self) -> str:
        """How messages name the plugin."""
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"plugin {self.name!r}{origin}"

    def drop(self, problem: str) -> None:
        """Forget all that the plugin registered, because of ``problem``."""
        self.hooks = ()
        self.families.clear()
        self.tag_extractors.clear()
        self.problems = [problem]


@contextmanager
def _blame(owner: str, task: str) -> Iterator[None]:
    """Turn whatever a plugin raises, our own errors apart, into one sentence that names it."""
    try:
        yield
    except TTDError:
        raise
    # A plugin that calls sys.exit() must not end the caller's program.
    except (Exception, SystemExit) as error:
        raise PluginError(f"{owner} failed to {task}: {type(error).__name__}: {one_sentence(error)}") from error


class _Registry:
    """The plugins of this process, each loaded on its own."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT_NAME)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[_Plugin] = []

    def load(self) -> None:
        """Load the default plugins, and the entry points that the environment variable lets through."""
        for module in DEFAULT_PLUGINS:
            self.load_one(_Plugin(module, *_own_distribution()), partial(importlib.import_module, module))
        for entry_point, plugin in self.chosen_entry_points():
            self.load_one(plugin, entry_point.load)

    def chosen_entry_points(self) -> list[tuple[importlib.metadata.EntryPoint, _Plugin]]:
        """Entry points to load, in an order that does not depend on the installation."""
        found = []
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            distribution = entry_point.dist
            origin = (distribution.name, distribution.version) if distribution is not None else (None, None)
            found.append((entry_point, _Plugin(entry_point.name, *origin)))
        found.sort(key=lambda pair: (pair[1].name, pair[1].distribution or ""))
        wanted = os.environ.get(LOAD_PLUGINS_VARIABLE)
        if wanted is None:
            return found
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        known = {known for _, plugin in found for known in (plugin.name, plugin.distribution) if known}
        for name in names:
            if _same_name(name) not in {_same_name(other) for other in (*known, *DEFAULT_PLUGINS)}:
                unknown = _Plugin(name)
                unknown.drop(f"{LOAD_PLUGINS_VARIABLE}: {choices_sentence('plugin', name, known)}")
                self.plugins.append(unknown)
        accepted = {_same_name(name) for name in names}
        return [
            pair
            for pair in found
            if _same_name(pair[1].name) in accepted or _same_name(pair[1].distribution or "") in accepted
        ]

    def load_one(self, plugin: _Plugin, importer: Callable[[], object]) -> None:
        """Import and register one plugin; whatever goes wrong is written down on it."""
        try:
            imported = importer()
        # A module that calls sys.exit() on import must not end the caller's program.
        except (Exception, SystemExit) as error:
            plugin.drop(f"could not be imported: {type(error).__name__}: {one_sentence(error)}")
            self.plugins.append(plugin)
            return
        try:
            self.register(plugin, imported)
        except PluginError as error:
            plugin.drop(str(error))
            self.plugins.append(plugin)

    def register(self, plugin: _Plugin, implementation: object) -> None:
        """Register ``implementation`` and collect what it brings.

        Raises:
            PluginError: the plugin cannot be used at all; nothing of it stays behind.
        """
        if self.manager.has_plugin(plugin.name) and plugin.distribution is not None:
            plugin.name = f"{plugin.name}@{plugin.distribution}"
        if self.manager.has_plugin(plugin.name):
            raise PluginError("is not registered, because another plugin has its name")
        if self.manager.is_registered(implementation):
            raise PluginError(f"is registered already, as plugin {self.manager.get_name(implementation)!r}")
        try:
            self.manager.register(implementation, name=plugin.name)
            plugin.hooks = self.checked_hooks(implementation)
            self.collect(plugin, implementation)
        except (Exception, SystemExit) as error:
            self.manager.unregister(name=plugin.name)
            if isinstance(error, PluginError):
                raise
            raise PluginError(f"could not be registered: {one_sentence(error)}") from error
        self.plugins.append(plugin)
        if plugin.deprecated_hooks:
            warnings.warn(
                f"{plugin.owner} implements the hook {', '.join(plugin.deprecated_hooks)}, which is ignored, because "
                "AdapterFamily.claims alone decides; delete it: the next minor release refuses the hook",
                FutureWarning,
                stacklevel=2,
            )

    def unregister(self, plugin: _Plugin) -> None:
        """Take a registered plugin out again."""
        self.manager.unregister(name=plugin.name)
        self.plugins.remove(plugin)

    def checked_hooks(self, implementation: object) -> tuple[str, ...]:
        """Names of the hooks of a plugin; the same refusal as pluggy's ``check_pending``, for one plugin."""
        callers = self.manager.get_hookcallers(implementation) or []
        known = [caller.name for caller in vars(self.manager.hook).values() if caller.has_spec()]
        for caller in callers:
            implementations = [impl for impl in caller.get_hookimpls() if impl.plugin is implementation]
            if not caller.has_spec() and not all(impl.optionalhook for impl in implementations):
                raise PluginError(f"implements an {choices_sentence('hook', caller.name, known)}")
        return tuple(sorted(caller.name for caller in callers if caller.has_spec()))

    def alone(self, hook: str, implementation: object) -> pluggy.HookCaller:
        """A caller of ``hook`` that asks one plugin, so that its answer and its exceptions are known to be its own."""
        others = [other for other in self.manager.get_plugins() if other is not implementation]
        return self.manager.subset_hook_caller(hook, remove_plugins=others)

    def collect(self, plugin: _Plugin, implementation: object) -> None:
        """Call the registration hooks of one plugin."""

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
                    f"tag extractor {name!r} is refused: it takes a name of lower-case letters, digits and "
                    "underscores, and a callable that builds the extractor"
                )
            elif any(name == other for other, _ in plugin.tag_extractors):
                plugin.problems.append(f"registers tag extractor {name!r} twice; the first counts")
            else:
                plugin.tag_extractors.append((name, factory))

        for hook, register in (
            ("register_adapters", register_family),
            ("register_tag_extractors", register_extractor),
        ):
            try:
                self.alone(hook, implementation)(register=register)
            except (Exception, SystemExit) as error:
                raise PluginError(f"raised in {hook}: {type(error).__name__}: {one_sentence(error)}") from error

    # Names ---------------------------------------------------------------------------------------------------------

    def family_owners(self) -> dict[str, list[tuple[_Plugin, AdapterFamily]]]:
        """Every family name with all plugins that registered it."""
        owners: dict[str, list[tuple[_Plugin, AdapterFamily]]] = {}
        for plugin in self.plugins:
            for name, family in plugin.families:
                owners.setdefault(name, []).append((plugin, family))
        return owners

    def extractor_owners(self) -> dict[str, list[tuple[_Plugin, TagExtractorFactory]]]:
        """Every tag extractor's name with all plugins that registered it."""
        owners: dict[str, list[tuple[_Plugin, TagExtractorFactory]]] = {}
        for plugin in self.plugins:
            for name, factory in plugin.tag_extractors:
                owners.setdefault(name, []).append((plugin, factory))
        return owners

    def known_families(self) -> set[str]:
        """Names of all families that a plugin tried to register, refused ones included."""
        return {*self.family_owners(), *(name for plugin in self.plugins for name in plugin.refused)}

    def conflicts(self, plugin: _Plugin) -> list[str]:
        """Sentences about the names of ``plugin`` that are registered more than once."""
        found = [_conflict("family", name, owners) for name, owners in self.family_owners().items()]
        found += [_conflict("tag extractor", name, owners) for name, owners in self.extractor_owners().items()]
        return [sentence for owners, sentence in found if len(owners) > 1 and plugin in owners]

    def problems(self, plugin: _Plugin) -> list[str]:
        """All that is wrong with ``plugin``."""
        return [*plugin.problems, *self.conflicts(plugin)]

    def family(self, name: str) -> tuple[_Plugin, AdapterFamily]:
        """The plugin and the family called ``name``; the errors are those of :func:`get_family`."""
        owners = self.family_owners()
        if name not in owners:
            for plugin in self.plugins:
                if name in plugin.refused:
                    raise PluginError(f"{plugin.owner}: {plugin.refused[name]}")
            raise BackboneNameError(choices_sentence("family", name, owners) + self.left_out())
        return _only("family", name, owners[name])

    def extractor(self, name: str) -> tuple[_Plugin, TagExtractorFactory]:
        """The plugin and the factory of a tag extractor; the errors are those of :func:`make_tag_extractor`."""
        owners = self.extractor_owners()
        if name not in owners:
            raise TagExtractionError(choices_sentence("tag extractor", name, owners) + self.left_out())
        return _only("tag extractor", name, owners[name])

    def left_out(self) -> str:
        """The end of a sentence about an unknown name, which a plugin that did not load might have known."""
        broken = [plugin.owner for plugin in self.plugins if plugin.problems]
        return f"; not loaded: {', '.join(broken)}, see `ttd plugins`" if broken else ""


def _own_distribution() -> tuple[str, str]:
    from ttd_plugins import __version__

    return "ttd-plugins", __version__


def _same_name(name: str) -> str:
    # Distribution names compare as the packaging standard says; entry points are treated alike.
    return re.sub(r"[-_.]+", "-", name).lower()


def _conflict(kind: str, name: str, owners: list[tuple[_Plugin, _T]]) -> tuple[list[_Plugin], str]:
    plugins = [plugin for plugin, _ in owners]
    return plugins, (
        f"{kind} {name!r} is registered by {' and by '.join(plugin.owner for plugin in plugins)}, so none of them gets "
        f"the name; uninstall one, or say which plugins to load in {LOAD_PLUGINS_VARIABLE}"
    )


def _only(kind: str, name: str, owners: list[tuple[_Plugin, _T]]) -> tuple[_Plugin, _T]:
    if len(owners) > 1:
        raise AdapterConflictError(_conflict(kind, name, owners)[1])
    return owners[0]


def _family_problem(family: object) -> str | None:
    """Why a family is refused, or ``None``."""
    if not isinstance(family, AdapterFamily):
        return f"{family!r} is refused: a family is an instance of a subclass of ttd_plugins.adapter.AdapterFamily"
    name = getattr(family, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"family {name!r} is refused: its name takes lower-case letters, digits and underscores"
    if family.api_version not in SUPPORTED_API_VERSIONS:
        spoken = " or ".join(map(str, SUPPORTED_API_VERSIONS))
        return (
            f"family {name!r} is refused: it speaks version {family.api_version} of the adapter contract and this "
            f"release of ttd-plugins speaks version {spoken}; install versions that fit together"
        )
    return None


_lock = threading.RLock()
_loaded: _Registry | None = None
_loading = False


def _registry() -> _Registry:
    global _loaded, _loading
    with _lock:
        if _loading:
            raise PluginError("plugins were asked for while they are being loaded; ask when they are used instead")
        if _loaded is None:
            registry = _Registry()
            _loading = True
            try:
                registry.load()
            finally:
                _loading = False
            _loaded = registry
            for plugin in registry.plugins:
                for problem in registry.problems(plugin):
                    warnings.warn(f"{plugin.owner}: {problem}", PluginWarning, stacklevel=3)
        return _loaded


# Public: plugins -----------------------------------------------------------------------------------------------------


def plugin_manager() -> pluggy.PluginManager:
    """The pluggy manager that holds the loaded plugins; they are loaded now if they were not."""
    return _registry().manager


@contextmanager
def temporary_plugin(plugin: object, name: str | None = None) -> Iterator[PluginInfo]:
    """Register ``plugin`` for the duration of a ``with`` block, for tests.

    Args:
        plugin: a module, or any object whose methods carry ``@hookimpl``.
        name: its name in messages and listings; by default its ``__name__`` or that of its class.

    Yields:
        What the listing says of it.

    Raises:
        PluginError: the plugin cannot be registered (an unknown hook, an exception in a registration hook, a plugin
            that is there already).
    """
    registry = _registry()
    entry = _Plugin(name or getattr(plugin, "__name__", None) or type(plugin).__name__)
    try:
        registry.register(entry, plugin)
    except PluginError as error:
        raise PluginError(f"{entry.owner} {error}") from error
    try:
        yield _info(registry, entry)
    finally:
        registry.unregister(entry)


def _info(registry: _Registry, plugin: _Plugin) -> PluginInfo:
    families, extractors = registry.family_owners(), registry.extractor_owners()
    problems = registry.problems(plugin)
    return PluginInfo(
        name=plugin.name,
        distribution=plugin.distribution,
        version=plugin.version,
        hooks=plugin.hooks,
        families=tuple(name for name, _ in plugin.families if len(families[name]) == 1),
        tag_extractors=tuple(name for name, _ in plugin.tag_extractors if len(extractors[name]) == 1),
        error="; ".join(problems) if problems else None,
    )


def list_plugins() -> list[PluginInfo]:
    """All plugins, those that could not be loaded included, built-in ones first."""
    registry = _registry()
    return [_info(registry, plugin) for plugin in registry.plugins]


def families() -> dict[str, AdapterFamily]:
    """Adapter families by name; a name that two plugins claim is left out (see :func:`list_plugins`)."""
    return {name: owners[0][1] for name, owners in sorted(_registry().family_owners().items()) if len(owners) == 1}


def get_family(name: str) -> AdapterFamily:
    """The adapter family called ``name``.

    Raises:
        BackboneNameError: there is none; the message lists the families.
        AdapterConflictError: more than one plugin registered the name.
        PluginError: the family was refused, for instance because of its ``api_version``.
    """
    return _registry().family(name)[1]


def tag_extractors() -> dict[str, TagExtractorFactory]:
    """Factories of tag extractors by name; a name that two plugins claim is left out (see :func:`list_plugins`)."""
    return {name: owners[0][1] for name, owners in sorted(_registry().extractor_owners().items()) if len(owners) == 1}


def make_tag_extractor(name: str, **options: Any) -> TagExtractor:
    """Build the tag extractor called ``name`` with its own ``options``.

    Raises:
        TagExtractionError: there is none of that name, or its resources are absent.
        InputError: it has no such option.
        AdapterConflictError: more than one plugin registered the name.
        MissingDependencyError: it needs something that is not installed.
        PluginError: its plugin raised something else.
    """
    plugin, factory = _registry().extractor(name)
    _check_options(f"tag extractor {name!r}", factory, options, given=())
    with _blame(plugin.owner, f"build tag extractor {name!r}"):
        return factory(**options)


def list_backbones(family: str | None = None, pattern: str | None = None) -> list[FamilyInfo]:
    """Families with their architectures and weights.

    A family that cannot list its models (its library is not installed, say) has an ``error`` and no backbones.

    Args:
        family: only this one.
        pattern: only architectures whose name, with or without the family before it and weights behind it, contains
            this text, or fits it where it has ``*`` or ``?``; case is ignored.

    Raises:
        BackboneNameError, AdapterConflictError, PluginError: as :func:`get_family`, for a ``family`` that is given.
    """
    registry = _registry()
    names = [family] if family is not None else sorted(families())
    return [_family_info(*registry.family(name), pattern) for name in names]


def _family_info(plugin: _Plugin, family: AdapterFamily, pattern: str | None) -> FamilyInfo:
    found: list[BackboneInfo] = []
    error = None
    summary = ""
    try:
        with _blame(plugin.owner, f"list the models of family {family.name!r}"):
            summary = _text("summary", family.summary)
            for model in family.models():
                weights = tuple(_text("a name of weights", name) for name in family.weights(model))
                info = BackboneInfo(_text("a model's name", model), weights, family.default_weights(model))
                if pattern is None or _fits(family.name, info, pattern):
                    found.append(info)
    except TTDError as problem:
        found, error = [], str(problem)
    return FamilyInfo(family.name, summary, plugin.name, tuple(found), error)


def _text(what: str, given: object) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{what} is a {type(given).__name__} where a string is due")
    return given


def _fits(family: str, info: BackboneInfo, pattern: str) -> bool:
    wanted = pattern.lower() if any(character in pattern for character in "*?") else f"*{pattern.lower()}*"
    models = [info.model, *(f"{info.model}@{tag}" for tag in info.weights)]
    return any(fnmatchcase(name.lower(), wanted) for model in models for name in (model, f"{family}:{model}"))


# Public: adapters ----------------------------------------------------------------------------------------------------


def parse_name(name: str) -> BackboneName:
    """Split ``family:model@weights`` at the first ``:`` and the last ``@``.

    ``@weights`` may be left out where the family has default weights for the model; random weights are meant by
    ``@random`` alone. The model may hold ``:`` and the weights may be a path.

    Raises:
        BackboneNameError: a part is missing, or the family or (without ``@``) the model is unknown; the message lists
            the choices.
        AdapterConflictError, PluginError: as :func:`get_family`.
    """
    if not isinstance(name, str):
        raise BackboneNameError(f"a backbone name is a string 'family:model@weights', not a {type(name).__name__}")
    registry = _registry()
    text = name.strip()
    family_name, colon, rest = text.partition(":")
    if not family_name or not colon:
        raise BackboneNameError(_without_family(text, registry))
    plugin, family = registry.family(family_name)
    model, at, weights = rest.rpartition("@") if "@" in rest else (rest, "", "")
    with _blame(plugin.owner, f"list the models of family {family_name!r}"):
        if not model:
            raise BackboneNameError(
                f"{text!r} names no model; write {family_name}:MODEL@WEIGHTS with one of {listed(family.models())}"
            )
        if at and not weights:
            raise BackboneNameError(f"{text!r} names no weights after '@'; {_weights_of(family, model)}")
        if not at:
            default = family.default_weights(model)
            if default is None:
                raise BackboneNameError(f"{text!r} names no weights; {_weights_of(family, model)}")
            if default == RANDOM_WEIGHTS:
                raise PluginError(f"{plugin.owner}: {text!r} may not mean random weights unless it says @random")
            weights = default
    return BackboneName(family_name, model, weights)


def _weights_of(family: AdapterFamily, model: str) -> str:
    """The end of a sentence that lists the weights of a model; raises where the model is unknown."""
    choices = listed(family.weights(model))
    return f"write {family.name}:{model}@WEIGHTS with {RANDOM_WEIGHTS!r} or one of {choices}"


def _without_family(text: str, registry: _Registry) -> str:
    """A sentence about a name that has no family part."""
    known = families()
    if text in known:
        with _blame(registry.family(text)[0].owner, f"list the models of family {text!r}"):
            models = listed(known[text].models())
        return f"{text!r} is a family and names no model; write {text}:MODEL with one of {models}"
    model = text.lstrip(":").partition("@")[0]
    meant = [f"{info.family}:{text.lstrip(':')}" for info in list_backbones() if model in _models(info)]
    hint = f"; did you mean {' or '.join(repr(name) for name in meant)}?" if meant else ";"
    return f"{text!r} does not follow family:model@weights{hint} families: {listed(known)}{registry.left_out()}"


def _models(info: FamilyInfo) -> set[str]:
    return {backbone.model for backbone in info.backbones}


def load(
    name: str,
    *,
    lora: int | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> DenseAdapter:
    """Load a backbone by name, in evaluation mode.

    Args:
        name: ``family:model@weights``; see :func:`parse_name`.
        lora: a rank, or a dict of arguments for :meth:`~ttd_plugins.adapter.DenseAdapter.add_lora`; ``None`` for none.
        device: where the model goes; by default it stays where its family put it.
        options: options of the family, such as its dense mode.

    Raises:
        BackboneNameError: a part of the name is missing or unknown.
        AdapterConflictError: more than one plugin registered the family.
        InputError: the device, an option or an argument for LoRA is not one.
        PluginError: the plugin raised something that is not ours; it is chained as the cause.
        TTDError: the weights cannot be read or downloaded.
    """
    backbone = parse_name(name)
    plugin, family = _registry().family(backbone.family)
    _check_options(f"family {backbone.family!r}", family.load, options, given=("model", "weights"))
    arguments = _lora_arguments(lora)
    target = _device(device)
    with _blame(plugin.owner, f"load {backbone}"):
        adapter = _checked(family.load(backbone.model, backbone.weights, **options), plugin)
        if arguments is not None:
            adapter.add_lora(**arguments)
        if target is not None:
            adapter.to(target)
        return adapter.eval()


def wrap(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    preprocess: Any = None,
    lora: int | Mapping[str, Any] | None = None,
    **options: Any,
) -> DenseAdapter:
    """Adapt a model object that the caller already has; train/eval mode and device stay as they are.

    Args:
        model: the model; it is not copied, and not changed unless ``lora`` is given.
        tokenizer, preprocess: the caller's own, where the family needs them.
        lora: a rank, or a dict of arguments for :meth:`~ttd_plugins.adapter.DenseAdapter.add_lora`; ``None`` for none.
        options: options of the family, such as its dense mode.

    Raises:
        UnsupportedModelError: no family takes the object, or the one that does refuses a part of it.
        AdapterConflictError: more than one family claims the object, whatever their order.
        InputError: an option or an argument for LoRA is not one.
        PluginError: the plugin raised something that is not ours; it is chained as the cause.
    """
    plugin, family = _claimant(model)
    what = _class_name(model)
    _check_options(f"family {family.name!r}", family.wrap, options, given=("model", "tokenizer", "preprocess"))
    arguments = _lora_arguments(lora)
    with _blame(plugin.owner, f"wrap {what}"):
        adapter = _checked(family.wrap(model, tokenizer=tokenizer, preprocess=preprocess, **options), plugin)
        if arguments is not None:
            adapter.add_lora(**arguments)
        return adapter


def family_for_model(model: object) -> str:
    """Name of the one family that takes a model object; :func:`wrap` uses it.

    Raises:
        UnsupportedModelError, AdapterConflictError, PluginError: as :func:`wrap`.
    """
    return _claimant(model)[1].name


def _claimant(model: object) -> tuple[_Plugin, AdapterFamily]:
    """Return the one family whose ``claims`` accepts a model object, with its plugin.

    Every family is asked, so that the order of plugins never decides.
    """
    what = _class_name(model)
    if isinstance(model, str):
        raise UnsupportedModelError(f"wrap() takes a model object; give the name {model!r} to load()")
    if isinstance(model, DenseAdapter):
        raise UnsupportedModelError(f"{what} is an adapter already; wrap() takes the backbone's own model object")
    registry = _registry()
    claimants: list[tuple[_Plugin, AdapterFamily]] = []
    failed: list[PluginError] = []
    for name in sorted(families()):
        plugin, family = registry.family(name)
        try:
            with _blame(plugin.owner, f"decide whether family {name!r} claims {what}"):
                if family.claims(model):
                    claimants.append((plugin, family))
        except PluginError as error:
            failed.append(error)
    if len(claimants) > 1:
        claims = " and by ".join(f"family {family.name!r} of {plugin.owner}" for plugin, family in claimants)
        raise AdapterConflictError(
            f"{what} is claimed by {claims}; uninstall one, or name the plugins to load in {LOAD_PLUGINS_VARIABLE}"
        )
    if claimants:
        for problem in failed:
            warnings.warn(f"{problem}; it was skipped", PluginWarning, stacklevel=3)
        return claimants[0]
    if failed:
        raise PluginError(f"no family claims {what}, and {failed[0]}") from failed[0]
    raise UnsupportedModelError(
        f"no family claims an object of class {what}; families: {listed(families())}; {ADAPTER_GUIDE} describes how to "
        f"write an adapter{registry.left_out()}"
    )


def _class_name(model: object) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _checked(adapter: object, plugin: _Plugin) -> DenseAdapter:
    if not isinstance(adapter, DenseAdapter):
        raise TypeError(f"it returned a {type(adapter).__name__} where a DenseAdapter is due")
    if not isinstance(adapter.description, BackboneDescription):
        raise TypeError(f"its description is a {type(adapter.description).__name__}")
    adapter.owner = plugin.owner
    return adapter


def explain(error: BaseException) -> PluginError | None:
    """The sentence about an exception that came out of somebody's plugin while it worked, for the command line.

    Whose it is, the traceback tells: the innermost frame that belongs to a package of a plugin. An exception of this
    distribution's own plugins is a bug to be seen in full.

    Returns:
        An error that names the plugin, or ``None`` where no other distribution's plugin had a part in it.
    """
    registry = _loaded
    frames = [] if registry is None else list(traceback.walk_tb(error.__traceback__))
    for frame, _ in reversed(frames):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        for plugin in registry.plugins if registry is not None else ():
            brought = [type(family) for _, family in plugin.families] + [
                factory for _, factory in plugin.tag_extractors
            ]
            packages = {str(getattr(one, "__module__", "")).partition(".")[0] for one in brought}
            if package in packages and plugin.distribution != _own_distribution()[0]:
                reason = f"{type(error).__name__}: {one_sentence(error)}"
                return PluginError(f"{plugin.owner} failed in {frame.f_code.co_qualname}: {reason}")
    return None


def _check_options(
    what: str, function: Callable[..., object], options: Mapping[str, Any], given: tuple[str, ...]
) -> None:
    """Refuse misspelt options with suggestions, unless ``function`` takes any; ``given`` are not the caller's."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in given]
    for option in options:
        if option not in known:
            raise InputError(choices_sentence(f"option of {what}", option, known))


def _lora_arguments(lora: int | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if lora is None:
        return None
    if isinstance(lora, int) and not isinstance(lora, bool):
        lora = {"rank": lora}
    if not isinstance(lora, Mapping):
        raise InputError(f"lora is a rank, a dict of arguments for add_lora() or None, not {lora!r}")
    known = [name for name in inspect.signature(DenseAdapter.add_lora).parameters if name != "self"]
    for argument in lora:
        if argument not in known:
            raise InputError(choices_sentence("argument of lora", str(argument), known))
    rank = lora.get("rank", 1)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"the rank of LoRA is a whole number of at least 1, not {rank!r}")
    return dict(lora)


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    # torch raises AssertionError where it was built without the device, RuntimeError where there is none.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {one_sentence(error)}") from error
    return target
