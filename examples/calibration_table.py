"""Compare a fitted calibration with each backbone's default on held-out scenes; prints a Markdown table.

    python examples/calibration_table.py
    python examples/calibration_table.py open_clip:tiny siglip:google/siglip-base-patch16-224 --scenes 800

Log-losses are in nats per word; a coin flip scores 0.693. See docs/calibration.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from PIL import Image

from ttd_plugins import load
from ttd_plugins.adapter import Calibration
from ttd_plugins.calibration import CalibrationFit, fit_calibration
from ttd_plugins.embedded.scenes import Scenes
from ttd_plugins.errors import TTDError

BACKBONES = ("openai_clip:tiny", "open_clip:tiny", "siglip:tiny", "eva_clip:tiny")
COLUMNS = ("backbone", "logits", "default map", "its log-loss", "fitted map", "its log-loss", "held-out images, words")


def rows(backbones: Sequence[str], scenes: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Yield the cells of one row per backbone, or one sentence if the backbone cannot be loaded or fitted."""
    pairs = [(Image.fromarray(scene.image), scene.caption) for scene in Scenes("validation", scenes)]
    for name in backbones:
        try:
            backbone = load(name)
            fit = fit_calibration(backbone, pairs, seed=seed)
        except TTDError as error:
            yield (f"`{name}`", str(error))
            continue
        yield (f"`{name}`", backbone.description.logits, *cells(fit))


def cells(fit: CalibrationFit) -> tuple[str, ...]:
    """Return the table cells of one fit."""
    counts = f"{fit.held_out_images}, {2 * fit.held_out_words}"
    fitted = f"**{fit.log_loss:.3f}**"
    return shown(fit.default), f"{fit.default_log_loss:.3f}", shown(fit.calibration), fitted, counts


def shown(calibration: Calibration) -> str:
    """Format as ``10.0 c - 2.50``, where c is the cosine."""
    sign = "-" if calibration.shift < 0 else "+"
    return f"{calibration.scale:.1f} c {sign} {abs(calibration.shift):.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backbones", nargs="*", default=list(BACKBONES), help="family:model@weights")
    parser.add_argument("--scenes", type=int, default=400, help="validation scenes; a quarter is held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of words from other captions")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error(f"--scenes must be 1 or more, not {options.scenes}")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows(options.backbones, options.scenes, options.seed):
        filled = [*row, *[""] * (len(COLUMNS) - len(row))]
        print(f"| {' | '.join(cell.replace('|', '/') for cell in filled)} |", flush=True)


if __name__ == "__main__":
    main()
