"""Names of backbones: ``family:model@weights``."""

from __future__ import annotations

from dataclasses import dataclass

from ttd_plugins.adapter import AdapterFamily
from ttd_plugins.errors import BackboneNameError, PluginError, listed
from ttd_plugins.plugins.discovery import get_registry
from ttd_plugins.plugins.listing import list_backbones
from ttd_plugins.plugins.registry import Registry, plugin_errors

RANDOM_WEIGHTS = "random"


@dataclass(frozen=True)
class BackboneName:
    """The three parts of ``family:model@weights``."""

    family: str
    model: str
    weights: str

    def __str__(self) -> str:
        return f"{self.family}:{self.model}@{self.weights}"


def parse_name(name: str) -> BackboneName:
    """Split ``family:model@weights`` at the first ``:`` and the last ``@``.

    Without ``@weights`` the family's default weights of the model are used; ``@random`` is the only name of random
    weights. The model may contain ``:`` and the weights may be a path.

    Raises:
        BackboneNameError: a part is missing, or the family or (without ``@``) the model is unknown; the message lists
            the choices.
        AdapterConflictError, PluginError: as :func:`~ttd_plugins.plugins.listing.get_family`.
    """
    if not isinstance(name, str):
        raise BackboneNameError(f"a backbone name is a string 'family:model@weights', not a {type(name).__name__}")
    registry = get_registry()
    text = name.strip()
    family_name, colon, rest = text.partition(":")
    if not family_name or not colon:
        raise BackboneNameError(_missing_family(text, registry))
    plugin, family = registry.family(family_name)
    model, at, weights = rest.rpartition("@") if "@" in rest else (rest, "", "")
    with plugin_errors(plugin.owner, f"list the models of family {family_name!r}"):
        if not model:
            raise BackboneNameError(
                f"{text!r} names no model; write {family_name}:MODEL@WEIGHTS with one of {listed(family.models())}"
            )
        if at and not weights:
            raise BackboneNameError(f"{text!r} names no weights after '@'; {_weights_advice(family, model)}")
        if not at:
            default = family.default_weights(model)
            if default is None:
                raise BackboneNameError(f"{text!r} names no weights; {_weights_advice(family, model)}")
            if default == RANDOM_WEIGHTS:
                raise PluginError(f"{plugin.owner}: {text!r} may not mean random weights unless it says @random")
            weights = default
    return BackboneName(family_name, model, weights)


def _weights_advice(family: AdapterFamily, model: str) -> str:
    """Return the end of a sentence that lists the weights of a model; raise if the model is unknown."""
    choices = listed(family.weights(model))
    return f"write {family.name}:{model}@WEIGHTS with {RANDOM_WEIGHTS!r} or one of {choices}"


def _missing_family(text: str, registry: Registry) -> str:
    """Return a sentence about a name that has no family part."""
    known = registry.families()
    if text in known:
        with plugin_errors(registry.family(text)[0].owner, f"list the models of family {text!r}"):
            models = listed(known[text].models())
        return f"{text!r} is a family and names no model; write {text}:MODEL with one of {models}"
    model = text.lstrip(":").partition("@")[0]
    similar = [
        f"{info.family}:{text.lstrip(':')}"
        for info in list_backbones()
        if model in {backbone.model for backbone in info.backbones}
    ]
    hint = f"; did you mean {' or '.join(repr(name) for name in similar)}?" if similar else ";"
    return f"{text!r} does not follow family:model@weights{hint} families: {listed(known)}{registry.not_loaded()}"
