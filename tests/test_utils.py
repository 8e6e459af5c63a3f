"""The shared helpers: atomic files, random state, settings."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttd_plugins.errors import InputError
from ttd_plugins.utils.files import atomic_path, flush_to_disk, follow_umask, make_folder, write_atomic
from ttd_plugins.utils.progress import progress_bars
from ttd_plugins.utils.rng import get_rng_state, preserved_rng, seed_everything, seeded_torch, set_rng_state
from ttd_plugins.utils.settings import first_difference, flatten

# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "a.txt", "é")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_private_file_of_another_writer_gets_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """safetensors replaces the temporary file by one that only its owner can read."""
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
        (tmp_path / "b").touch(mode=0o600)
        follow_umask(tmp_path / "b")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_umask_of_the_process_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read it by changing it could leave the umask of another thread at 0."""

    def changed(mask: int) -> int:
        raise AssertionError(f"umask({mask})")

    monkeypatch.setattr(os, "umask", changed)
    write_atomic(tmp_path / "a", "1")
    follow_umask(tmp_path)


def test_files_are_flushed_as_windows_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folders, and flushes only files that are open for writing."""
    flags_of: dict[int, int] = {}
    open_file, flush = os.open, os.fsync

    def opened(path: Any, flags: int, *more: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        handle = open_file(path, flags, *more)
        flags_of[handle] = flags
        return handle

    def flushed(handle: int) -> None:
        if not flags_of[handle] & (os.O_WRONLY | os.O_RDWR):
            raise OSError(9, "Bad file descriptor")
        flush(handle)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", flushed)
    write_atomic(tmp_path / "a", "1")
    flush_to_disk(tmp_path)
    assert (tmp_path / "a").read_text() == "1" and flags_of


def test_the_package_needs_no_module_that_only_unix_has() -> None:
    program = """
import builtins, importlib, pkgutil
import ttd_plugins
from ttd_plugins.errors import MissingDependencyError

original = builtins.__import__
UNIX = {"resource", "fcntl", "termios", "pty", "tty", "pwd", "grp", "posix", "curses", "readline", "syslog"}

def without_unix(name, globals=None, *rest, **more):
    if name.partition(".")[0] in UNIX and str((globals or {}).get("__name__")).startswith("ttd_plugins"):
        raise ImportError(f"{globals['__name__']} imports {name}")
    return original(name, globals, *rest, **more)

builtins.__import__ = without_unix
for module in pkgutil.walk_packages(ttd_plugins.__path__, "ttd_plugins."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except MissingDependencyError:
            pass
import torch
from ttd_plugins.evaluation.protocols.runner import peak_memory
print("memory", peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["memory 0"], done.stderr


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_atomic(file, "old")

    def write_half() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_no_symbolic_link_is_followed(tmp_path: Path) -> None:
    """Links with the names of temporary files, or in the place of the file itself, leave their targets alone."""
    target = tmp_path / "target"
    target.write_text("precious")
    for name in ("a.txt.part", ".a.txt.part", "a.txt"):
        (tmp_path / name).symlink_to(target)
    write_atomic(tmp_path / "a.txt", b"new")
    assert target.read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing/a.txt cannot be written \(No such file or directory\); choose"):
        write_atomic(tmp_path / "missing" / "a.txt", "", advice="choose another --out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the folder .*file/inner cannot be made \(Not a directory\)"):
        make_folder(tmp_path / "file" / "inner")


# Random state --------------------------------------------------------------------------------------------------------


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, -3, 2**70])
def test_a_seed_decides_every_generator(seed: int) -> None:
    with preserved_rng():
        seed_everything(seed)
        first = draw()
        seed_everything(seed)
        assert draw() == first


def test_seeds_without_accelerators_decide_the_same_draws() -> None:
    with preserved_rng():
        seed_everything(7)
        first = draw()
        seed_everything(7, accelerators=False)
        assert draw() == first


def test_a_block_with_a_seed_draws_the_same_and_leaves_the_generators_alone() -> None:
    with preserved_rng():
        state = get_rng_state()
        undisturbed = draw()
        set_rng_state(state)
        with seeded_torch(3):
            first = float(torch.rand(()))
        with seeded_torch(3):
            assert float(torch.rand(())) == first
        assert draw() == undisturbed
        torch.manual_seed(3)
        assert float(torch.rand(())) == first


def test_a_state_is_restored() -> None:
    with preserved_rng():
        state = get_rng_state()
        first = draw()
        set_rng_state(state)
        assert draw() == first


def test_a_block_preserves_the_state() -> None:
    with preserved_rng():
        state = get_rng_state()
        with preserved_rng():
            draw()
        first = draw()
        set_rng_state(state)
        assert draw() == first


# Settings ------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(values, values)
def test_settings_differ_exactly_where_a_difference_is_found(old: Any, new: Any) -> None:
    assert (first_difference(old, new) is None) == (old == new or _only_missing_and_none(old, new))


def _only_missing_and_none(old: Any, new: Any) -> bool:
    """A name that is missing counts as ``None``."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return bool(old == new)
    return all(_only_missing_and_none(old.get(key), new.get(key)) for key in {*old, *new})


def test_a_difference_names_the_setting_and_both_values() -> None:
    old, new = {"run": {"seed": 0, "keep": 3}}, {"run": {"seed": 1, "keep": 3}}
    assert str(first_difference(old, new)) == "run.seed: 0 there, 1 now"
    assert first_difference(old, new, ignore={"run.seed"}) is None
    assert str(first_difference(1, 2)) == "settings: 1 there, 2 now"


def test_flat_names_join_the_names_of_levels() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}


# Progress ------------------------------------------------------------------------------------------------------------


def test_progress_bars_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    with progress_bars() as stage:
        stage("reading", 2)(2)
    out, err = capsys.readouterr()
    assert out == "" and "reading" in err and "2/2" in err


def test_nothing_is_printed_without_a_subtask(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    with progress_bars():
        pass
    assert capsys.readouterr() == ("", "")


def test_the_bars_of_old_finished_subtasks_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    with progress_bars(keep_finished=2) as stage:
        stage("unfinished", 2)(1)
        for number in range(5):
            stage(f"finished {number}", 1)(1)
    err = capsys.readouterr().err
    assert "unfinished" in err and "finished 4" in err and "finished 3" in err and "finished 1" not in err
