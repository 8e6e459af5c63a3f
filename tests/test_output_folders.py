"""Output folders: no command writes into a folder that is not its own, and two processes never share one."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.utils.output_folder import MARKER, FolderKind, new_folder, output_folder

KIND = FolderKind("thing", "the folder of a thing", lambda folder: (folder / "old-thing").exists())
OTHER = FolderKind("other", "the folder of another thing")


def ttd(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exc_info
    return found.exit_code, found.output


def errors_of(output: str) -> int:
    """Number of errors in an output whose every line is an error or a warning; -1 if another line is there."""
    kinds = [line.partition(":")[0] for line in output.splitlines()]
    return kinds.count("error") if set(kinds) <= {"error", "warning"} else -1


def opened(context: AbstractContextManager[Any], then: Callable[[Path], None] = lambda folder: None) -> None:
    with context as folder:
        then(folder)


def fail_after(*made: str) -> Callable[[Path], None]:
    """An action that makes folders (``name/``) and files, and fails."""

    def action(folder: Path) -> None:
        for name in made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("kept")
        raise ZeroDivisionError

    return action


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


# The mechanism -------------------------------------------------------------------------------------------------------


def test_a_folder_is_recognised_by_its_marker_or_as_one_of_an_earlier_release(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with output_folder(out, KIND) as folder:
        (folder / "result").write_text("1")
    with output_folder(out, KIND) as folder:
        assert (folder / "result").read_text() == "1"
    before = snapshot(out)
    with pytest.raises(InputError, match="is the folder of a thing and not the folder of another thing"):
        opened(output_folder(out, OTHER))
    assert snapshot(out) == before
    old = tmp_path / "old"
    old.mkdir()
    (old / "old-thing").write_text("")
    with output_folder(old, KIND):
        pass
    assert json.loads((old / MARKER).read_text())["kind"] == "thing"


@pytest.mark.parametrize("marker", ["", "[]", "{", '{"kind": 3, "what": "x"}', "[" * 50_000, "\0\xff"])
def test_a_marker_that_is_none_does_not_open_a_foreign_folder(marker: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / MARKER).write_text(marker)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="is not empty and is not the folder of a thing"):
        opened(output_folder(tmp_path, KIND))
    assert snapshot(tmp_path) == before


def test_a_folder_in_which_nothing_is_written_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        opened(output_folder(tmp_path / "a" / "b", KIND), fail_after("sub/sub/"))
    assert list(tmp_path.iterdir()) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    with output_folder(empty, KIND):
        pass
    assert list(empty.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        opened(output_folder(tmp_path / "a", KIND), fail_after("sub/result"))
    assert (tmp_path / "a" / "sub" / "result").exists()


def test_the_lock_names_the_process_that_has_it_and_ends_with_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from ttd_plugins.utils.output_folder import FolderKind, output_folder\n"
        "with output_folder(sys.argv[1], FolderKind('thing', 'the folder of a thing')) as folder:\n"
        "    (folder / 'result').write_text('1'); print('open', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        wanted = (
            rf"another process, {process.pid} \(.*\), started at \d+-.*, is writing the folder .*; wait until it ends"
        )
        with pytest.raises(InputError, match=wanted):
            opened(output_folder(tmp_path, KIND))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with output_folder(tmp_path, KIND) as folder:
            assert (folder / "result").exists()
    finally:
        process.kill()
        process.wait()


def test_a_second_call_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with output_folder(tmp_path, KIND):
        with pytest.raises(InputError, match="this process itself, in another call, is writing"):
            opened(output_folder(tmp_path, KIND))
        with output_folder(tmp_path, KIND, lock=".ttd-plugins.lock-1"):
            pass


def test_a_lock_of_a_file_that_was_replaced_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes its lock file and a third one makes a new one, between opening and locking."""
    import filelock

    class Overtaken(filelock.FileLock):  # type: ignore[misc]
        overtaken = 0

        def acquire(self, *arguments: Any, **options: Any) -> Any:
            found = super().acquire(*arguments, **options)
            if not Overtaken.overtaken:
                Overtaken.overtaken += 1
                Path(self.lock_file).rename(tmp_path / "removed")
                Path(self.lock_file).touch()
            return found

    locks = "import sys; from filelock import FileLock; FileLock(sys.argv[1], timeout=0).acquire()"
    with monkeypatch.context() as patched:
        patched.setattr(filelock, "FileLock", Overtaken)
        with output_folder(tmp_path / "out", KIND) as folder:
            # Another process, since releases of filelock differ in what they allow within one.
            command = [sys.executable, "-c", locks, str(folder / ".ttd-plugins.lock")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert Overtaken.overtaken == 1
    assert "Timeout" in done.stderr


def test_a_lock_file_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".ttd-plugins.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="is a symbolic link"):
        opened(output_folder(tmp_path / "out", KIND))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import filelock

    class Without:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def acquire(self) -> None:
            raise NotImplementedError

        def release(self) -> None: ...

    monkeypatch.setattr(filelock, "FileLock", Without)
    with caplog.at_level(logging.WARNING), output_folder(tmp_path, KIND):
        pass
    assert "has no locks; let one process at a time write it" in caplog.text


def test_a_new_folder_is_complete_or_absent_and_replaces_nothing(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "a" / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "private").write_text("1")
            (folder / "sub" / "private").chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "out" / "sub" / "private").stat().st_mode) == 0o640
    with pytest.raises(InputError, match="is not empty"):
        opened(new_folder(tmp_path / "a"))

    def race(folder: Path) -> None:
        (tmp_path / "raced").mkdir()
        (tmp_path / "raced" / "mine").write_text("mine")

    with pytest.raises(InputError, match=r"cannot be written \(Directory not empty\)"):
        opened(new_folder(tmp_path / "raced"), race)
    with pytest.raises(ZeroDivisionError):
        opened(new_folder(tmp_path / "b" / "c"), fail_after("file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "raced"]


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y", "file", "file/x"])
def test_impossible_names_are_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (lambda: output_folder(tmp_path / name, KIND), lambda: new_folder(tmp_path / name)):
        with pytest.raises(InputError) as caught, use():
            raise AssertionError("not reached")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse)
        with pytest.raises(InputError, match="Read-only file system"):
            opened(output_folder(tmp_path / "out", KIND))


# Every command -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "log.jsonl": '{"mine": 1}\n',
    "nonfinite.jsonl": '{"mine": 2}\n',
    "config.yaml": "mine: 3\n",
    "report.html": "mine",
    "results.json": '{"mine": 4}',
    "metrics.json": '{"mine": 5}',
    "settings.json": '{"mine": 6}',
    "work/mine.txt": "mine",
    "checkpoints/step-00000001/mine.txt": "mine",
    "images-0.jsonl": "mine",
}


