"""The conformance kit on backbones at the size that people use: `python tests/full_size_table.py --work FOLDER`.

Prints two tables as markdown: what each check says of each backbone, and how far features are from the library's and
from plain formulas. One backbone at a time; what FOLDER holds is not done again, so that a run can be cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import helpers_eva_clip
import helpers_open_clip
import helpers_openai_clip
import helpers_siglip
import torch
from helpers_full_size import BACKBONES, Backbone
from helpers_towers import TOWERS
from torch import Tensor

from ttd_plugins import load
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.testing import CHECKS, check_adapter
from ttd_plugins.testing.check_session import distance
from ttd_plugins.testing.library_reference import library_image_embedding, library_text_embedding

TINY = [f"{family}:tiny@random" for family in ("openai_clip", "open_clip", "siglip", "eva_clip")]
CAPTIONS = ["a dog", "two cats on the green grass beside a red umbrella"]
SIGNS = {"passed": "yes", "failed": "**no**", "skipped": "–"}


# Measuring -----------------------------------------------------------------------------------------------------------


def formula(backbone: Backbone, adapter: DenseAdapter, images: Tensor) -> Tensor:
    """Dense features ``[B, H, W, D]`` of the default mode by plain formulas on the parameters, no adapter involved."""
    description = adapter.description
    side = description.patch_size[0]
    grid = (images.shape[2] // side, images.shape[3] // side)
    model: Any = adapter.model
    if backbone.formula is not None:
        return backbone.formula(model, images)
    if backbone.family == "siglip":
        heads = _heads(model, side)
        with patch.multiple(helpers_siglip, HEADS=heads):
            return helpers_siglip.reference_dense(model, images, "value", "plain").unflatten(1, grid)
    if backbone.family == "openai_clip":
        if hasattr(getattr(model, "visual", None), "layer4"):
            return helpers_openai_clip.reference_cells(model, images)
        heads = _heads(model, side)
        if hasattr(model, "vision_model"):
            width = model.vision_model.embeddings.class_embedding.shape[-1]
        else:
            width = model.visual.class_embedding.shape[-1]
        sizes = {"PATCH": side, "WIDTH": width, "HEADS": heads, "GRID": description.image_size[0] // side}
        with patch.multiple(helpers_openai_clip, **sizes):
            return helpers_openai_clip.reference_dense(model, images)
    reference = helpers_eva_clip if backbone.family == "eva_clip" else helpers_open_clip
    with patch.multiple(reference, PATCH=side):
        return reference.reference_dense(model, images, "value", True, True)


def _heads(model: Any, side: int) -> int:
    """Heads of the attention that the formulas take apart."""
    if hasattr(model, "vision_model"):
        return model.vision_model.encoder.layers[-1].self_attn.num_heads
    trunk = getattr(model.visual, "trunk", None)
    return trunk.attn_pool.num_heads if trunk is not None else model.visual.transformer.resblocks[-1].attn.num_heads


@torch.no_grad()
def differences(backbone: Backbone, adapter: DenseAdapter) -> dict[str, float]:
    """How far features are from the library's and from plain formulas, relative to the largest value, in float32.

    ``one_patch`` is there for SigLIP alone, where pooled and dense features of an image of one patch must be equal.
    """
    adapter.eval()
    height, width = adapter.description.image_size
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    features = adapter.encode_image(images)
    assert features.pooled is not None
    tokens = adapter.tokenize(CAPTIONS)
    ids = tokens.ids
    mask = (torch.arange(ids.shape[1]) < tokens.lengths[:, None]).long()
    own_image, own_text = library_image_embedding(adapter, images), library_text_embedding(adapter, ids, mask)
    assert own_image is not None and own_text is not None
    found = {
        "pooled": distance(features.pooled, own_image),
        "text": distance(adapter.encode_text(ids), own_text),
        "dense": distance(features.patches, formula(backbone, adapter, images)),
    }
    if backbone.family == "siglip":
        side = adapter.description.patch_size[0]
        one = adapter.encode_image(images[..., :side, :side])
        assert one.pooled is not None
        found["one_patch"] = distance(one.patches[:, 0, 0], one.pooled)
    return found


def measure(backbone: Backbone, full: bool = True) -> dict[str, Any]:
    """All checks of one backbone, its differences, its size and the seconds of CPU that the checks took."""
    adapter = backbone.adapter(full)
    parameters = sum(parameter.numel() for parameter in adapter.model.parameters())
    found = differences(backbone, adapter)
    started = time.process_time()
    report = check_adapter(lambda: adapter, family=backbone.family)
    seconds = time.process_time() - started
    return {
        "title": backbone.title,
        "tokens": backbone.tokens,
        "parameters": parameters,
        "differences": found,
        "seconds": seconds,
        **report.as_dict(),
    }


def measure_tiny(name: str) -> dict[str, Any]:
    """The same of a model that comes with the package, checks alone."""
    adapter = load(name)
    started = time.process_time()
    report = check_adapter(lambda: adapter, family=name.partition(":")[0])
    return {
        "title": f"`{name}`",
        "tokens": "its own",
        "parameters": sum(parameter.numel() for parameter in adapter.model.parameters()),
        "differences": {},
        "seconds": time.process_time() - started,
        **report.as_dict(),
    }


# Writing -------------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Two tables, of the backbones and of the checks, and the reasons of what was skipped or failed."""
    lines = [
        "| | backbone | parameters | tokenizer | passed, failed, skipped | pooled | text | dense | one patch | CPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    letters = {name: chr(ord("A") + index) for index, name in enumerate(found)}
    for name, one in found.items():
        states = [check["status"] for check in one["checks"]]
        counts = ", ".join(str(states.count(status)) for status in ("passed", "failed", "skipped"))
        shown = [_number(one["differences"].get(key)) for key in ("pooled", "text", "dense", "one_patch")]
        cells = [letters[name], one["title"], f"{one['parameters'] / 1e6:.1f} M", one["tokens"], counts, *shown]
        lines.append(f"| {' | '.join(cells)} | {one['seconds']:.0f} s |")
    lines += ["", f"| check | {' | '.join(letters.values())} |", "|---|" + "---|" * len(letters)]
    by_name = {name: {check["name"]: check for check in one["checks"]} for name, one in found.items()}
    for check in CHECKS:
        signs = [SIGNS[checks[check.name]["status"]] if check.name in checks else "" for checks in by_name.values()]
        lines.append(f"| `{check.name}` | {' | '.join(signs)} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, checks in by_name.items():
        for check in checks.values():
            if check["status"] == "skipped":
                reasons.setdefault((check["name"], f"skipped: {check['reason']}"), []).append(letters[name])
            elif check["status"] == "failed":
                reasons.setdefault((check["name"], f"failed: {check['seen']}"), []).append(letters[name])
    lines += ["", *(f"- `{name}` ({', '.join(who)}): {why}" for (name, why), who in reasons.items())]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not there yet, one backbone after the other, and print the tables."""
    backbones = BACKBONES | TOWERS
    names = [*TINY, *backbones]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"only these: {', '.join(names)}")
    parser.add_argument("--work", type=Path, required=True, help="folder for what was measured, one file a backbone")
    parser.add_argument("--small", action="store_true", help="small models of the same kinds")
    options = parser.parse_args(arguments)
    wanted = options.names or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    options.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in wanted:
        path = options.work / f"{name.replace(':', '-')}{'-small' if options.small else ''}.json"
        if not path.is_file():
            one = measure(backbones[name], not options.small) if name in backbones else measure_tiny(name)
            path.write_text(json.dumps(one, indent=2))
            print(f"{one['title']}: {'passed' if one['ok'] else 'FAILED'} in {one['seconds']:.0f} s", file=sys.stderr)
        found[name] = json.loads(path.read_text())
    print(markdown(found))


if __name__ == "__main__":
    main()
