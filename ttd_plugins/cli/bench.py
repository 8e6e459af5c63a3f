"""``ttd bench``: the cost of a TTD step next to a contrastive step: time, memory and counted operations."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ttd_plugins.cli import completion, image_maps
from ttd_plugins.cli.help_pages import DATA, MODEL, RUN, TRAINING, examples

GIGA, TERA, MEBI = 1e9, 1e12, 2**20


@examples(
    (
        "A quick measurement on this machine",
        "ttd bench --backbone open_clip:tiny --batch-size 4 --repeats 1 --no-memory",
    ),
    ("LoRA on both towers, as a JSON object", "ttd bench --backbone open_clip:ViT-B-16 --lora 16 --json"),
    (
        "How the cost grows on a GPU",
        "ttd bench --backbone open_clip:ViT-B-16 --device cuda \\\n    --precision bfloat16 --growth",
    ),
)
def command(
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            metavar="NAME",
            help="family:model, with @weights, a run or an exported folder; random weights where none are named.",
            rich_help_panel=MODEL,
            autocompletion=completion.backbones,
        ),
    ] = image_maps.DEFAULT_BACKBONE,
    backbone_option: image_maps.BackboneSettings = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Pairs in a step.", rich_help_panel=DATA)
    ] = 16,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE|FOLDER",
            help="Captions: a file in COCO's format, or its folder.  [default: built-in ones]",
            rich_help_panel=DATA,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            metavar="N",
            help="Side of the input in pixels.  [default: the backbone's]",
            rich_help_panel=DATA,
        ),
    ] = None,
    lora: Annotated[
        int,
        typer.Option(
            "--lora",
            metavar="RANK",
            help="LoRA rank on both towers; 0 trains all weights.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the image tower; for GPUs.", rich_help_panel=RUN)
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="float32|bfloat16",
            help="float32, or bfloat16 for autocast.",
            rich_help_panel=RUN,
            autocompletion=completion.one_of(("float32", "bfloat16")),
        ),
    ] = "float32",
    repeats: Annotated[
        int,
        typer.Option("--repeats", metavar="N", help="Rounds; each measures every variant once.", rich_help_panel=RUN),
    ] = 5,
    growth: Annotated[
        bool,
        typer.Option(
            "--growth",
            help="Also measure growth with batch size, image size and tags per caption.",
            rich_help_panel=RUN,
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory",
            help="Measure peak memory, each variant in its own process.",
            rich_help_panel=RUN,
        ),
    ] = True,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            "--peak-tflops",
            metavar="NUMBER",
            help="Peak of the device from its datasheet.  [default: measured]",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: image_maps.DeviceOption = None,
    as_json: image_maps.JsonOption = False,
) -> None:
    """Measure the cost of a TTD step.

    Contrastive steps are measured next to it. Variants take turns in one run: contrastive steps with full and with
    trimmed texts; the TTD step with and without the contrastive term; a TTD step that shares nothing; dense features
    and the library's own image encoding.
    """
    from ttd_plugins.benchmark.step_variants import BenchOptions

    options = BenchOptions(
        backbone=backbone,
        backbone_options=image_maps.parse_settings(backbone_option),
        batch_size=batch_size,
        data=data,
        image_size=image_size,
        lora=lora,
        compile=compile_blocks,
        precision=precision,
        repeats=repeats,
        device=device,
        peak_tflops=peak_tflops,
    )
    from rich.console import Console

    from ttd_plugins.benchmark.growth import run_growth
    from ttd_plugins.benchmark.measure import run_benchmark

    with Console(stderr=True).status("") as status:
        found = run_benchmark(options, memory=memory, on_progress=status.update)
        if growth:
            found["growth"] = run_growth(options, on_progress=status.update)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_report(found)


def print_report(found: dict[str, Any]) -> None:
    """Print tables of variants, of ratios beside their counted limits, of the parts of a step, and of growth."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from ttd_plugins.benchmark.step_variants import TITLES

    console = Console()

    def table(title: str, first: str, *columns: str) -> Table:
        made = Table(box=SIMPLE, title=title, title_justify="left")
        made.add_column(first)
        for column in columns:
            made.add_column(column, justify="right")
        return made

    compiled = "compiled image blocks, " if found["compiled"] else ""
    console.print(
        f"{found['backbone']}: batch {found['batch_size']}, {'x'.join(map(str, found['image_size']))} pixels, "
        f"{found['precision']}, {compiled}{found['trained']} ({found['trainable_parameters']:,} parameters), "
        f"{found['device']}, {found['threads']} threads\n"
        f"{found['data']}: {found['tags_per_caption']:.1f} tags a caption, "
        f"{found['distinct_tags']} distinct tags a batch, {found['tokens_per_caption']:.1f} tokens a caption "
        f"({found['tokenizer']} tokenizer)",
        highlight=False,
        soft_wrap=True,
    )
    memory = found["memory"] or {}
    variants = table("Variants", "variant", "seconds", "low", "high", "GFLOP", "peak MiB")
    for name, seconds in found["seconds"].items():
        used = memory.get(name)
        variants.add_row(
            TITLES[name],
            *(f"{seconds[key]:.4g}" for key in ("median", "low", "high")),
            f"{found['operations'][name] / GIGA:.4g}",
            f"{used['peak'] / MEBI:.0f}" if used else "–",
        )
    console.print(variants)
    ratios = table("Ratios", "", "measured", "low", "high", "counted limit", "measured / limit")
    for name, value in found["ratios"].items():
        limits = found["limits"].get(name) is not None
        ratios.add_row(
            name.replace("_", " "),
            "–" if value is None else f"{value:.3f}",
            *((f"{end:.3f}" for end in found["spread"][name]) if limits else ("", "")),
            f"{found['limits'][name]:.3f}" if limits else "",
            f"{found['over_limit'][name]:.3f}" if limits else "",
        )
    console.print(ratios)
    parts = table("Where a TTD step's time goes", "part", "seconds", "share")
    for name, seconds in found["parts"].items():
        parts.add_row(name, f"{seconds:.4g}", f"{found['share'][name]:.1%}")
    console.print(parts)
    for axis, grown in found.get("growth", {}).items():
        rows = table(f"Growth with {axis.replace('_', ' ')}", "", *map(str, grown["sizes"]), "exponent")
        for kind, unit in (("seconds", 1.0), ("operations", GIGA)):
            for step, values in grown[kind].items():
                label = f"{step}, {'seconds' if kind == 'seconds' else 'GFLOP'}"
                exponent = grown["exponents"][kind][step]
                rows.add_row(label, *(f"{value / unit:.3g}" for value in values), f"{exponent:.2f}")
        console.print(rows)
    if "unshared" not in found["seconds"]:
        console.print("the step that shares nothing was skipped: it does not fit into the memory of the device")
    for sentence in found.get("memory_errors", {}).values():
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(
        f"{found['images_per_second']:.3g} images/s in the TTD step, {found['repeats']} rounds; "
        f"{found['model_flops_utilisation']['ttd']:.0%} of {found['peak_operations_per_second'] / TERA:.3g} TFLOP/s, "
        f"{'as given' if found['peak_source'] == 'given' else 'measured with a large product of matrices'}",
        soft_wrap=True,
    )