def foreign_folder(folder: Path, names: tuple[str, ...]) -> dict[str, bytes | None]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(FOREIGN[name])
    return snapshot(folder)


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "train": lambda out, data: ["train", "--backbone", "open_clip:tiny", "--data", data, "--steps", 1, "--out", out],
    "train resumed": lambda out, data: [
        *("train", "--backbone", "open_clip:tiny", "--data", data, "--steps", 1, "--out", out, "--resume"),
    ],
    "compare": lambda out, data: ["compare", "--backbones", "open_clip:tiny", "--steps", 1, "--out", out],
    "demo": lambda out, data: ["demo", "--steps", 1, "--scenes", 2, "--out", out],
    "export": lambda out, data: ["export", "--backbone", "open_clip:tiny", "--out", out],
    "eval": lambda out, data: ["eval", "tags", data, "--backbone", "open_clip:tiny", "--out", out],
    "new-adapter": lambda out, data: ["new-adapter", "some_family", "--out", out],
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with captions and masks, which train and eval both open."""
    from helpers_photographs import write_photographs

    captions = {"a": ["a man with a dog on the grass"], "b": ["a dog under the sky"]}
    return write_photographs(tmp_path_factory.mktemp("coco"), captions, {"a": (1, 18, 193), "b": (18, 187)})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("files", [tuple(FOREIGN), ("config.yaml",), ("results.json",)], ids=["all", "one", "another"])
def test_no_command_touches_a_folder_that_is_not_its_own(
    name: str, files: tuple[str, ...], tmp_path: Path, coco: Path
) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    out = tmp_path / "out"
    before = foreign_folder(out, files)
    status, output = ttd(*COMMANDS[name](out, coco))
    assert status == 2 and errors_of(output) == 1, output
    # A configuration that is none is refused before its folder is judged.
    assert "is not empty" in output or "config.yaml: unknown key" in output, output
    assert snapshot(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_in_the_folder_of_its_configuration_is_refused(
    tmp_path: Path, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ttd_plugins.training.config import TrainConfig

    config = TrainConfig.from_dict({"backbone": {"name": "open_clip:tiny"}, "data": {"source": str(coco)}})
    (tmp_path / "config.yaml").write_text("# mine\n" + config.yaml())
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", "config.yaml", "--out", "."], ["train", "--resume", "--out", "."]):
        status, output = ttd(*arguments)
        assert status == 2 and "is not empty and is not the folder of a run of ttd train" in output
    assert snapshot(tmp_path) == before


def test_refused_commands_leave_no_folder(tmp_path: Path, coco: Path) -> None:
    pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
    out = tmp_path / "a" / "b"
    refused: list[list[object]] = [
        ["train", "--backbone", "open_clip:no-such-model", "--data", coco, "--out", out],
        ["train", "--backbone", "open_clip:tiny", "--data", tmp_path / "none", "--out", out],
        ["train", "--backbone", "open_clip:tiny", "--data", coco, "--batch-size", 5000, "--out", out],
        ["train", "--backbone", "open_clip:tiny", "--data", coco, "--evaluate", "nothing", "--out", out],
        ["compare", "--backbones", "open_clip:tiny@/no/such/file.pt", "--steps", 1, "--out", out],
        [
            "compare",
            "--backbones",
            "open_clip:tiny",
            "--data",
            "coco_captions",
            "--root",
            tmp_path / "none",
            "--out",
            out,
        ],
        ["demo", "--backbone", "open_clip:no-such-model", "--out", out],
        ["export", tmp_path / "none", "--out", out],
        ["export", "--backbone", "open_clip:tiny", "--form", "lora", "--out", out],
        ["eval", "tags", tmp_path / "none", "--backbone", "open_clip:tiny", "--out", out],
        ["new-adapter", "open_clip", "--out", out],
    ]
    for arguments in refused:
        status, output = ttd(*arguments)
        assert status == 2 and errors_of(output) == 1, (arguments, output)
        assert list(tmp_path.iterdir()) == [], arguments


def test_a_comparison_deletes_only_work_of_its_own(tmp_path: Path) -> None:
    from ttd_plugins.comparison.options import CompareOptions
    from ttd_plugins.comparison.running import run_comparison

    options = CompareOptions(("open_clip:tiny",), tune=False, limit=2, gallery=0)
    run_comparison(tmp_path, options)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    run_comparison(tmp_path, options)
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"


def test_folders_of_earlier_releases_are_recognised(tmp_path: Path) -> None:
    """A run, a comparison and an evaluation without a marker continue, and have one afterwards."""
    from helpers_training import run_toy, toy_config

    from ttd_plugins.comparison.options import CompareOptions
    from ttd_plugins.comparison.running import run_comparison

    config = toy_config(optimizer={"steps": 2})
    run_toy(tmp_path / "run", config)
    (tmp_path / "run" / MARKER).unlink()
    assert run_toy(tmp_path / "run", config, resume=True).step == 2
    options = CompareOptions(("open_clip:tiny",), tune=False, limit=2, gallery=0)
    run_comparison(tmp_path / "comparison", options)
    (tmp_path / "comparison" / MARKER).unlink()
    run_comparison(tmp_path / "comparison", options)
    for name in ("run", "comparison"):
        assert json.loads((tmp_path / name / MARKER).read_text())["kind"] == name


def test_lora_replaces_no_file_of_others(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    from toy_backbone import toy

    from ttd_plugins.lora import save_lora

    adapter = toy()
    adapter.add_lora(2)
    save_lora(adapter, tmp_path / "new")
    save_lora(adapter, tmp_path / "new")
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o044 for file in (tmp_path / "new").iterdir())
    for name, text in (("adapter_model.safetensors", "mine"), ("adapter_config.json", '{"peft_type": "LORA"}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=f"has a file {name} that is no LoRA of"):
            save_lora(adapter, folder)
        assert snapshot(folder) == {name: text.encode()}


def test_a_heat_map_does_not_replace_its_image(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    (tmp_path / "link.png").symlink_to("photo.png")
    before = snapshot(tmp_path)
    for name in ("photo.png", "link.png"):
        status, output = ttd("heatmap", tmp_path / "photo.png", "a dog", "--out", tmp_path / name)
        assert status == 2 and "is the image itself" in output
    assert snapshot(tmp_path) == before
