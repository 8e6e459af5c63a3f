"""The push of docs/export.md: `ttd export --push-to-hub` against a hub on the loopback address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from hub_server import HubServer
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.errors import InputError
from ttd_plugins.export import ModelCard, export_backbone, render_card
from ttd_plugins.hub_upload import check_push, push_to_hub
from ttd_plugins.plugins import load

REPOSITORY, TOKEN = "user/shoes-clip", "hf_local"
TINY = "open_clip:tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server.serving() as server:
        hub_server.point_at(server.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        server.tokens.add(TOKEN)
        yield server


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = load(TINY)
    adapter.add_lora(2)
    folder = tmp_path_factory.mktemp("export")
    export_backbone(adapter, folder / "lora", form="lora")
    export_backbone(adapter, folder / "weights", form="weights")
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["export", *arguments])


def test_the_command_pushes_a_whole_export_and_leaves_no_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "here"))
    monkeypatch.setattr("tempfile.tempdir", None)
    done = run("--backbone", TINY, "--push-to-hub", REPOSITORY, "--private", "--licence", "mit")
    assert done.exit_code == 0, done.output
    assert f"pushed to {hub.url}/{REPOSITORY} (commit {hub.commit(REPOSITORY)[:10]})" in done.output
    assert f'open_clip.create_model_and_transforms("hf-hub:{REPOSITORY}")' in done.output
    files = hub.repositories[REPOSITORY]
    assert {"README.md", "ttd_export.json", "open_clip_config.json", "open_clip_model.safetensors"} <= files.keys()
    assert REPOSITORY in hub.private and len(hub.commits) == 1
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: open_clip\n") and "\nlicense: mit\n" in card
    assert f'ttd_plugins.load("open_clip:hf-hub:{REPOSITORY}")' in card and "PATH" not in card
    assert not [file for file in (tmp_path / "here").iterdir() if file.name.startswith("ttd-")]


def test_a_pushed_backbone_is_loaded_by_its_name(hub: HubServer, tmp_path: Path) -> None:
    import torch

    adapter = load(TINY)
    export_backbone(adapter, tmp_path / "out", card=ModelCard(repository=REPOSITORY))
    pushed = push_to_hub(tmp_path / "out", REPOSITORY)
    assert pushed.url == f"{hub.url}/{REPOSITORY}" and "ttd_export.json" in pushed.files
    again = load(f"open_clip:hf-hub:{REPOSITORY}")
    ids = adapter.tokenize(["a dog"]).ids
    with torch.no_grad():
        torch.testing.assert_close(again.encode_text(ids), adapter.encode_text(ids), rtol=1e-5, atol=1e-6)


def test_an_export_replaces_an_earlier_one_completely(hub: HubServer, exported: Path) -> None:
    push_to_hub(exported / "lora", REPOSITORY)
    assert "adapter_model.safetensors" in hub.repositories[REPOSITORY]
    push_to_hub(exported / "weights", REPOSITORY, message="weights")
    names = {file.name for file in (exported / "weights").iterdir()}
    assert hub.repositories[REPOSITORY].keys() == names | {".gitattributes"}
    assert [message for _, message in hub.commits] == ["Upload a backbone fine-tuned with TTD", "weights"]


@pytest.mark.parametrize("files", [{"model.py": b"x"}, {"README.md": b"x", "data.csv": b"1"}])
def test_a_repository_with_something_else_is_not_written(hub: HubServer, exported: Path, files: Any) -> None:
    hub.repositories[REPOSITORY] = dict(files)
    with pytest.raises(InputError, match="exists and contains something else than an export, such as "):
        push_to_hub(exported / "lora", REPOSITORY)
    assert hub.repositories[REPOSITORY] == files and not hub.commits


def test_an_empty_repository_is_filled_and_a_public_one_stays_public(hub: HubServer, exported: Path) -> None:
    hub.repositories[REPOSITORY] = {".gitattributes": b"", "README.md": b"to come"}
    with pytest.raises(InputError, match="exists and is public; make it private on the hub, or choose another name"):
        push_to_hub(exported / "lora", REPOSITORY, private=True)
    assert push_to_hub(exported / "lora", REPOSITORY).repository == REPOSITORY
    assert REPOSITORY not in hub.private


def refusal(*arguments: str) -> str:
    done = run("--backbone", TINY, "--push-to-hub", REPOSITORY, *arguments)
    assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
    return str(done.output)


def test_each_obstacle_is_one_sentence_before_the_export(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        assert "there is no token; run `hf auth login`, or set HF_TOKEN" in refusal("--out", str(out))
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_wrong")
        assert "refuses the token (HTTP status 401)" in refusal("--out", str(out))
        assert "hf_wrong" not in refusal("--out", str(out))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refusal("--out", str(out))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal("--out", str(out))
    assert not out.exists() and not hub.repositories


def test_a_hub_that_refuses_to_write_leaves_the_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.faults["write"] = 403
    done = run("--backbone", TINY, "--push-to-hub", REPOSITORY, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and f"wrote {tmp_path / 'out'}" in done.output
    assert "cannot be written" in done.output and "HTTP status 403" in done.output
    assert (tmp_path / "out" / "ttd_export.json").is_file() and not hub.commits


@pytest.mark.parametrize("name", ["shoes", "a/b/c", "/x", "user/", "user/na me", "", "https://x/y", "user/../x"])
def test_a_wrong_name_is_refused_without_the_network(name: str) -> None:
    with pytest.raises(InputError, match="is not USER/NAME"):
        check_push(name)


def test_a_folder_that_is_no_export_is_refused(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(InputError, match="is no exported folder"):
        push_to_hub(tmp_path, REPOSITORY)
    assert not hub.requests


def test_wrong_combinations_of_flags() -> None:
    for arguments, sentence in (
        (["--backbone", TINY], "give the folder to write, --out FOLDER, or a repository"),
        (["--backbone", TINY, "--out", "x", "--private"], "--private needs --push-to-hub"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and sentence in done.output


def test_the_card_names_licence_and_base_for_the_hub(exported: Path) -> None:
    adapter = load(TINY)
    done = export_backbone(adapter, exported / "native")
    base = "openai_clip:openai/clip-vit-base-patch16"
    card = render_card(adapter, done.model, "native", ModelCard(base, repository=REPOSITORY, metrics={"mAP": 0.5}))
    head = card.split("---")[1]
    assert "license: other" in head and "base_model: openai/clip-vit-base-patch16" in head and "| mAP | 0.5 |" in card
    plain = render_card(adapter, done.model, "native", ModelCard())
    assert "license" not in plain.split("---")[1] and "`PATH` is this folder." in plain
    noted = render_card(adapter, done.model, "native", ModelCard(licence="For research only."))
    assert "license: other" in noted and "For research only." in noted
    record = json.loads((exported / "native" / "ttd_export.json").read_text())
    assert record["form"] == "native" and record["name"] == "open_clip:local-dir:PATH"
    lora = render_card(adapter, load_model(exported / "weights"), "weights", ModelCard(repository=REPOSITORY))
    assert f'huggingface_hub.snapshot_download("{REPOSITORY}")' in lora


def load_model(folder: Path) -> Any:
    from ttd_plugins.adapter import ExportedModel

    return ExportedModel("safetensors", 'model.load_state_dict(safetensors.torch.load_file("PATH/model.safetensors"))')
