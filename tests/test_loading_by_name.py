"""Loading by name over HTTP, from folders and from the cache, and from a hub that fails in every way that hubs do.

The client is the real huggingface_hub; only the waits between its attempts are cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import huggingface_hub
import numpy as np
import open_clip
import torch
from helpers_hub import (
    HUB_NAMES,
    TAGS,
    TOKENIZER_REPOSITORY,
    Served,
    architectures,
    same_weights,
    write,
)
from helpers_siglip import siglip_like_tokenizer
from hub_server import HubServer, environment, point_at, serving
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import TTDError, UnsupportedModelError
from ttd_plugins.plugins import load

HUB_KEYS = list(HUB_NAMES)
NAMES: dict[str, Served] = HUB_NAMES | {f"{family} by tag": served for family, served in TAGS.items()}
FAMILIES = ("open_clip", "eva_clip", "siglip", "openai_clip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Tensor]]]]:
    """A folder for every repository, by its name, and its weights; timm and open_clip know the architectures."""
    root = tmp_path_factory.mktemp("hub")
    with architectures(root):
        weights = {
            served.repository: write(served, root / served.repository, seed)
            for seed, served in enumerate(NAMES.values())
        }
        siglip_like_tokenizer().save_pretrained(root / TOKENIZER_REPOSITORY)
        yield root, weights


@pytest.fixture
def hub(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A healthy hub with all repositories, and this process pointed at it with an empty cache."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    patient = {name: value for name, value in vars(time).items() if name != "sleep"}
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", SimpleNamespace(**patient, sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    with serving() as server:
        fill(server, folders[0])
        point_at(server.url, tmp_path / "cache", monkeypatch)
        yield server


def fill(server: HubServer, root: Path) -> None:
    for repository in (*(served.repository for served in NAMES.values()), TOKENIZER_REPOSITORY):
        server.add(repository, root / repository)


def cached(cache: Path) -> list[Path]:
    """Files with content in the cache, unfinished ones included."""
    return [
        file for file in cache.rglob("*") if file.is_file() and not file.is_symlink() and ".locks" not in file.parts
    ]


def refused(name: str, *parts: str) -> str:
    """The one sentence with which a load ends."""
    with pytest.raises(TTDError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    for part in parts:
        assert part in message
    return message


# A healthy hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NAMES)
def test_by_name_then_from_the_warm_cache(
    hub: HubServer, folders: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = NAMES[key]
    weights = folders[1][served.repository]
    adapter = load(served.name)
    assert same_weights(adapter.model, weights)
    assert not adapter.model.training
    assert adapter.description.family == served.family
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    assert adapter.tokenize(["a cat"]).lengths.tolist() in ([3], [4])
    ids = adapter.tokenize(["a cat"]).ids
    hub.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        again = load(served.name)
        assert same_weights(again.model, weights)
        assert again.description == adapter.description
        assert torch.equal(again.tokenize(["a cat"]).ids, ids)
    assert hub.requests == []
    hub.stop()
    assert same_weights(load(served.name).model, weights)


@pytest.mark.parametrize("key", [key for key, served in HUB_NAMES.items() if served.folder is not None])
def test_a_local_folder(hub: HubServer, folders: Any, key: str) -> None:
    served = HUB_NAMES[key]
    root, weights = folders
    adapter = load(str(served.folder).format(root / served.repository))
    assert same_weights(adapter.model, weights[served.repository])
    assert adapter.description.mean == (0.1, 0.2, 0.3)
    assert adapter.tokenize(["a cat"]).truncated == [False]
    assert hub.requests == []


@pytest.mark.parametrize("key", [*FAMILIES, "siglip of open_clip"])
def test_half_precision_is_the_served_weights_rounded(hub: HubServer, folders: Any, key: str) -> None:
    served = HUB_NAMES[key]
    precision = "pure_bf16" if served.library == "open_clip" else "bf16"
    found = load(served.name, precision=precision).model.state_dict()
    for name, value in folders[1][served.repository].items():
        expected = value.bfloat16() if found[name].dtype == torch.bfloat16 else value
        assert torch.equal(found[name], expected), name
    assert sum(value.dtype == torch.bfloat16 for value in found.values()) > len(found) // 2


@pytest.mark.parametrize("key", HUB_KEYS)
def test_random_weights_of_a_hub_model_fetch_no_weights(hub: HubServer, folders: Any, key: str) -> None:
    served = HUB_NAMES[key]
    adapter = load(f"{served.name}@random")
    assert not same_weights(adapter.model, folders[1][served.repository])
    assert not [path for _, path in hub.requests if path.endswith(served.weights_file)]


@pytest.mark.parametrize("key", ["open_clip", "siglip", "openai_clip"])
def test_weights_in_the_older_format(hub: HubServer, folders: Any, tmp_path: Path, key: str) -> None:
    served = HUB_NAMES[key]
    weights = folders[1][served.repository]
    older = {"open_clip": "open_clip_pytorch_model.bin"}.get(key, "pytorch_model.bin")
    torch.save(weights, tmp_path / older)
    files = hub.repositories[served.repository]
    del files[served.weights_file]
    files[older] = (tmp_path / older).read_bytes()
    assert same_weights(load(served.name).model, weights)


@pytest.mark.parametrize("key", ["siglip", "openai_clip"])
def test_weights_in_parts(hub: HubServer, folders: Any, tmp_path: Path, key: str) -> None:
    served = HUB_NAMES[key]
    weights = folders[1][served.repository]
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    files = hub.repositories[served.repository]
    del files[served.weights_file]
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, tmp_path / file, metadata={"format": "pt"})
        files[file] = (tmp_path / file).read_bytes()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert same_weights(load(served.name).model, weights)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("open_clip:hf-hub:some/timm-siglip", "timm trunk"),
        ("eva_clip:hf-hub:some/native-vit", "only EVA trunks"),
        ("siglip:hf-hub:some/native-vit", ""),
        ("siglip:some/clip", ""),
        ("openai_clip:some/siglip", "model type 'siglip'"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(
    hub: HubServer, name: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot be adapted: .*{reason}"):
        load(name)
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


# A hub that fails ----------------------------------------------------------------------------------------------------

FAULTS = {
    "silent": ({"api": "silent"}, ["cannot be reached", "connect to the network once", "HF_HUB_OFFLINE=1"]),
    "broken": ({"*": 500}, ["HTTP status 500", "try again later"]),
    "no such repository": ({"api": 404}, ["HTTP status 404", "check the name"]),
    "not for everybody": ({"api": 401}, ["HTTP status 401", "hf auth login"]),
    "gated weights": ({"*.safetensors": 403}, ["refuses", "HTTP status 403", "hf auth login"]),
    "short weights": ({"*.safetensors": "short"}, ["did not send all of", "try again"]),
    "half of the weights": ({"*.safetensors": "half"}, ["did not send all of", "try again"]),
}


@pytest.mark.parametrize("key", HUB_KEYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_leaves_a_cache_that_works(
    hub: HubServer, folders: Any, tmp_path: Path, key: str, fault: str
) -> None:
    served = HUB_NAMES[key]
    hub.faults, said = FAULTS[fault]
    began = time.monotonic()
    refused(served.name, *said)
    assert time.monotonic() - began < 30
    content = (folders[0] / served.repository / served.weights_file).stat().st_size
    assert all(file.stat().st_size < content // 2 for file in cached(tmp_path / "cache"))
    hub.faults = {}
    assert same_weights(load(served.name).model, folders[1][served.repository])


@pytest.mark.slow
@pytest.mark.parametrize("key", HUB_KEYS)
@pytest.mark.parametrize("fault", ["stall", 500])
def test_weights_that_stall_or_fail_on_the_way(
    hub: HubServer, folders: Any, monkeypatch: pytest.MonkeyPatch, key: str, fault: int | str
) -> None:
    served = HUB_NAMES[key]
    hub.faults = {"*.safetensors": fault}
    refused(served.name, "HTTP status 500" if fault == 500 else "did not send all of", "try again")
    hub.faults = {}
    assert same_weights(load(served.name).model, folders[1][served.repository])


@pytest.mark.parametrize("key", NAMES)
def test_a_hub_that_is_down_and_then_is_not(
    hub: HubServer, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    served = NAMES[key]
    hub.stop()
    began = time.monotonic()
    refused(served.name, f"the model hub {hub.url} cannot be reached", "refused", "connect to the network once")
    # The client itself would try again for most of a minute, for every file.
    assert time.monotonic() - began < 15
    with serving() as healthy:
        fill(healthy, folders[0])
        point_at(healthy.url, tmp_path / "cache", monkeypatch)
        assert same_weights(load(served.name).model, folders[1][served.repository])


@pytest.mark.parametrize("key", HUB_KEYS)
def test_an_empty_cache_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(HUB_NAMES[key].name, "HF_HUB_OFFLINE is set", "unset it")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("siglip", "tokenizer_config.json"),
        ("openai_clip", "tokenizer_config.json"),
        ("siglip", "preprocessor_config.json"),
        ("openai_clip", "preprocessor_config.json"),
        ("siglip of open_clip", "tokenizer_config.json"),
    ],
)
def test_a_small_file_that_fails_is_not_replaced_by_a_default(
    hub: HubServer, folders: Any, key: str, file: str
) -> None:
    """Left to itself transformers goes on without an optional file, whatever the reason for which it did not come."""
    served = HUB_NAMES[key]
    hub.faults = {file: "short"}
    refused(served.name, file, "did not send all of")
    hub.faults = {}
    adapter = load(served.name)
    assert same_weights(adapter.model, folders[1][served.repository])
    assert adapter.description.mean == (0.1, 0.2, 0.3)


# Never random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NAMES)
@pytest.mark.parametrize("fault", ["absent", "of another shape", "damaged", "without a file"])
def test_weights_are_never_made_up(hub: HubServer, folders: Any, tmp_path: Path, key: str, fault: str) -> None:
    served = NAMES[key]
    files = hub.repositories[served.repository]
    if fault == "without a file":
        del files[served.weights_file]
    elif fault == "damaged":
        content = files[served.weights_file]
        files[served.weights_file] = content[: len(content) // 2]
    else:
        weights = load_file(folders[0] / served.repository / served.weights_file)
        # open_clip resamples position embeddings of another length on purpose.
        name = next(name for name in sorted(weights) if weights[name].ndim == 2 and "position" not in name)
        changed = weights.pop(name)
        if fault == "of another shape":
            weights[name] = torch.cat([changed, changed])
        save_file(weights, tmp_path / "changed", metadata={"format": "pt"})
        files[served.weights_file] = (tmp_path / "changed").read_bytes()
    said = {"without a file": f"has no {served.weights_file}"}.get(fault, "cannot be loaded")
    refused(served.name, said)
    # Whatever went wrong upstream, a mended repository is a new commit, and loads.
    hub.add(served.repository, folders[0] / served.repository)
    assert same_weights(load(served.name).model, folders[1][served.repository])


# Tags with a URL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["open_clip", "eva_clip", "siglip"])
@pytest.mark.parametrize("fault", [None, 404, 500, "half", "silent"])
def test_a_tag_with_a_url(
    hub: HubServer, folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, fault: int | str | None
) -> None:
    served = TAGS[family]
    architecture = served.name.partition(":")[2].partition("@")[0]
    url = f"{hub.url}/{served.repository}/resolve/main/{served.weights_file}"
    tag = open_clip.pretrained._pcfg(url=url, mean=(0.1, 0.2, 0.3))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, architecture, {"linked": tag})
    name = f"{family}:{architecture}@linked"
    place = {"cache_dir": str(tmp_path / "downloads")}
    if fault is not None:
        hub.faults = {served.weights_file: fault}
        with pytest.raises(TTDError, match=r"cannot be loaded: http") as caught:
            load(name, **place)
        assert "again" in str(caught.value) and "\n" not in str(caught.value)
        assert cached(tmp_path / "downloads") == []
        hub.faults = {}
    assert same_weights(load(name, **place).model, folders[1][served.repository])
    hub.stop()
    if family != "siglip":
        assert same_weights(load(name, **place).model, folders[1][served.repository])


# As a user does it ---------------------------------------------------------------------------------------------------

PROGRAM = """
import hashlib, sys, tempfile
from pathlib import Path
from helpers_hub import HUB_NAMES, TAGS, architectures
from ttd_plugins.plugins import load
with architectures(Path(tempfile.mkdtemp())):
    for served in [*HUB_NAMES.values(), *TAGS.values()]:
        digest = hashlib.sha256()
        for name, value in sorted(load(served.name).model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        print(served.name, digest.hexdigest())
"""


def test_with_environment_variables_in_a_process_of_its_own(folders: Any, tmp_path: Path) -> None:
    expected = []
    for served in [*HUB_NAMES.values(), *TAGS.values()]:
        digest = hashlib.sha256()
        for name, value in sorted(folders[1][served.repository].items()):
            digest.update(name.encode() + value.numpy().tobytes())
        expected.append(f"{served.name} {digest.hexdigest()}")
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    with serving() as server:
        fill(server, folders[0])
        base = {**os.environ, **environment(server.url, tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=base | more
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines() == expected
            if not more:
                assert server.requests
                server.requests.clear()
        assert server.requests == []


@pytest.mark.parametrize("key", NAMES)
def test_the_command_line_says_it_in_one_line(hub: HubServer, tmp_path: Path, key: str) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(picture)
    hub.faults = {"*.safetensors": "short"}
    arguments = ["tags", str(picture), "a cat", "--backbone", NAMES[key].name]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (cli.USER_ERROR, "")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "did not send all of" in lines[0]
    assert "Traceback" not in result.stderr


def test_the_server_is_not_what_makes_these_tests_pass(hub: HubServer, tmp_path: Path) -> None:
    """A repository that is not there is refused by the hub, and its cache stays empty."""
    refused("open_clip:hf-hub:nobody/nothing", "HTTP status 401", "check the name")
    assert not [file for file in cached(tmp_path / "cache") if file.suffix == ".safetensors"]
