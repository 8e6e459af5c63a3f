"""A source of pairs runs a shell command only with --allow-pipe, given by hand."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("webdataset")
pytest.importorskip("yaml")

from helpers_pairs import as_shards, make_pairs
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.data import allow_pipe, open_pairs
from ttd_plugins.data.pair_source import ReadNow
from ttd_plugins.data.shard_urls import require_permitted
from ttd_plugins.data.shards import ShardPairs
from ttd_plugins.errors import InputError


def commands(marker: Path) -> dict[str, str]:
    """Specs that would create ``marker``."""
    folder = marker.parent
    return {
        "plain": f"pipe:touch {marker}",
        "space": f" pipe:touch {marker}",
        "second of a list": f"{folder}/00000.tar::pipe:touch {marker}",
        "brace list": f"pi{{p,q}}e:touch {marker}",
        "braces": f"{{{folder}/00000.tar,pipe:touch {marker}}}",
        "tar": f"pipe:touch {marker}; cat {folder}/00000.tar",
        "quote in a URL": f"https://localhost:1/x'; touch {marker}; '.tar",
        "substitution in a URL": f"https://localhost:1/$(touch {marker}).tar",
        "capitals": f"PIPE:touch {marker}",
        "control character": f"\x01pipe:touch {marker}",
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    as_shards(tmp_path, make_pairs(6))
    return tmp_path / "marker"


KINDS = list(commands(Path("x/y")))


def read(source: ShardPairs) -> int:
    return sum(1 for shard in source.shards for pair in source.read_shard(shard, ReadNow(True)) if not pair.problem)


@pytest.mark.parametrize("kind", KINDS)
def test_open_pairs_refuses_commands(marker: Path, kind: str) -> None:
    spec = commands(marker)[kind]
    with pytest.raises(InputError) as caught:
        open_pairs(spec)
    if kind in ("plain", "second of a list", "tar"):
        assert "is a shell command, which is refused" in str(caught.value)
        assert "give --allow-pipe to the command" in str(caught.value)
    assert not marker.exists()


def test_files_whose_names_are_commands_are_not_run(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(marker.parent)
    Path("pipe:touch marker; x.tar").write_bytes(b"")
    for spec in ("pipe:touch marker; x.tar", "*x.tar", "."):
        with pytest.raises(InputError, match="is a shell command"):
            open_pairs(spec)
    assert not marker.exists()


def test_permission_is_of_one_block_and_goes_along_to_workers(marker: Path) -> None:
    spec = f"pipe:touch {marker}; cat {marker.parent}/00000.tar"
    with allow_pipe(False), pytest.raises(InputError, match="shell command"):
        open_pairs(spec)
    with allow_pipe():
        source = open_pairs(spec)
    assert not marker.exists()
    again = pickle.loads(pickle.dumps(source))
    assert read(again) == 2
    assert marker.exists()
    with pytest.raises(InputError, match="shell command"):
        open_pairs(spec)


def test_a_source_that_was_opened_without_permission_runs_nothing(marker: Path) -> None:
    source = open_pairs(f"{marker.parent}/00000.tar")
    assert isinstance(source, ShardPairs)
    command = f"pipe:touch {marker}"
    source.shards = (command,)
    source._names = {command: command}
    (found,) = source.read_shard(command, ReadNow(True))
    assert "is a shell command, which is refused" in str(found.problem)
    assert not marker.exists()


@pytest.mark.parametrize("url", ["s3://bucket/a.tar", "exec:ls", "ext::sh -c ls", "ssh://x/a.tar"])
def test_unknown_schemes_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="unknown scheme"):
        require_permitted([url], pipe_allowed=True)


def test_urls_as_people_have_them_are_permitted() -> None:
    require_permitted(
        [
            "https://host:8080/a/00000.tar?token=a%20b&x=1#f",
            "gs://bucket/a-b_c/00000.tar",
            "hf://datasets/org/name/data/0.tar",
            "http://[::1]:80/~me/0.tar",
        ],
        pipe_allowed=False,
    )


# The command line ----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    return done.exit_code, done.output


def one_sentence(output: str) -> bool:
    return "Traceback" not in output and output.count("error: ") == 1


@pytest.mark.parametrize(
    "more",
    [
        "data: {source: 'SPEC'}",
        "data: {source: 'SPEC', options: {allow_pipe: true}}",
        "data: {source: 'SPEC', loader: {allow_pipe: true}}",
        "data: {source: 'SPEC', allow_pipe: true}",
        "data: {source: 'SPEC'}\nrun: {allow_pipe: true}",
        "data: {source: 'SPEC'}\nallow_pipe: true",
    ],
)
def test_a_configuration_cannot_run_a_command(marker: Path, more: str) -> None:
    spec = f"pipe:touch {marker}"
    file = marker.parent / "c.yaml"
    file.write_text("backbone: {name: 'open_clip:tiny'}\n" + more.replace("SPEC", spec) + "\n")
    status, output = run("train", file, "--out", marker.parent / "run", "--steps", 1)
    assert status == 2
    assert one_sentence(output)
    assert not marker.exists()


def test_every_command_that_reads_pairs_refuses(marker: Path) -> None:
    spec, out = f"pipe:touch {marker}", marker.parent / "out"
    coco = marker.parent / "coco"
    coco.mkdir()
    for arguments in (
        ("train", "--backbone", "open_clip:tiny", "--data", spec, "--steps", 1, "--out", out),
        ("train", "--backbone", "open_clip:tiny", "--set", f"data.source={spec}", "--out", out),
        ("train", "--backbone", "open_clip:tiny", "--data", spec, "--data-option", "allow_pipe=true", "--out", out),
        ("train", "--backbone", "open_clip:tiny", "--data", "x", "--evaluate", spec, "--out", out),
        ("prune", spec, "--out", marker.parent / "s.jsonl"),
        ("prune", spec, "--out", marker.parent / "s.jsonl", "--data-option", "allow_pipe=true"),
        ("bench", "--data", spec),
        ("compare", "--backbones", "open_clip:tiny", "--data", "coco_captions", "--root", coco, "--pairs", spec),
        ("eval", "tags", "--data", spec, "--backbone", "open_clip:tiny"),
    ):
        status, output = run(*arguments)
        assert status == 2, output
        assert "Traceback" not in output
        assert not marker.exists(), arguments


def test_the_flag_permits_it_and_resuming_needs_it_again(marker: Path) -> None:
    spec = f"pipe:cat {marker.parent}/00000.tar {marker.parent}/none; touch {marker}; true"
    with tarfile.open(marker.parent / "00000.tar") as tar:
        assert len(tar.getnames()) > 0
    out = marker.parent / "run"
    start = ("train", "--backbone", "open_clip:tiny", "--data", spec, "--batch-size", 2, "--rank", 2, "--out", out)
    status, output = run(*start, "--steps", 1, "--allow-pipe")
    assert status == 0, output
    assert marker.exists()
    assert "allow_pipe" not in (out / "config.yaml").read_text()
    marker.unlink()
    status, output = run("train", out / "config.yaml", "--out", out, "--resume")
    assert status == 2
    assert "--allow-pipe" in output
    assert not marker.exists()
    scores = marker.parent / "s.jsonl"
    assert run("prune", spec, "--out", scores, "--backbone", "open_clip:tiny", "--allow-pipe")[0] == 0
    assert scores.exists()
