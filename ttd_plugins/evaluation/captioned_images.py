"""Captioned images on which a training run or a comparison is evaluated: a checked reader, and options of protocols."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ttd_plugins.engine import TTDOptions
from ttd_plugins.errors import InputError, choices_sentence
from ttd_plugins.evaluation.datasets import CaptionData, open_captions
from ttd_plugins.evaluation.protocols import TAG_PRESETS, TEXT_PRESETS, TagProtocol, TextProtocol

Protocols = tuple[TagProtocol, TextProtocol]


def open_labelled(name: str, root: Path | str, *, limit: int | None = None, split: str | None = None) -> CaptionData:
    """Open a captioned data set and check all its files.

    Args:
        name: name of the data set, as for ``ttd eval tags --data``.
        root: its folder.
        limit: number of images, from the start; by default all.
        split: the split, if the layout has several; by default the reader's.

    Raises:
        InputError: the name is unknown, or there are no images.
        DatasetError: the layout is wrong, and the message names the path; or no caption has a true tag.
    """
    more: dict[str, Any] = {"limit": limit, "split": split}
    reader = open_captions(name, root, **{key: value for key, value in more.items() if value is not None})
    if not len(reader):
        raise InputError(f"{str(root)!r} contains no captioned images")
    reader.check()
    reader.require_truth()
    return reader


def preset_protocols(preset: str) -> Protocols:
    """Return the options of tag selection and text-level segmentation of a preset.

    Raises:
        InputError: the preset is unknown.
    """
    if preset not in TAG_PRESETS:
        raise InputError(choices_sentence("preset", preset, TAG_PRESETS))
    return TAG_PRESETS[preset], TEXT_PRESETS[preset]


def as_trained(protocols: Protocols, options: TTDOptions) -> Protocols:
    """Return the protocols with the extractor, selection rule and calibration of an engine's options."""
    tags, text = protocols
    return (
        replace(
            tags,
            extractor=options.extractor,
            extractor_options=options.extractor_options,
            template=options.template,
            rule=options.rule,
            threshold=options.threshold,
            calibration=options.calibration,
        ),
        replace(text, calibration=options.calibration),
    )
