"""Configuration files and run state with wild content: one sentence or a correct result, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs the extra 'train'")

from helpers_training import run_toy, toy_config, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_backbone import toy

from ttd_plugins.errors import TTDError
from ttd_plugins.training.checkpoint_state import CHECKSUMS
from ttd_plugins.training.checkpoints import checkpoint_folder, read_checkpoint, restore_backbone
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.jsonl_log import JsonlLog

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
RUNS = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -1, 2**63, "1e3"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = [f"{section}.{key}" for section, keys in TrainConfig().as_dict().items() for key in keys]
KEYS += ["data.loader.buffer", "data.loader.shuffle", "data.options.spec", "backbone.options.name", "ttd.calibration.x"]


def refused_or_fine(action: Callable[[], Any]) -> Any:
    """The result, or ``None`` where it is refused in one sentence."""
    refusal = ""
    try:
        return action()
    except TTDError as error:
        refusal = str(error)
    assert "\n" not in refusal and 0 < len(refusal) < 3000
    return None


# Configuration -------------------------------------------------------------------------------------------------------


def check_configuration(values: Any, text: str, changes: list[tuple[str, Any]]) -> None:
    config = refused_or_fine(lambda: TrainConfig.from_dict(values))
    if config is not None:
        assert TrainConfig.from_dict(config.as_dict()) == config
    changed: dict[str, Any] = {}
    for path, value in changes:
        inner = changed
        *sections, name = path.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                return
        inner[name] = value
    refused_or_fine(lambda: TrainConfig.from_dict(changed))
    refused_or_fine(lambda: TrainConfig.read(changes=[f"{path}={value}" for path, value in changes]))
    refused_or_fine(lambda: TrainConfig.read(changes=[text]))


def check_configuration_file(folder: Path, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    config = refused_or_fine(lambda: TrainConfig.read(file))
    if config is not None:
        file.write_text(config.yaml())
        assert TrainConfig.read(file) == config


CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4)


@QUICK
@given(VALUES, st.text(max_size=40), CHANGES)
def test_wild_configurations(values: Any, text: str, changes: list[tuple[str, Any]]) -> None:
    check_configuration(values, text, changes)


@pytest.mark.slow
@LONG
@given(VALUES, st.text(max_size=40), CHANGES)
def test_many_wild_configurations(values: Any, text: str, changes: list[tuple[str, Any]]) -> None:
    check_configuration(values, text, changes)


WILD = st.sampled_from([b"[" * 3000, b"&a [*a]", b"!!python/x", b"1e999"])
WHOLE = toy_config().yaml().encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with flipped bytes, a cut, or an insertion."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=6) | WILD)
        else:
            del changed[place : place + draw(st.integers(1, 9))]
    return bytes(changed)


@QUICK
@given(st.one_of(damaged(WHOLE), st.binary(max_size=60)))
def test_damaged_configuration_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_configuration_file(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@LONG
@given(st.one_of(damaged(WHOLE), st.binary(max_size=60)))
def test_many_damaged_configuration_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check_configuration_file(tmp_path_factory.getbasetemp(), content)


# Run state -----------------------------------------------------------------------------------------------------------


class Run:
    """A finished run, copies of which are damaged; those of earlier releases have no checksums."""

    def __init__(self, folder: Path) -> None:
        self.config = toy_config(optimizer={"steps": 2, "warm_up": 1}, run={"checkpoint_every": 1})
        self.expected = weights_of(run_toy(folder / "run", self.config))
        self.folder, self.copy = folder / "run", folder / "copy"

    def restore(self, *, checksums: bool) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.folder, self.copy)
        if not checksums:
            file = checkpoint_folder(self.copy, 2) / "state.json"
            state = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in state.items() if key not in CHECKSUMS}))
        return self.copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("finished"))


STATE_KEYS = [
    *("format", "step", "steps", "epoch", "positions", "processes", "scaler", "skipped_steps", "figures", "window"),
    *("watch", "health", "warnings", "random"),
]
NAMES = ("state.json", "trained.safetensors", "buffers.safetensors", "teacher.safetensors", "optimizer.safetensors",
         "random.safetensors")  # fmt: skip


def check_state_fields(run: Run, changes: dict[str, Any], removed: list[str]) -> None:
    out = run.restore(checksums=False)
    file = checkpoint_folder(out, 2) / "state.json"
    state = {key: value for key, value in (json.loads(file.read_text()) | changes).items() if key not in removed}
    file.write_text(json.dumps(state))
    refused_or_fine(lambda: read_checkpoint(out))
    refused_or_fine(lambda: restore_backbone(out, backbone=toy()))
    refused_or_fine(lambda: run_toy(out, run.config, resume=True))


def check_damaged_file(run: Run, name: str, data: st.DataObject, *, checksums: bool) -> None:
    out = run.restore(checksums=checksums)
    file = checkpoint_folder(out, 2) / name
    before = file.read_bytes()
    content = data.draw(damaged(before))
    file.write_bytes(content)
    found = refused_or_fine(lambda: read_checkpoint(out))
    if checksums and found is not None:
        # Only blanks between the tokens of JSON may change unseen.
        assert content == before or (name == "state.json" and json.loads(content) == json.loads(before))
    refused_or_fine(lambda: run_toy(out, run.config, resume=True))


def check_log(run: Run, name: str, data: st.DataObject) -> None:
    out = run.restore(checksums=True)
    lines = data.draw(st.lists(st.one_of(VALUES.map(json.dumps), st.text(max_size=20), st.just('{"step": 1, "x": 2}'))))
    wild = "\n".join(lines).encode("utf-8", "surrogatepass")
    (out / name).write_bytes(data.draw(st.one_of(st.just(wild), damaged((run.folder / "log.jsonl").read_bytes()))))
    result = refused_or_fine(lambda: run_toy(out, run.config, resume=True))
    assert result is not None
    for line in (out / name).read_text().splitlines():
        assert json.loads(line)["step"] <= 2
    assert all(isinstance(metrics, dict) for _, metrics in result.evaluations)


STATES = (
    st.dictionaries(st.sampled_from(STATE_KEYS), VALUES, max_size=2),
    st.lists(st.sampled_from(STATE_KEYS), max_size=2),
)


@QUICK
@given(*STATES)
def test_wild_states(finished: Run, changes: dict[str, Any], removed: list[str]) -> None:
    check_state_fields(finished, changes, removed)


@pytest.mark.slow
@RUNS
@given(*STATES)
def test_many_wild_states(finished: Run, changes: dict[str, Any], removed: list[str]) -> None:
    check_state_fields(finished, changes, removed)


@QUICK
@given(st.sampled_from(NAMES), st.data(), st.booleans())
def test_damaged_checkpoints(finished: Run, name: str, data: st.DataObject, checksums: bool) -> None:
    check_damaged_file(finished, name, data, checksums=checksums)


@pytest.mark.slow
@RUNS
@given(st.sampled_from(NAMES), st.data(), st.booleans())
def test_many_damaged_checkpoints(finished: Run, name: str, data: st.DataObject, checksums: bool) -> None:
    check_damaged_file(finished, name, data, checksums=checksums)


@QUICK
@given(st.sampled_from(["log.jsonl", "nonfinite.jsonl"]), st.data())
def test_damaged_logs(finished: Run, name: str, data: st.DataObject) -> None:
    check_log(finished, name, data)


@pytest.mark.slow
@RUNS
@given(st.sampled_from(["log.jsonl", "nonfinite.jsonl"]), st.data())
def test_many_damaged_logs(finished: Run, name: str, data: st.DataObject) -> None:
    check_log(finished, name, data)


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('3\n{"step": 1}\n{"step": "2"}\n[1]\n{"step": 2}\n{"st')
    assert log.read() == [{"step": 1}, {"step": 2}]
    assert log.truncate(1) == 3 and log.read() == [{"step": 1}]


# Mistakes that were tracebacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "run.seed=-1"], "run.seed must be at least 0 and at most 9223372036854775807, not -1"),
        (["--set", "run.seed=99999999999999999999"], "run.seed must be at least 0 and at most 9223372036854775807"),
        (["--set", "data.loader.buffer=x"], "data.loader: buffer must be a whole number, not the text 'x'"),
        (["--loader-option", "buffer=0"], "data.loader: buffer must be 1 or more, not 0"),
        (["--loader-option", "shuffle=1.5"], "data.loader: shuffle must be true or false"),
        (["--set", "data.options.spec=x"], "data.options cannot have the key 'spec'"),
        (["--backbone-option", "name=x"], "backbone.options cannot have the key 'name'"),
        (["--set", f"data.source={'x' * 5000}"], ""),
        (["--out", "x" * 5000], "cannot be read (File name too long)"),
        (["--backbone", "x" * 5000], ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_of_ttd_train_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_output_folders import errors_of, ttd

    monkeypatch.chdir(tmp_path)
    status, output = ttd(
        "train", "--backbone", "open_clip:tiny", "--data", "none", "--steps", 1, "--set", "run.cpu=true", *arguments
    )
    assert status == 2 and errors_of(output) == 1, output
    assert sentence in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--seed", "-1"], ["compare", "--backbones", "open_clip:tiny", "--first-seed", "-1"],
        ["calibrate", "open_clip:tiny", "--seed", "-1"],
        ["compare", "--backbones", "open_clip:tiny", "--first-seed", str(2**70)],
        ["compare", "--backbones", "open_clip:tiny+" + "x" * 5000], ["compare", "--backbones", "x" * 5000],
        ["compare", "--backbones", "open_clip:tiny", "--device", "meta", "--steps", "1"],
        ["tags", "{image}", "a dog", "--device", "meta"], ["tags", "{image}", "a dog", "--backbone", "x" * 5000],
        ["tags", "x" * 5000, "a dog"], ["heatmap", "{image}", "a dog", "--out", "x" * 5000 + "/y.png"],
        ["export", "x" * 5000, "--out", "y"], ["export", "--backbone", "open_clip:tiny", "--out", "x" * 5000],
        ["prune", "x" * 5000, "--out", "y.jsonl"], ["prune", "{image}", "--out", "x" * 5000 + ".jsonl"],
        ["eval", "tags", "x" * 5000, "--out", "y"], ["new-adapter", "some_family", "--out", "x" * 5000],
        ["bench", "--data", "x" * 5000], ["bench", "--device", "meta"],
    ],
    ids=lambda value: " ".join(value)[:50],
)  # fmt: skip
def test_mistakes_of_other_commands_are_one_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from test_output_folders import errors_of, ttd

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    status, output = ttd(*(one.replace("{image}", str(tmp_path / "image.png")) for one in arguments))
    assert status == 2 and errors_of(output) == 1, output
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError("4 GiB"), "memory ran out (4 GiB); use a smaller batch, image or backbone"),
        (OSError(28, "No space left on device", "x.png"), "the system refused an operation: no space left on device"),
        (PermissionError(13, "Permission denied", "/etc/shadow"), "permission denied ('/etc/shadow')"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from test_output_folders import errors_of, ttd

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    monkeypatch.setattr("ttd_plugins.cli.image_maps.compute_maps", fail)
    status, output = ttd("tags", tmp_path / "image.png", "a dog")
    assert status == 2 and errors_of(output) == 1 and sentence in output, output


# Scores of `ttd prune` -----------------------------------------------------------------------------------------------


def test_pruning_replaces_no_file_of_others(tmp_path: Path) -> None:
    from ttd_plugins.data.pruning import _require_skip_log, _resume
    from ttd_plugins.errors import InputError

    for content in ('{"mine": 1}\n', "mine", '"mine"\n', '{"a": 1}', "3\n"):
        part = tmp_path / "scores.jsonl.part"
        part.write_text(content)
        with pytest.raises(InputError, match="is not an incomplete file of scores"):
            _resume(part, {"backbone": "x"})
        assert part.read_text() == content
    for content in ("", '{"scores": {"back'):
        part.write_text(content)
        assert _resume(part, {"backbone": "x"}) is None and part.read_text().endswith("}}\n")
    part.unlink()
    (tmp_path / "mine").write_text("mine")
    part.symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="is not an incomplete file of scores"):
        _resume(part, {"backbone": "x"})
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(InputError, match="is not a list of skipped samples and would be replaced"):
        _require_skip_log(tmp_path / "mine")
    with part.with_name("skips").open("w") as stream:
        stream.write('{"key": "a", "reason": "b"}\n')
    _require_skip_log(part.with_name("skips"))


def test_a_read_only_disk_is_not_a_matter_of_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os
    import tempfile

    from ttd_plugins.data.pruning import require_scores_file
    from ttd_plugins.errors import InputError

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot be written: read-only file system"):
        require_scores_file(tmp_path / "scores.jsonl")
