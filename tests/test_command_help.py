"""Help of the commands: examples that work, sections, defaults, readable values and summaries that are not cut.

``docs/commands.md`` has the same examples.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image
from typer.testing import CliRunner, Result

from ttd_plugins import cli
from ttd_plugins.cli import eval as evaluation_commands
from ttd_plugins.cli import export as export_command
from ttd_plugins.cli import help_pages, image_maps
from ttd_plugins.options import Rule

PHOTOGRAPHS = Path(cli.__file__).parents[1] / "embedded" / "photographs" / "images"
PROGRAM: Any = typer.main.get_command(cli.app)


def commands(group: Any = PROGRAM, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
EXAMPLES = [(words, one) for words, command in COMMANDS.items() for one in command.examples]


def ttd(*arguments: str, width: int = 80) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(width)}, prog_name="ttd")


# Structure -----------------------------------------------------------------------------------------------------------


def test_every_command_has_examples() -> None:
    assert {words[0] for words in COMMANDS} == {*cli.COMMANDS, *cli.GROUPS}
    for words, command in COMMANDS.items():
        assert 2 <= len(command.examples) <= 4, words
        # For tools that read click's own attribute.
        assert all(one.command in command.epilog for one in command.examples)


@pytest.mark.parametrize(("words", "one"), EXAMPLES, ids=[one.purpose for _, one in EXAMPLES])
def test_an_example_is_short_and_about_its_command(words: tuple[str, ...], one: help_pages.Example) -> None:
    assert not one.purpose.endswith(".") and len(one.purpose) <= 76
    assert all(len(line) <= 78 for line in one.command.splitlines())
    shown = ttd(*words, "--help").stdout
    # Not wrapped, so that it can be pasted.
    assert "".join(f"  {line}\n" for line in (f"# {one.purpose}", *one.command.splitlines())) in f"{shown}\n"


def test_commands_are_listed_by_purpose_and_no_summary_is_cut() -> None:
    lines = ttd("--help").stdout.splitlines()
    for title, names in (
        ("Try", ["demo", "tags", "heatmap", "segment", "app"]),
        ("Train", ["train", "prune", "export"]),
        ("Evaluate", ["eval", "calibrate"]),
        ("Compare", ["compare", "bench"]),
        ("Extend", ["backbones", "plugins", "new-adapter", "check-adapter"]),
    ):
        start = lines.index(f"{title}:") + 1
        section = lines[start : start + len(names)]
        assert [line.split()[0] for line in section] == names
        assert all(line.endswith(".") and not line.endswith("..") for line in section)
        assert lines[start + len(names)] == ""
    assert all(len(line) <= 80 for line in lines)


def test_a_group_of_commands_does_not_cut_summaries() -> None:
    shown = ttd("eval", "--help").stdout
    for name, command in evaluation_commands.COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_options_have_sections_defaults_and_readable_values(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    context = command.make_context(words[-1], [], resilient_parsing=True)
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    for one in options:
        name, text = one.get_help_record(context)
        switch = one.is_flag and not one.secondary_opts
        known = any(said in text for said in ("[default", "equired", "repeatable"))
        assert switch or known, f"{name} does not say what holds without it"
        assert not re.search(r"\bnull\b", text), f"{name}: null is no value of a flag"
        assert one.is_flag or (one.metavar and not re.search(r"TEXT|INTEGER|FLOAT|^PATH|<|\[", one.metavar)), name
        assert len(options) <= 3 or one.rich_help_panel in help_pages.SECTIONS, f"{name} is in no section"
    shown = ttd(*words, "--help").stdout
    titles = [line[:-1] for line in shown.splitlines() if re.fullmatch(r"[A-Z]\w+:", line)]
    order = ["Arguments", *help_pages.SECTIONS, "Options", "Examples"]
    assert titles == sorted(titles, key=order.index)
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_usage_line_names_arguments_as_the_help_does(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    usage = command.collect_usage_pieces(command.make_context(words[-1], [], resilient_parsing=True))
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    assert len(usage) == 1 + len(arguments)
    for piece, one in zip(usage[1:], arguments, strict=True):
        shown = one.metavar if one.required else f"[{one.metavar}]"
        # Older versions of typer do not mark a list.
        assert piece == shown or (one.nargs != 1 and piece == f"{shown}..."), f"{' '.join(words)}: {piece}"


def test_thresholds_say_what_holds_without_them() -> None:
    from ttd_plugins.evaluation.protocol_options import PLANE
    from ttd_plugins.options import TTDOptions
    from ttd_plugins.tagging import DEFAULT_THRESHOLDS

    texts = {
        words: " ".join(one.help.split())
        for words, command in COMMANDS.items()
        for one in command.params
        if one.name in ("threshold", "threshold_flag") and words[0] in ("tags", "heatmap", "app", "segment")
    }
    default = TTDOptions().threshold
    assert texts.pop(("segment",)).endswith(f"sets --background constant. [default: {PLANE}]")
    by_rule = ", ".join(f"{value} for {rule}" for rule, value in DEFAULT_THRESHOLDS.items())
    assert texts.pop(("tags",)).endswith(f"[default: {default}; with --vocabulary {by_rule}]")
    assert set(texts) == {("heatmap",), ("app",)}
    assert all(text.endswith(f"[default: {default}]") for text in texts.values())


def test_generated_flags_are_in_the_section_of_their_class() -> None:
    panels = {one.opts[0]: one.rich_help_panel for one in COMMANDS["train",].params if one.opts[0].startswith("--")}
    assert {
        name: panels[name] for name in ("--data", "--rank", "--distill-weight", "--lr", "--evaluate", "--keep")
    } == {
        "--data": "Data",
        "--rank": "Model",
        "--distill-weight": "Objective",
        "--lr": "Optimizer",
        "--evaluate": "Evaluation",
        "--keep": "Output",
    }


def test_choices_that_are_written_by_hand_are_those_of_the_code() -> None:
    from typing import get_args

    from ttd_plugins.evaluation.datasets import CAPTIONS, LABELS, SEGMENTATION
    from ttd_plugins.export import FORMS

    assert export_command.FORM_NAMES == FORMS
    assert get_args(Rule) == image_maps.RULES
    assert set(evaluation_commands.CAPTION_SETS) == set(CAPTIONS)
    assert set(evaluation_commands.MASK_SETS) == set(SEGMENTATION)
    assert set(evaluation_commands.LABEL_SETS) == set(LABELS)


@pytest.mark.parametrize("words", [(), ("eval",), *COMMANDS], ids=" ".join)
def test_the_short_flag_shows_help_everywhere(words: tuple[str, ...]) -> None:
    short, long = ttd(*words, "-h"), ttd(*words, "--help")
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout and short.stdout.startswith("Usage: ttd")


@pytest.mark.parametrize("words", [(), ("eval",)], ids=["ttd", "ttd eval"])
def test_without_arguments_a_group_shows_its_help(words: tuple[str, ...]) -> None:
    result = ttd(*words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == ttd(*words, "--help").stdout


def test_help_imports_no_torch() -> None:
    code = "import sys; from ttd_plugins.cli import main\ntry: main()\nfinally: print({'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "train", "-h"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in ttd("tags", "-h").stdout
    monkeypatch.setattr(help_pages, "sys", type("", (), {"stdout": type("", (), {"isatty": lambda: True})}))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert help_pages._styled("Data", bold=True) == "\x1b[1mData\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert help_pages._styled("Data", bold=True) == "Data"


# Examples ------------------------------------------------------------------------------------------------------------

ELSEWHERE = re.compile(
    r"ViT-|coco/|cc12m/|dataset_coco|VOCdevkit|ade20k/|--push-to-hub|^ttd app|^torchrun|^ttd --deny-plugin"
)
"""What needs a network, a data set that does not ship, another process or a person: such an example is parsed."""
SHORTER = {
    ("demo",): "--steps 1 --scenes 8",
    ("train",): "--steps 1 --batch-size 2",
    ("compare",): "--steps 1 --limit 8 --gallery 1 --jobs 1 --batch-size 4",
    ("segment",): "--size 64 --scales 1 --no-pamr",
}
"""Flags after those of an example, so that it takes seconds; the last one of a flag counts."""


def arguments_of(one: help_pages.Example) -> list[str]:
    words = shlex.split(one.command.replace("\\\n", " "))
    return words[words.index("ttd_plugins.cli" if "ttd_plugins.cli" in words else "ttd") + 1 :]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:24]
    content = json.loads((PHOTOGRAPHS.parent / "captions.json").read_text())
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    caption_of = {name_of[one["image_id"]]: one["caption"] for one in content["annotations"]}
    for name in ("photos", "pairs", "heldout", "my_set/images", "my_set/masks", "projects"):
        (folder / name).mkdir(parents=True)
    (folder / "projects").rmdir()
    for number, file in enumerate(photographs):
        with Image.open(file) as image:
            small = image.convert("RGB").resize((96, 64))
        # A calibration needs 20 different images.
        for name in ("pairs", "heldout") if number < 8 else ("pairs",):
            small.save(folder / name / f"{number}.jpg")
            (folder / name / f"{number}.txt").write_text(caption_of[file.name])
        if number < 2:
            small.save(folder / "photos" / f"{number}.jpg")
            small.save(folder / "my_set" / "images" / f"{number}.jpg")
            Image.new("L", small.size, number).save(folder / "my_set" / "masks" / f"{number}.png")
    shutil.copy(folder / "photos" / "0.jpg", folder / "photo.jpg")
    (folder / "names.txt").write_text("dog\numbrella\ngrass\n")
    (folder / "my_set" / "classes.txt").write_text("dog\numbrella\n")
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "labels"), ("photos/0.jpg", "dog"), ("photos/1.jpg", "umbrella;dog")])
    (folder / "train.yaml").write_text("backbone: {name: 'open_clip:tiny'}\ndata: {source: pairs}\n")
    return folder


LOCAL = [(words, one) for words, one in EXAMPLES if not ELSEWHERE.search(one.command)]


def out_of(arguments: list[str]) -> str | None:
    return arguments[arguments.index("--out") + 1] if "--out" in arguments else None


def run_example(one: help_pages.Example) -> None:
    """Run an example, after those whose results it reads."""
    arguments = arguments_of(one)
    for _, other in LOCAL:
        made = out_of(arguments_of(other))
        if other is not one and "--resume" not in other.command and made in arguments and not Path(made).exists():
            run_example(other)
    kind = next((key for key in SHORTER if arguments[: len(key)] == list(key)), None)
    if kind is not None and "--resume" not in arguments:
        arguments += SHORTER[kind].split()
    result = ttd(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def test_most_examples_run_without_a_network() -> None:
    assert len(LOCAL) > 0.6 * len(EXAMPLES)


SLOW = re.compile(
    r"ttd (demo$|demo --backbone|compare --backbones open_clip:photo|check-adapter (open_clip:tiny|.*--json))"
)
"""Many seconds each; another example of the same command is quick."""


@pytest.mark.parametrize(
    ("words", "one"),
    [
        pytest.param(
            *item,
            id=item[1].command.splitlines()[0][4:60],
            marks=[pytest.mark.slow] * bool(SLOW.match(item[1].command)),
        )
        for item in LOCAL
    ],
)
def test_an_example_runs(
    words: tuple[str, ...], one: help_pages.Example, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one alone, since other processes may run the others."""
    pytest.importorskip("open_clip")
    monkeypatch.chdir(workspace)
    run_example(one)


@pytest.mark.parametrize(
    "one", [one for _, one in EXAMPLES if ELSEWHERE.search(one.command)], ids=lambda one: one.purpose
)
def test_an_example_is_parsed_by_its_command(one: help_pages.Example, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(one)
    if arguments[0] == "--deny-plugin":
        assert ttd(*arguments).exit_code == 0 and os.environ.get(cli.DENY) is None
        return
    words = next(words for words in COMMANDS if tuple(arguments[: len(words)]) == words)
    context = COMMANDS[words].make_context(words[-1], arguments[len(words) :])
    assert not context.args and any(value for value in context.params.values())
