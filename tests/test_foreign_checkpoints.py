"""Checkpoints as people have them: they load, or one sentence says what they are."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("open_clip")

import torch
from helpers_hub import HUB_NAMES, architectures, random_model, same_weights, write
from safetensors.torch import save_file
from torch import Tensor

from ttd_plugins.backbone_sources import load_tuned
from ttd_plugins.errors import InputError, TTDError, one_sentence, printable
from ttd_plugins.plugins import load
from ttd_plugins.utils.state_dicts import read_state_dict, without_prefixes

NAME = "open_clip:hub-test-vit"
HTML = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tensor]]:
    """State dict of the small architecture ``hub-test-vit``, which open_clip knows by name meanwhile."""
    with architectures(tmp_path_factory.mktemp("names"), tags=False):
        yield {k: v.clone().contiguous() for k, v in random_model(HUB_NAMES["open_clip"], 7).state_dict().items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def inside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a model whose image tower alone is compiled."""
    return {name.replace("visual.", "visual._orig_mod."): value for name, value in state.items()}


OPTIONS = argparse.Namespace(lr=1e-3, name="a", nested=argparse.Namespace(x=[1, 2]))
FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": dict,
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled inside": inside,
    "data parallel": lambda state: prefixed(state, "module."),
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "both, the other way": lambda state: prefixed(state, "_orig_mod.module."),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": OrderedDict(state)},
    "a model in a state_dict": lambda state: {"state_dict": {"model": state}},
    "Lightning": lambda state: {
        "state_dict": prefixed(state, "model."), "epoch": 1, "global_step": 5, "pytorch-lightning_version": "2.5",
        "callbacks": {}, "hyper_parameters": {"lr": 1e-3},
    },
    "Lightning, compiled": lambda state: {"state_dict": prefixed(state, "model._orig_mod.")},
    "Namespace": lambda state: {"state_dict": state, "args": OPTIONS},
    "NumPy scalars": lambda state: {
        "model": state, "best": np.float64(0.5), "loss": np.float32(1), "step": np.int64(3), "done": np.bool_(True),
    },
    "all at once": lambda state: {
        "model": prefixed(state, "module._orig_mod."), "args": OPTIONS, "acc": np.float64(0.1), "scaler": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_loads_in_every_form(weights: dict[str, Tensor], tmp_path: Path, form: str) -> None:
    file = tmp_path / "epoch_1.pt"
    torch.save(FORMS[form](weights), file)
    before = sorted(os.listdir(tmp_path))
    adapter = load(f"{NAME}@{file}")
    assert same_weights(adapter.model, weights)
    assert sorted(os.listdir(tmp_path)) == before
    found = read_state_dict(file).tensors
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model."])
def test_safetensors_with_a_prefix_load_too(weights: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(weights, prefix), tmp_path / "a.safetensors")
    assert same_weights(load(f"{NAME}@{tmp_path / 'a.safetensors'}").model, weights)
    tuned = load_tuned(f"{NAME}@random", str(tmp_path / "a.safetensors"))
    assert same_weights(tuned.model, weights)


def test_the_content_decides_and_not_the_suffix(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "a.bin")
    assert same_weights(load(f"{NAME}@{tmp_path / 'a.bin'}").model, weights)


def test_names_that_would_become_one_stay_as_they_are() -> None:
    tensors = {"module.a": torch.zeros(1), "module._orig_mod.a": torch.ones(1)}
    assert without_prefixes(tensors).keys() == tensors.keys()
    assert without_prefixes({"module.a": torch.zeros(1), "b": torch.ones(1)}).keys() == {"module.a", "b"}
    assert without_prefixes({"module.": torch.zeros(1)}).keys() == {"module."}


def refused(name: str) -> str:
    with pytest.raises(TTDError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message
    for never in ("weights_only", "\x1b", "PyTorch 2.6", "trust", "file an issue", "safe_globals"):
        assert never not in message
    return message


@pytest.mark.parametrize(("content", "said"), [(HTML, "an HTML page"), (POINTER, "a Git LFS pointer"), (b"", "empty")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_what_is_no_checkpoint_is_told(
    weights: dict[str, Tensor], tmp_path: Path, content: bytes, said: str, suffix: str
) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    assert said in refused(f"{NAME}@{file}")
    with pytest.raises(InputError, match=said):
        read_state_dict(file)
    if suffix == ".safetensors":
        with pytest.raises(InputError, match=said):
            load_tuned(f"{NAME}@random", str(file))


@pytest.mark.parametrize(("content", "said"), [(HTML, "an HTML page"), (POINTER, "a Git LFS pointer")])
@pytest.mark.parametrize("key", [key for key, served in HUB_NAMES.items() if served.folder])
def test_what_is_no_model_folder_is_told(tmp_path: Path, key: str, content: bytes, said: str) -> None:
    served = HUB_NAMES[key]
    with architectures(tmp_path, tags=False):
        write(served, tmp_path / "model", 0)
        assert served.folder is not None
        for file in (served.weights_file, "config.json" if served.library == "transformers" else None):
            if file is not None:
                whole = (tmp_path / "model" / file).read_bytes()
                (tmp_path / "model" / file).write_bytes(content)
                message = refused(served.folder.format(tmp_path / "model"))
                assert f"{file} is {said}" in message
                (tmp_path / "model" / file).write_bytes(whole)


def towers(state: dict[str, Tensor], image: bool) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("visual.") == image}


@pytest.mark.parametrize("short", [False, True])
def test_one_tower_alone_is_told(weights: dict[str, Tensor], tmp_path: Path, short: bool) -> None:
    image = towers(weights, True)
    image = {name.removeprefix("visual.") if short else name: value for name, value in image.items()}
    torch.save(image, tmp_path / "a.pt")
    assert "has the weights of an image tower alone" in refused(f"{NAME}@{tmp_path / 'a.pt'}")
    torch.save(towers(weights, False), tmp_path / "b.pt")
    assert "has the weights of a text tower alone" in refused(f"{NAME}@{tmp_path / 'b.pt'}")


def test_other_names_are_counted(weights: dict[str, Tensor], tmp_path: Path) -> None:
    some = dict(list(weights.items())[5:]) | {"extra.weight": torch.ones(1)}
    torch.save(some, tmp_path / "a.pt")
    message = refused(f"{NAME}@{tmp_path / 'a.pt'}")
    assert f"lacks 5 of {len(weights)} tensors" in message
    assert "has 1 others, such as extra.weight" in message


def test_no_pickle_runs_and_no_advice_is_passed_on(weights: dict[str, Tensor], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    before = set(map(str, torch.serialization.get_safe_globals()))
    for number, content in enumerate(
        [{"state_dict": weights, "args": Evil()}, Evil(), {"args": argparse.Namespace(x=Evil())}, {"a": {Path("x")}}]
    ):
        file = tmp_path / f"{number}.pt"
        torch.save(content, file)
        message = refused(f"{NAME}@{file}")
        assert "without code" in message
        assert not (tmp_path / "owned").exists()
    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(scripted, tmp_path / "jit.pt")
    assert "a TorchScript archive" in refused(f"{NAME}@{tmp_path / 'jit.pt'}")
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_numbers_beside_tensors_are_no_state_dict(tmp_path: Path) -> None:
    for content in ({"a": torch.ones(1), "b": 3}, {"epoch": 3}, [torch.ones(1)], torch.ones(2), {}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"no named tensors|contains a"):
            read_state_dict(tmp_path / "a.pt")


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b[0m", "\x1b]0;title\x07red", "\x1b]8;;http://x\x1b\\red", "re\x1b[1md"]
)
def test_escape_sequences_are_removed(text: str) -> None:
    assert printable(text) == "red"
    assert one_sentence(ValueError(text)) == "red"


def test_control_characters_are_replaced() -> None:
    shown = printable("a\x00b\x08c\x9bd\u202ee\x1b")
    assert shown.isprintable()
    assert printable("naïve — “chat” 漢字 🐶\n x") == "naïve — “chat” 漢字 🐶 x"
