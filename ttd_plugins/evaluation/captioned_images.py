"""Captioned photographs as what a training or a comparison measures on: a checked reader, and protocols for its run."""

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
    """A reader whose every file was looked through.

    Args:
        name: as ``ttd eval tags --data`` takes it.
        root: the data set's folder.
        limit: how many pictures are taken, from the start; all by default.
        split: where the layout has several; by default the reader's.

    Raises:
        InputError: there is no picture.
        DatasetError: the layout is wrong; the message names the path.
    """
    more: dict[str, Any] = {"limit": limit, "split": split}
    reader = open_captions(name, root, **{key: value for key, value in more.items() if value is not None})
    if not len(reader):
        raise InputError(f"{str(root)!r} holds no captioned picture")
    reader.check()
    return reader


def preset_protocols(preset: str) -> Protocols:
    """Tag selection and text-level segmentation by a preset's name.

    Raises:
        InputError: there is no such preset.
    """
    if preset not in TAG_PRESETS:
        raise InputError(choices_sentence("preset", preset, TAG_PRESETS))
    return TAG_PRESETS[preset], TEXT_PRESETS[preset]


def as_trained(protocols: Protocols, options: TTDOptions) -> Protocols:
    """Protocols with the words, the rule and the calibration of an engine, so that its own selection is measured."""
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
