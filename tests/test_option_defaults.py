"""A parameter or field with the name of an option of TTD has its default."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from layers import MODULES

from ttd_plugins.options import TTDOptions

OPTIONS = vars(TTDOptions())
# Modules that need an extra, or are front ends whose flags are generated from the options.
LEFT_OUT = {"app", "attention_lora", "cli", "torchmetrics_classes"}
OTHER_MEANING = {
    ("ttd_plugins.data.source_detection.open_pairs", "threshold"): "a threshold of image-text similarity",
    ("ttd_plugins.data.score_filter.PairFilter", "threshold"): "a threshold of image-text similarity",
    ("ttd_plugins.caption_maps.backbone_notes", "rule"): "None means that nothing is selected",
    ("ttd_plugins.engine.TTD", "extractor"): "None means the option",
    ("ttd_plugins.evaluation.protocol_options.ClassifyProtocol", "activation"): "activation of class scores",
    ("ttd_plugins.evaluation.protocol_options.SegmentProtocol", "activation"): "activation of class maps",
    ("ttd_plugins.evaluation.protocol_options.SegmentProtocol", "threshold"): "a threshold of class maps",
    ("ttd_plugins.evaluation.protocol_options.TextProtocol", "activation"): "activation of evaluated maps",
    ("ttd_plugins.evaluation.protocol_options.TextProtocol", "threshold"): "a threshold of evaluated maps",
}


def parameters() -> Iterator[tuple[str, str, Any]]:
    """Functions and classes of the core, with each parameter that is named as an option, and its default."""
    for module_name in sorted(MODULES):
        if set(module_name.split(".")) & LEFT_OUT:
            continue
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module_name or not callable(value):
                continue
            try:
                signature = inspect.signature(value)
            except (TypeError, ValueError):
                continue
            for parameter in signature.parameters.values():
                # No default, or a factory of a dataclass, which is no value.
                if parameter.name in OPTIONS and repr(parameter.default) not in (repr(parameter.empty), "<factory>"):
                    yield f"{module_name}.{name}", parameter.name, parameter.default


FOUND = {(owner, name): default for owner, name, default in parameters() if owner != "ttd_plugins.options.TTDOptions"}


def test_the_functions_of_the_method_are_compared() -> None:
    owners = {owner.removeprefix("ttd_plugins.") for owner, _ in FOUND}
    assert {"method.losses.map_distance", "method.selection.select_tags", "calibration.fit_calibration"} <= owners
    assert set(FOUND) >= set(OTHER_MEANING)


@pytest.mark.parametrize(("owner", "name"), sorted(set(FOUND) - set(OTHER_MEANING)))
def test_a_parameter_has_the_default_of_the_option(owner: str, name: str) -> None:
    assert FOUND[owner, name] == OPTIONS[name]
