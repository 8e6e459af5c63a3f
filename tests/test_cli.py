"""The command line: listings, tags and heat maps, and one sentence for what a user can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeFamily, FakePlugin
from PIL import Image
from typer.testing import CliRunner, Result

from ttd_plugins import __version__, cli
from ttd_plugins.cli import heatmap, image_maps
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.plugins import list_backbones, list_plugins, temporary_plugin

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_dense_a"
STANZA = Path(__file__).resolve().parents[2] / "shared" / "data" / "stanza"


def ttd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def fake() -> Iterator[FakeFamily]:
    family = FakeFamily()
    with temporary_plugin(FakePlugin(family), name="fake_plugin"):
        yield family


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(file)
    return file


def refused(result: Result, *parts: str) -> None:
    """One line on standard error, status 2, nothing on standard output, and no traceback."""
    assert result.exit_code == cli.USER_ERROR, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: plugin")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    for part in parts:
        assert part in lines[0]


# The frame -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = ttd("--help")
    assert result.exit_code == 0
    for name in cli.COMMANDS:
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_for_itself_and_its_options(command: str) -> None:
    result = ttd(command, "--help")
    assert result.exit_code == 0
    assert (cli.COMMANDS[command].__doc__ or "").splitlines()[0] in result.stdout


def test_version() -> None:
    assert ttd("--version").stdout == f"ttd-plugins {__version__}\n"


def test_usage_errors_have_status_2() -> None:
    for arguments in (["grobl"], ["tags"], ["backbones", "--grobl"]):
        result = ttd(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(TTDError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_what_is_no_bug_has_no_traceback(
    fake: FakeFamily, monkeypatch: pytest.MonkeyPatch, picture: Path, error: BaseException, status: int, said: str
) -> None:
    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(image_maps, "compute_maps", raise_it)
    result = ttd("tags", picture, "a dog")
    assert (result.exit_code, result.stderr) == (status, said)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(image_maps, "compute_maps", broken)
    assert isinstance(ttd("tags", picture, "a dog").exception, ZeroDivisionError)


def test_main_ends_the_process_with_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["tags", "no.png", "a dog"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: image 'no.png' does not exist\n"


def test_the_installed_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "from ttd_plugins.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    assert run("--version").stdout == f"ttd-plugins {__version__}\n"
    done = run("heatmap", "none.jpg", "a dog", "--out", "x.png")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: image 'none.jpg' does not exist\n")
    assert list(tmp_path.iterdir()) == []


# Listings ------------------------------------------------------------------------------------------------------------


def test_plugins_are_listed(fake: FakeFamily) -> None:
    result = ttd("plugins")
    assert result.exit_code == 0
    assert f"stanza  ttd-plugins {__version__}\n  tag extractors: stanza\n" in result.stdout
    assert "fake_plugin\n  families: fake\n  hooks: register_adapters\n" in result.stdout


def test_plugins_as_json(fake: FakeFamily) -> None:
    listed = json.loads(ttd("plugins", "--json").stdout)
    assert [plugin["name"] for plugin in listed] == [plugin.name for plugin in list_plugins()]
    assert set(listed[0]) == {"name", "distribution", "version", "hooks", "families", "tag_extractors", "error"}


def test_a_conflict_is_shown_in_the_listing(fake: FakeFamily) -> None:
    with temporary_plugin(FakePlugin(), name="rival"):
        listed = {plugin["name"]: plugin for plugin in json.loads(ttd("plugins", "--json").stdout)}
        assert "registered by plugin 'fake_plugin' and by plugin 'rival'" in listed["rival"]["error"]
        assert "  error: family 'fake' is registered by" in ttd("plugins").stdout


def test_backbones_are_listed(fake: FakeFamily) -> None:
    result = ttd("backbones", "fake")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "fake: a fake (plugin fake_plugin)",
        "  fake:small @good (default)",
        "  fake:hub:org/model @a @b",
    ]
    assert ttd("backbones", "fake", "--filter", "*@b").stdout.splitlines()[1:] == ["  fake:hub:org/model @a @b"]


def test_backbones_as_json(fake: FakeFamily) -> None:
    (family,) = json.loads(ttd("backbones", "fake", "--json").stdout)
    assert family["backbones"][0] == {"model": "small", "weights": ["good"], "default_weights": "good"}
    everything = json.loads(ttd("backbones", "--json").stdout)
    assert [one["family"] for one in everything] == [one.family for one in list_backbones()]


def test_an_unknown_family_is_told() -> None:
    refused(ttd("backbones", "opne_clip"), "unknown family 'opne_clip'")


# tags and heatmap ----------------------------------------------------------------------------------------------------


def test_tags_as_json(fake: FakeFamily, picture: Path) -> None:
    result = ttd("tags", picture, "a Dog on the grass, dog!", "--backbone", "fake:small", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["caption"] == "a Dog on the grass, dog!"
    assert (answer["backbone"], answer["truncated"]) == ("fake:small", False)
    assert [row["tag"] for row in answer["tags"]] == ["dog", "grass"]
    for row in answer["tags"]:
        assert -1 <= row["score"] <= 1
        assert "probability" not in row and 0 < row["uncalibrated_probability"] < 1
        assert isinstance(row["selected"], bool)


def test_tags_as_a_table(fake: FakeFamily, picture: Path) -> None:
    result = ttd("tags", picture, "a [red]dog[/red] on grass", "--backbone", "fake:small")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert rows[0] == ["tag", "score", "probability", "(uncalibrated)", "selection"]
    assert [row[0] for row in rows if len(row) == 4 and row[3] in ("selected", "rejected")] == ["red", "dog", "grass"]
    assert {row[3] for row in rows if len(row) == 4} == {"selected", "rejected"}


def test_a_tag_is_shown_as_it_is(fake: FakeFamily, picture: Path) -> None:
    result = ttd("tags", picture, "a dog", "--backbone", "fake:small", "--tag", "[bold]", "--tag", "犬")
    assert "[bold]" in result.stdout
    assert "犬" in result.stdout


def test_tags_of_a_caption_without_any(fake: FakeFamily, picture: Path) -> None:
    result = ttd("tags", picture, "of the", "--backbone", "fake:small")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "no candidate tags: the tag extractor 'words' finds none in 'of the'\n"
    answer = json.loads(ttd("tags", picture, "of the", "--backbone", "fake:small", "--json").stdout)
    assert answer["tags"] == []


def test_a_caption_beyond_the_context_is_told(fake: FakeFamily, picture: Path) -> None:
    result = ttd("tags", picture, "dog " * 40, "--backbone", "fake:small", "--json")
    assert "warning: the caption is longer than 32 tokens" in result.stderr
    assert json.loads(result.stdout)["truncated"] is True


def test_options_reach_what_they_are_for(fake: FakeFamily, picture: Path) -> None:
    result = ttd(
        *("tags", picture, "the dog", "--backbone", "fake:small@random", "--json"),
        *("--backbone-option", "width=9", "--tags-option", "stop_words=null", "--size", "16x24", "--device", "cpu"),
        *("--rule", "absolute", "--threshold", "-1"),
    )
    assert result.exit_code == 0, result.stderr
    assert fake.loaded == [("small", "random")]
    assert [(row["tag"], row["selected"]) for row in json.loads(result.stdout)["tags"]] == [
        ("the", True),
        ("dog", True),
    ]
    refused(ttd("tags", picture, "the dog", "--backbone", "fake:small", "--size", "17"), "multiple of 8")


def test_a_heat_map_is_drawn(fake: FakeFamily, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "maps.png"
    result = ttd("heatmap", picture, "a dog on grass", "--backbone", "fake:small", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"wrote {out}\n"
    with Image.open(out) as drawn:
        drawn.load()
        assert min(drawn.size) > 100
    assert {file.name for file in tmp_path.iterdir()} == {"picture.png", "maps.png"}


@pytest.mark.parametrize(
    ("out", "said"),
    [("maps.jpg", "must end in .png"), ("no/maps.png", "does not exist"), ("folder.png", "it is a folder")],
)
def test_an_unwritable_output_is_told_before_anything_slow(
    fake: FakeFamily, picture: Path, tmp_path: Path, out: str, said: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    refused(ttd("heatmap", picture, "a dog", "--backbone", "fake:small", "--out", tmp_path / out), "--out", said)
    assert fake.loaded == []


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(heatmap.tempfile, "TemporaryFile", no)
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        heatmap.check_writable(tmp_path / "x.png")


@pytest.mark.parametrize("command", ["tags", "heatmap"])
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["none.png", "a dog"], ["'none.png' does not exist"]),
        (["{text}", "a dog"], ["is not an image"]),
        (["{picture}", "  "], ["the caption is empty"]),
        (["{picture}", "a dog", "--backbone", "fale:small"], ["unknown family 'fale'"]),
        (["{picture}", "a dog", "--backbone", "fake:smal"], ["unknown model of fake 'smal'", "small"]),
        (["{picture}", "a dog", "--backbone", "small"], ["did you mean 'fake:small'"]),
        (["{picture}", "a dog", "--backbone-option", "width"], ["'width' is not of the form KEY=VALUE"]),
        (["{picture}", "a dog", "--backbone", "fake:small", "--backbone-option", "w=1"], ["unknown option", "width"]),
        (["{picture}", "a dog", "--size", "0"], ["size '0' is neither"]),
        (["{picture}", "a dog", "--size", "3by4"], ["size '3by4' is neither"]),
        (["{picture}", "a dog", "--rule", "grobl"], ["grobl"]),
        (["{picture}", "a dog", "--backbone", "fake:small", "--tags", "word"], ["unknown tag extractor", "'words'"]),
        (["{picture}", "a dog", "--backbone", "fake:small", "--device", "grobl"], ["device 'grobl'"]),
    ],
)
def test_bad_input_is_one_sentence(
    fake: FakeFamily, picture: Path, tmp_path: Path, command: str, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "text.png").write_text("hello")
    filled = [argument.format(picture=picture, text=tmp_path / "text.png") for argument in arguments]
    out = ["--out", tmp_path / "out.png"] if command == "heatmap" else []
    refused(ttd(command, *filled, *out), *parts)
    assert not (tmp_path / "out.png").exists()


def test_stanza_models_that_are_absent_are_told(fake: FakeFamily, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("stanza")
    folder = tmp_path / "none"
    refused(
        ttd(
            "tags",
            picture,
            "a dog",
            "--backbone",
            "fake:small",
            "--tags",
            "stanza",
            "--tags-option",
            f"resources={folder}",
        ),
        str(folder),
        "download=True",
    )


def test_tags_by_stanza(fake: FakeFamily, picture: Path) -> None:
    pytest.importorskip("stanza")
    if not STANZA.is_dir():
        pytest.skip(f"there are no Stanza models in {STANZA}")
    result = ttd(
        *("tags", picture, "a dog under a traffic light", "--backbone", "fake:small", "--json"),
        *("--tags", "stanza", "--tags-option", f"resources={STANZA}"),
    )
    assert [row["tag"] for row in json.loads(result.stdout)["tags"]] == ["dog", "traffic light"]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (None, {}),
        (
            ["a=true", "b=3", "c=null", "d=x=y", "e=", 'f="3"'],
            {"a": True, "b": 3, "c": None, "d": "x=y", "e": "", "f": "3"},
        ),
    ],
)
def test_settings_are_read_as_json_where_they_are(settings: list[str] | None, found: dict[str, Any]) -> None:
    assert image_maps.parse_settings(settings) == found


@pytest.mark.parametrize(("text", "size"), [(None, None), ("224", 224), ("224x320", (224, 320))])
def test_sizes_are_height_by_width(text: str | None, size: Any) -> None:
    assert image_maps.parse_size(text) == size


# The embedded backbone -----------------------------------------------------------------------------------------------


def test_photographs_through_the_default_backbone(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"there are no photographs in {PHOTOGRAPHS}")
    photograph = sorted((PHOTOGRAPHS / "images").glob("*.jpg"))[0]
    result = ttd("tags", photograph, "a living room with a television and a chair", "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["tag"] for row in json.loads(result.stdout)["tags"]] == ["living", "room", "television", "chair"]
    out = tmp_path / "room.png"
    assert ttd("heatmap", photograph, "a living room with a television and a chair", "--out", out).exit_code == 0
    assert out.stat().st_size > 10_000
