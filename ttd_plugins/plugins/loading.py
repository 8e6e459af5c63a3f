"""The two ways to an adapter, :func:`load` by name and :func:`wrap` for a model object; tag extractors by name."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ttd_plugins.adapter import TOWERS, AdapterFamily, BackboneDescription, DenseAdapter, named_tower_parameters
from ttd_plugins.errors import (
    AdapterConflictError,
    InputError,
    PluginError,
    PluginWarning,
    UnsupportedModelError,
    choices_sentence,
    listed,
    one_sentence,
)
from ttd_plugins.plugins.discovery import get_registry
from ttd_plugins.plugins.names import parse_name
from ttd_plugins.plugins.registry import (
    DENY_PLUGINS_VARIABLE,
    LOAD_PLUGINS_VARIABLE,
    Plugin,
    Registry,
    plugin_errors,
)
from ttd_plugins.tags import TagExtractor
from ttd_plugins.toolkit.fast_inference import Precision, faster_copy
from ttd_plugins.utils import wrapped_models
from ttd_plugins.utils.loading_lock import LOADING_LOCK

ADAPTER_GUIDE = "docs/writing-an-adapter.md"

SourceOpener = Callable[[str, Mapping[str, Any]], DenseAdapter | None]
"""Called with a name and options of the family; returns ``None`` for a plain ``family:model@weights``."""
_source_openers: list[SourceOpener] = []


def register_source_opener(opener: SourceOpener) -> None:
    """Let :func:`load` open what is no plain name; later layers know how to read runs."""
    if opener not in _source_openers:
        _source_openers.append(opener)


def load(
    name: str | os.PathLike[str],
    *,
    lora: int | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    fast: bool | Precision = False,
    **options: Any,
) -> DenseAdapter:
    """Load a backbone by name, or one that was fine-tuned, in evaluation mode.

    Earlier tuning is merged into the weights, so that a fine-tuned backbone is used as any other.
    :func:`ttd_plugins.restore_backbone` and :func:`ttd_plugins.load_lora` return one with its LoRA in place.

    One thread at a time loads: libraries change global state of torch while they build a model.

    Args:
        name: ``family:model@weights``, see :func:`~ttd_plugins.plugins.names.parse_name`; the folder of a run of
            ``ttd train``, of which ``RUN@STEP`` selects a checkpoint; an exported folder; or a name and the folder of a
            run, of LoRA or of an export joined by ``+``, as ``family:model@weights+my-lora``. See
            ``docs/loading.md``.
        lora: a rank, or a dict of arguments for :meth:`~ttd_plugins.adapter.DenseAdapter.add_lora`; ``None`` for none.
        device: the device of the model; by default the one that its family chose.
        fast: whether to return a faster copy for inference only, whose features agree to 1e-3; ``"bfloat16"`` for one
            with lower precision. See :func:`~ttd_plugins.toolkit.fast_inference.optimize_for_inference`.
        options: options of the family, such as its dense mode.

    Raises:
        BackboneNameError: a part of the name is missing or unknown.
        AdapterConflictError: several plugins registered the family.
        UnsupportedModelError: ``fast`` is not possible for this model or device.
        InputError: the device, an option or an argument for LoRA is invalid; ``fast`` is combined with ``lora``; a
            folder does not exist, cannot be read, is damaged or belongs to another backbone.
        PluginError: the plugin raised an exception that is not a TTDError; it is chained as the cause.
        TTDError: the weights cannot be read or downloaded.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    arguments, target = _lora_arguments(lora), _checked_device(device)
    if fast is not False and arguments is not None:
        raise InputError("fast is for inference and lora adds parameters to train; leave one out")
    return faster_copy(_load_as_is(name, options, arguments, target), fast)


def _load_as_is(
    name: str, options: Mapping[str, Any], arguments: Mapping[str, Any] | None, target: torch.device | None
) -> DenseAdapter:
    for opener in _source_openers if isinstance(name, str) else ():
        adapter = opener(name, options)
        if adapter is not None:
            if arguments is not None:
                adapter.add_lora(**arguments)
            return (adapter if target is None else adapter.to(target)).eval()
    return _load_named(name, options, arguments, target)


def _load_named(
    name: str, options: Mapping[str, Any], arguments: Mapping[str, Any] | None, target: torch.device | None
) -> DenseAdapter:
    """Load ``family:model@weights``."""
    backbone = parse_name(name)
    plugin, family = get_registry().family(backbone.family)
    _check_options(f"family {backbone.family!r}", family.load, options, reserved=("model", "weights"))
    with LOADING_LOCK, plugin_errors(plugin.owner, f"load {backbone}"):
        adapter = _checked_adapter(family.load(backbone.model, backbone.weights, **options), plugin)
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
    """Adapt a model object of the caller; train/eval mode and device stay as they are.

    Args:
        model: the model; it is not copied, and not changed unless ``lora`` is passed.
        tokenizer, preprocess: the caller's own, where the family needs them.
        lora: a rank, or a dict of arguments for :meth:`~ttd_plugins.adapter.DenseAdapter.add_lora`; ``None`` for none.
        options: options of the family, such as its dense mode.

    Raises:
        UnsupportedModelError: no family claims the object, or its family refuses a part of it.
        AdapterConflictError: several families claim the object, whatever their order.
        InputError: an option or an argument for LoRA is invalid.
        PluginError: the plugin raised an exception that is not a TTDError; it is chained as the cause.
    """
    plugin, family = _claimant(model)
    what = wrapped_models.class_name(model)
    _check_options(f"family {family.name!r}", family.wrap, options, reserved=("model", "tokenizer", "preprocess"))
    arguments = _lora_arguments(lora)
    with LOADING_LOCK, plugin_errors(plugin.owner, f"wrap {what}"):
        adapter = _checked_adapter(family.wrap(model, tokenizer=tokenizer, preprocess=preprocess, **options), plugin)
        if arguments is not None:
            adapter.add_lora(**arguments)
        return adapter


