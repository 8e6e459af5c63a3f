"""No model folder runs Python code of its own, and no loader asks whether it may."""

from __future__ import annotations

import builtins
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from helpers_hub import HUB_NAMES, architectures, open_clip_config, write

from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.plugins import load
from ttd_plugins.toolkit.remote_code import refuse_code

ROOT = Path(__file__).parents[1]
CODE = """
from pathlib import Path
Path({marker!r}).write_text("code ran")
from transformers import PreTrainedTokenizerFast, PretrainedConfig
class Own(PreTrainedTokenizerFast):
    pass
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""


@pytest.fixture(autouse=True)
def architectures_by_name(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "architectures").mkdir()
    with architectures(tmp_path / "architectures", tags=False):
        yield


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that exists if code ran; any question on the terminal is answered with yes."""
    asked: list[str] = []

    def yes(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    file = tmp_path / "marker"
    yield file
    assert asked == []
    assert not file.exists()
    assert not any(name.startswith("transformers_modules.") for name in sys.modules)


def poison(folder: Path, marker: Path, file: str, auto_map: dict[str, Any], **more: Any) -> None:
    """Make a JSON file of a folder name a class in a Python file of the folder."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update({"auto_map": auto_map} | more)
    path.write_text(json.dumps(content))


def poisoned_tokenizer(folder: Path, marker: Path) -> None:
    own = {"AutoTokenizer": ["own.Own", "own.Own"]}
    poison(folder, marker, "tokenizer_config.json", own, tokenizer_class="Own")


def change_model_config(folder: Path, **text: Any) -> None:
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"].update(text)
    path.write_text(json.dumps(content))


FOLDERS = {key: served for key, served in HUB_NAMES.items() if served.folder}


@pytest.mark.parametrize("how", ["flag", "question", "flag without auto_map"])
@pytest.mark.parametrize("key", FOLDERS)
def test_a_tokenizer_with_code_is_refused(tmp_path: Path, marker: Path, key: str, how: str) -> None:
    served, folder = FOLDERS[key], tmp_path / "model"
    write(served, folder, 0)
    if how != "flag without auto_map":
        poisoned_tokenizer(folder, marker)
    if served.library == "open_clip":
        flag = {"tokenizer_kwargs": {"trust_remote_code": True}} if how != "question" else {}
        change_model_config(folder, hf_tokenizer_name="any/name", **flag)
    elif how == "flag without auto_map":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"trust_remote_code": True}))
    assert served.folder is not None
    name = served.folder.format(folder)
    with pytest.raises(UnsupportedModelError, match=r"such code is never run") as caught:
        load(name)
    assert name in str(caught.value)
    assert "trust_remote_code=True" not in str(caught.value)


@pytest.mark.parametrize("key", ["siglip", "openai_clip"])
def test_code_beside_a_class_that_the_library_has_is_ignored(tmp_path: Path, marker: Path, key: str) -> None:
    served, folder = FOLDERS[key], tmp_path / "model"
    write(served, folder, 0)
    poison(folder, marker, "config.json", {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnConfig"})
    assert served.folder is not None
    assert load(served.folder.format(folder)).tokenize(["a cat"]).ids.shape[0] == 1


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("key", ["siglip", "openai_clip"])
def test_an_image_processor_with_code_runs_nothing(tmp_path: Path, marker: Path, key: str, file: str) -> None:
    served, folder = FOLDERS[key], tmp_path / "model"
    write(served, folder, 0)
    own = {"AutoImageProcessor": "own.Own", "AutoProcessor": "own.Own"}
    poison(folder, marker, file, own, image_processor_type="Own", processor_class="Own")
    assert served.folder is not None
    with suppress(UnsupportedModelError):
        load(served.folder.format(folder))


@pytest.mark.parametrize("model_type", ["own", "roberta"])
@pytest.mark.parametrize("family", ["open_clip", "siglip", "eva_clip"])
def test_a_text_tower_with_code_runs_nothing(tmp_path: Path, marker: Path, family: str, model_type: str) -> None:
    served = FOLDERS["siglip of open_clip" if family == "siglip" else family]
    folder, tower = tmp_path / "model", tmp_path / "tower"
    write(served, folder, 0)
    tower.mkdir()
    own = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnConfig", "AutoTokenizer": ["own.Own", None]}
    poison(tower, marker, "config.json", own, model_type=model_type)
    change_model_config(folder, hf_model_name=str(tower), hf_tokenizer_name=None)
    assert served.folder is not None
    with pytest.raises(TTDError) as caught:
        load(served.folder.format(folder))
    assert "trust_remote_code" not in str(caught.value)
    if model_type == "own":
        assert "a text tower of the model type 'own'" in str(caught.value)


@pytest.mark.parametrize("key", ["siglip", "openai_clip"])
def test_a_kernel_on_the_hub_is_refused(tmp_path: Path, marker: Path, key: str) -> None:
    served, folder = FOLDERS[key], tmp_path / "model"
    write(served, folder, 0)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = config.get("text_config", {}) | {"_attn_implementation": "some-one/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    assert served.folder is not None
    with pytest.raises(UnsupportedModelError, match="names 'some-one/kernel'"):
        load(served.folder.format(folder))


def test_configurations_of_any_depth_are_searched() -> None:
    deep: Any = {"trust_remote_code": True}
    for _ in range(5000):
        deep = [{"a": deep}]
    with pytest.raises(UnsupportedModelError, match="sets trust_remote_code"):
        refuse_code(deep, "it")
    refuse_code({"trust_remote_code": False, "attn_implementation": "sdpa"}, "it")
    refuse_code(open_clip_config("some/timm-siglip"), "it")


def test_every_call_of_an_auto_class_is_in_one_place() -> None:
    """``remote_code`` alone calls ``from_pretrained`` of a class that may run code."""
    calls: dict[str, list[str]] = {}
    for file in [*ROOT.glob("ttd_plugins/**/*.py"), *ROOT.glob("adapters/**/*.py")]:
        for line in file.read_text(encoding="utf-8").splitlines():
            code = re.sub(r"[\"'].*[\"']", "", line.split("#")[0])
            if re.search(r"\w\.(from_pretrained|get_tokenizer)\(|Auto\w+\.from_config\(", code):
                calls.setdefault(file.relative_to(ROOT).as_posix(), []).append(code.strip())
    assert sorted(calls) == [
        "ttd_plugins/toolkit/open_clip_models.py",
        "ttd_plugins/toolkit/remote_code.py",
        "ttd_plugins/toolkit/transformers_export.py",
        "ttd_plugins/toolkit/transformers_models.py",
    ]
    # The others load a class of the library itself; open_clip.get_tokenizer is called for its own tokenizer only.
    assert calls["ttd_plugins/toolkit/transformers_models.py"] == [
        "model, report = loader.from_pretrained(folder, config=config, **options)"
    ]
    assert len(calls["ttd_plugins/toolkit/open_clip_models.py"]) == 1


def test_the_environment_is_not_changed_by_loading() -> None:
    before = dict(os.environ)
    load("siglip:tiny")
    assert dict(os.environ) == before
