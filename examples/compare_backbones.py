"""Compare backbones from Python: which one gains most from TTD, and what does the gain cost in retrieval?

    python examples/compare_backbones.py open_clip:tiny siglip:tiny eva_clip:tiny --out runs/compare
    python examples/compare_backbones.py open_clip:ViT-B-16@openai siglip:google/siglip2-base-patch16-224 \\
        --masks coco/ --pairs pairs/ --out runs/compare

``ttd compare`` does the same from the command line. Without ``--masks`` backbones are tuned and measured on generated
scenes of 48 to 128 pixels with exact ground truth. With ``--masks`` they are tuned on your own pairs and measured on
COCO captions with masks. The control takes the same steps with only the contrastive term, so that the gain is due to
TTD and not to more training. A stopped program resumes when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ttd_plugins.comparison.options import CompareOptions
from ttd_plugins.comparison.results import Comparison
from ttd_plugins.comparison.running import run_comparison
from ttd_plugins.comparison.tables import gain
from ttd_plugins.utils.number_format import format_spread


def ranking(comparison: Comparison) -> list[tuple[str, float, float]]:
    """Name, gain in Caption IoU and gain in R@1 of each backbone, best first; gain is after TTD minus control."""
    rows = []
    for backbone in comparison.backbones:
        up, cost = (gain(backbone, key) for key in comparison.trade_off)
        if up is not None and cost is not None:
            rows.append((backbone.name, up[0], cost[0]))
    return sorted(rows, key=lambda row: -row[1])


def main(arguments: Sequence[str] | None = None) -> Comparison:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbones", nargs="+", help="names as for `ttd compare --backbones`, see docs/comparing.md")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--masks", type=Path, help="measure on COCO captions with masks instead of scenes")
    parser.add_argument("--pairs", help="training pairs for --masks, as for `ttd train --data`")
    parser.add_argument("--images", type=int, help="number of images to measure")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=48)
    args = parser.parse_args(arguments)

    options = CompareOptions(
        backbones=tuple(args.backbones),
        data="coco_captions" if args.masks else "scenes",
        root=args.masks, pairs=args.pairs, limit=args.images,
        seeds=args.seeds, steps=args.steps, batch_size=args.batch_size,
    )  # fmt: skip
    console = Console()
    with console.status("comparing") as status:

        def stage(name: str, total: int):  # type: ignore[no-untyped-def]
            status.update(name)
            return lambda done: None

        comparison = run_comparison(args.out, options, stage=stage)

    table = Table("backbone", "Caption IoU before", "gain by TTD", "retrieval R@1, gain")
    for name, up, cost in ranking(comparison):
        (backbone,) = (one for one in comparison.backbones if one.name == name)
        before = backbone.mean("before", comparison.trade_off[0])
        table.add_row(
            name, format_spread(before, None), format_spread(up, None, sign=True), format_spread(cost, None, sign=True)
        )
    console.print(table)
    for name, reason in comparison.failures.items():
        console.print(f"{name} is left out: {reason}", markup=False)
    console.print(f"report: {args.out / 'report.html'}", markup=False, soft_wrap=True)
    return comparison


if __name__ == "__main__":
    raise SystemExit(bool(main().failures))
