"""Damaged and hostile checkpoints, runs, LoRA folders and model folders: one sentence, no hang, nothing written.

The quick examples run with the other tests; ``-m slow`` runs for minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("peft")

import torch
from helpers_hub import HUB_NAMES, architectures, write
from helpers_training import run_toy, toy_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_backbone import toy

from ttd_plugins.backbone_sources import load_trained_weights
from ttd_plugins.errors import TTDError
from ttd_plugins.lora import load_lora, save_lora
from ttd_plugins.plugins import load
from ttd_plugins.training.checkpoints import read_checkpoint, restore_backbone
from ttd_plugins.utils.state_dicts import read_state_dict

QUICK = settings(max_examples=40, deadline=10_000, suppress_health_check=list(HealthCheck), derandomize=True)
SLOW = settings(max_examples=1000, deadline=30_000, suppress_health_check=list(HealthCheck))

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400), st.just("\x1b[31m")
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of a file's bytes: cut, flipped, inserted, repeated or replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace", "repeat", "length", "nothing"]))
    share, data = draw(st.floats(0, 1)), draw(st.binary(max_size=40))

    def change(content: bytes) -> bytes:
        place = int(share * len(content))
        if kind == "cut":
            return content[:place]
        if kind == "flip":
            return content[:place] + bytes(byte ^ 0x55 for byte in content[place : place + 3]) + content[place + 3 :]
        if kind == "insert":
            return content[:place] + data + content[place:]
        if kind == "repeat":
            return content + content
        if kind == "length":  # of a safetensors header
            return struct.pack("<Q", int(share * 2**63)) + content[8:]
        return data if kind == "replace" else content

    return change


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            status = (Path(root) / name).lstat()
            found[str((Path(root) / name).relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def outcome(action: Callable[[], object], work: Path) -> TTDError | None:
    """Whatever is loaded: it works, or it raises a TTDError of one printable line; no file is written or changed."""
    before = snapshot(work)
    grad, failed = torch.is_grad_enabled(), None
    # A folder of its own, since other processes write to the system's.
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", temporary)
        try:
            action()
        except TTDError as error:
            failed = error
        assert not [name for name in os.listdir(temporary) if name.startswith("ttd-")]
    if failed is not None:
        assert "\n" not in str(failed)
        assert "weights_only" not in str(failed)
    assert snapshot(work) == before
    assert torch.is_grad_enabled() == grad
    return failed


# Files of weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from safetensors.torch import save

    folder = tmp_path_factory.mktemp("weights")
    state = {name: value.clone().contiguous() for name, value in toy().model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(a=1), "x": np.float64(1)}, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return {
        "a.safetensors": save(state),
        "a.pt": (folder / "new.pt").read_bytes(),
        "b.pt": (folder / "old.pt").read_bytes(),
    }


def weights_example(files: dict[str, bytes], name: str, damage: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        file = Path(folder) / name
        file.write_bytes(damage(files[name]))
        outcome(lambda: read_state_dict(file), Path(folder))
        outcome(lambda: load_trained_weights(toy(), file), Path(folder))


@QUICK
@given(name=st.sampled_from(["a.safetensors", "a.pt", "b.pt"]), damage=damages())
def test_damaged_weights(weights_files: dict[str, bytes], name: str, damage: Callable[[bytes], bytes]) -> None:
    weights_example(weights_files, name, damage)


@pytest.mark.slow
@SLOW
@given(name=st.sampled_from(["a.safetensors", "a.pt", "b.pt"]), damage=damages())
def test_damaged_weights_at_length(
    weights_files: dict[str, bytes], name: str, damage: Callable[[bytes], bytes]
) -> None:
    weights_example(weights_files, name, damage)


# Runs ----------------------------------------------------------------------------------------------------------------

RUN_FILES = ["trained.safetensors", "buffers.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    run_toy(out, toy_config(optimizer={"steps": 1}))
    return out


def run_example(run: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        copy = Path(folder) / "run"
        shutil.copytree(run, copy)
        file = next(copy.glob(f"checkpoints/step-*/{name}"))
        file.write_bytes(damage(file.read_bytes()))
        outcome(lambda: read_checkpoint(copy), Path(folder))
        outcome(lambda: restore_backbone(copy, backbone=toy()), Path(folder))


@QUICK
@given(name=st.sampled_from(RUN_FILES), damage=damages())
def test_damaged_runs(run: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    run_example(run, name, damage)


@pytest.mark.slow
@SLOW
@given(name=st.sampled_from(RUN_FILES), damage=damages())
def test_damaged_runs_at_length(run: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    run_example(run, name, damage)


# LoRA folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    adapter = toy()
    adapter.add_lora(2)
    save_lora(adapter, folder)
    return folder


CHANGES = st.dictionaries(
    st.sampled_from(
        ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_dora", "rank_pattern",
         "modules_to_save", "base_model_name_or_path", "auto_mapping", "init_lora_weights", "fan_in_fan_out"]
    ),
    json_values, max_size=3,
)  # fmt: skip


def lora_example(
    lora: Path, name: str, damage: Callable[[bytes], bytes], changes: dict[str, Any], content: object
) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        copy = Path(folder) / "lora"
        shutil.copytree(lora, copy)
        config = copy / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
        if content is not None:
            config.write_text(json.dumps(content))
        adapter = toy()
        before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
        failed = outcome(lambda: load_lora(adapter, copy), Path(folder))
        assert adapter.has_lora == (failed is None)
        if failed is not None:
            after = adapter.model.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(value, after[key]) for key, value in before.items())


LORA = {
    "name": st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    "damage": damages(),
    "changes": CHANGES,
    "content": st.none() | json_values,
}


@QUICK
@given(**LORA)
def test_damaged_lora(lora: Path, **example: Any) -> None:
    lora_example(lora, **example)


@pytest.mark.slow
@SLOW
@given(**LORA)
def test_damaged_lora_at_length(lora: Path, **example: Any) -> None:
    lora_example(lora, **example)


@pytest.mark.parametrize("r", [float("nan"), float("inf"), -1, 0, 1.5, 10**12, 3, True, "2", None, [2]])
def test_a_rank_that_is_none_is_refused_before_it_is_allocated(lora: Path, tmp_path: Path, r: Any) -> None:
    shutil.copytree(lora, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": r}))
    adapter = toy()
    with pytest.raises(TTDError, match=r"r must be a whole number|r is 3, and"):
        load_lora(adapter, tmp_path / "lora")
    assert not adapter.has_lora


@pytest.mark.parametrize("key", ["lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "2", None])
def test_a_number_that_is_not_finite_is_refused(lora: Path, tmp_path: Path, key: str, value: Any) -> None:
    shutil.copytree(lora, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(TTDError, match="no LoRA can be read"):
        load_lora(toy(), tmp_path / "lora")


# Model folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with architectures(folder, tags=False):
        write(HUB_NAMES["open_clip"], folder / "model", 0)
    return folder / "model"


SECTIONS = st.dictionaries(
    st.sampled_from(
        ["hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs", "context_length", "trust_remote_code",
         "timm_model_name", "pool_type", "image_size", "embed_dim", "quick_gelu"]
    ),
    scalars.filter(lambda value: not isinstance(value, int) or isinstance(value, bool) or abs(value) < 64)
    | st.dictionaries(st.sampled_from(["trust_remote_code", "clean", "auto_map"]), scalars, max_size=2),
    max_size=2,
)  # fmt: skip


def model_example(model_folder: Path, part: str, changes: dict[str, Any], damage: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        copy = Path(folder) / "model"
        shutil.copytree(model_folder, copy)
        config = next(copy.rglob("open_clip_config.json"))
        content = json.loads(config.read_text())
        content["model_cfg"][part] = content["model_cfg"].get(part, {}) | changes
        config.write_bytes(damage(json.dumps(content).encode()))
        outcome(lambda: load(f"open_clip:local-dir:{config.parent}"), Path(folder))


MODEL = {"part": st.sampled_from(["vision_cfg", "text_cfg"]), "changes": SECTIONS, "damage": damages()}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@settings(QUICK, max_examples=12)
@given(**MODEL)
def test_damaged_model_folders(no_network: None, model_folder: Path, **example: Any) -> None:
    model_example(model_folder, **example)


@pytest.mark.slow
@settings(SLOW, max_examples=150)
@given(**MODEL)
def test_damaged_model_folders_at_length(no_network: None, model_folder: Path, **example: Any) -> None:
    model_example(model_folder, **example)
