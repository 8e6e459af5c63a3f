"""The command that repeats a comparison."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.comparison.data import SCENES
from ttd_plugins.engine import TTDOptions

if TYPE_CHECKING:
    from ttd_plugins.comparison.running import CompareOptions

FLAGS = {
    "data": "--data", "root": "--root", "split": "--split", "pairs": "--pairs", "seeds": "--seeds", "steps": "--steps",
    "batch_size": "--batch-size", "learning_rate": "--lr", "limit": "--limit", "gallery": "--gallery",
    "preset": "--preset", "workers": "--workers", "device": "--device",
}  # fmt: skip
TTD_FLAGS = {"extractor": "--tags", "rule": "--rule", "threshold": "--threshold"}


def repeat_command(out: Path, options: CompareOptions) -> str | None:
    """The ``ttd compare`` that runs ``options`` into ``out``, quoted for a POSIX shell, or ``None``.

    It has every flag that differs from its default, and ``--jobs`` on scenes, whose default depends on the machine.
    ``None`` where no command says the same: a calibration of one's own, or a path with a comma among the backbones.
    """
    names = options.backbones
    if options.ttd.calibration is not None or any("," in name or name != name.strip() for name in names):
        return None
    words = ["ttd", "compare", "--backbones", ",".join(names)]
    defaults = {one.name: one.default for one in fields(options)}
    for name, flag in FLAGS.items():
        value = getattr(options, name)
        if value != defaults[name]:
            words += [flag, str(value)]
    if not options.tune:
        words.append("--no-tune")
    if options.rank != defaults["rank"]:
        words += ["--rank", str(options.rank)] if options.rank else ["--full"]
    if options.data == SCENES:
        words += ["--jobs", str(options.jobs)]
    words += _ttd_words(options.ttd)
    return shlex.join([*words, "--out", str(out)])


def _ttd_words(ttd: TTDOptions) -> list[str]:
    words, plain = [], TTDOptions()
    for one in fields(ttd):
        value = getattr(ttd, one.name)
        if one.name == "extractor_options":
            for key, inner in value.items():
                words += ["--tags-option", f"{key}={_setting(inner)}"]
        elif value != getattr(plain, one.name):
            flag = TTD_FLAGS.get(one.name)
            words += [flag, str(value)] if flag else ["--ttd", f"{one.name}={_setting(value)}"]
    return words


def _setting(value: Any) -> str:
    """A value as the command line reads it: JSON, or a text as it stands where it is no JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)