def family_for_model(model: object) -> str:
    """Return the name of the one family that claims a model object; :func:`wrap` uses it.

    Raises:
        UnsupportedModelError, AdapterConflictError, PluginError: as :func:`wrap`.
    """
    return _claimant(model)[1].name


def _claimant(model: object) -> tuple[Plugin, AdapterFamily]:
    """Return the one family whose ``claims`` accepts a model object, with its plugin.

    ``claims`` of every family is called, so that the order of plugins never decides.
    """
    what = wrapped_models.class_name(model)
    if isinstance(model, str):
        raise UnsupportedModelError(f"wrap() takes a model object; pass the name {model!r} to load()")
    if isinstance(model, DenseAdapter):
        raise UnsupportedModelError(f"{what} is an adapter already; wrap() takes the backbone's own model object")
    if isinstance(getattr(model, "backbone", None), DenseAdapter):
        raise UnsupportedModelError(f"{what} has an adapter already, its attribute backbone; use that")
    wrapped_models.refuse(model)
    registry = get_registry()
    claimants: list[tuple[Plugin, AdapterFamily]] = []
    failed: list[PluginError] = []
    for name in registry.families():
        plugin, family = registry.family(name)
        try:
            with plugin_errors(plugin.owner, f"decide whether family {name!r} claims {what}"):
                if family.claims(model):
                    claimants.append((plugin, family))
        except PluginError as error:
            failed.append(error)
    if len(claimants) > 1:
        claims = " and by ".join(f"family {family.name!r} of {plugin.owner}" for plugin, family in claimants)
        raise AdapterConflictError(
            f"{what} is claimed by {claims}; uninstall one, or name the plugins to load in {LOAD_PLUGINS_VARIABLE} or "
            f"one to leave out in {DENY_PLUGINS_VARIABLE}"
        )
    if claimants:
        for problem in failed:
            warnings.warn(f"{problem}; it was skipped", PluginWarning, stacklevel=3)
        # A wrapper that forwards attributes looks like its model, but names of weights have a prefix.
        inside = wrapped_models.advice_for_unclaimed(model, claimants[0][1].claims)
        if inside is not None:
            raise UnsupportedModelError(f"{what} is a wrapper around a model; {inside}")
        return claimants[0]
    if failed:
        raise PluginError(f"no family claims {what}, and {failed[0]}") from failed[0]
    raise UnsupportedModelError(f"no family claims an object of class {what}{_unclaimed(model, registry)}")


def _unclaimed(model: object, registry: Registry) -> str:
    """Return the end of the sentence about an object that no family claims: the reason, and what to do."""

    def claimed(part: object) -> bool:
        for name in registry.families():
            # A broken family was reported already, for the object itself.
            with suppress(Exception):
                if registry.family(name)[1].claims(part):
                    return True
        return False

    advice = wrapped_models.advice_for_unclaimed(model, claimed)
    if advice is not None:
        return f"; {advice}"
    reasons = []
    for name in registry.families():
        plugin, family = registry.family(name)
        with plugin_errors(plugin.owner, f"explain why family {name!r} does not claim an object"):
            reason = family.unclaimed_reason(model)
        if reason is not None:
            reasons.append(f"; family {name!r} does not, because {reason}")
    return (
        f"{''.join(reasons)}; families: {listed(registry.families())}; {ADAPTER_GUIDE} describes how to write an "
        f"adapter{registry.not_loaded()}"
    )


def make_tag_extractor(name: str, **options: Any) -> TagExtractor:
    """Build the tag extractor called ``name`` with its options.

    Raises:
        TagExtractionError: it does not exist; the message lists the tag extractors.
        AdapterConflictError: several plugins registered the name.
        InputError: an option is unknown.
        PluginError: its factory raised an exception that is not a TTDError.
    """
    plugin, factory = get_registry().tag_extractor(name)
    _check_options(f"tag extractor {name!r}", factory, options, reserved=())
    with plugin_errors(plugin.owner, f"build tag extractor {name!r}"):
        return factory(**options)


def _checked_adapter(adapter: object, plugin: Plugin) -> DenseAdapter:
    if not isinstance(adapter, DenseAdapter):
        raise TypeError(f"it returned a {type(adapter).__name__}, not a DenseAdapter")
    if not isinstance(adapter.description, BackboneDescription):
        raise TypeError(f"its description is a {type(adapter.description).__name__}, not a BackboneDescription")
    adapter.owner = plugin.owner
    adapter.distribution = (plugin.distribution, plugin.version) if plugin.distribution else None
    # A tower without parameters would be trained where it is to be frozen, and the other way round.
    for tower in TOWERS:
        named_tower_parameters(adapter, tower)
    return adapter


def _check_options(
    what: str, function: Callable[..., object], options: Mapping[str, Any], *, reserved: tuple[str, ...]
) -> None:
    """Refuse unknown options with suggestions, unless ``function`` accepts any; ``reserved`` are not the caller's."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in reserved]
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


def _checked_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        if target.type == "meta":
            raise RuntimeError("tensors of the device meta have no values")
    # torch raises AssertionError if it was built without the device, RuntimeError if the machine has none.
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {one_sentence(error)}") from error
    return target
