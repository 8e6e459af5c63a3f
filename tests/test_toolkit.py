"""What the toolkit and the contract's default bodies do by themselves; the adapters' tests cover the rest."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from toy_backbone import toy

from ttd_plugins.adapter import AdapterFamily, DenseAdapter
from ttd_plugins.errors import ImageSizeError, MissingDependencyError
from ttd_plugins.plugins import families, temporary_plugin
from ttd_plugins.toolkit import attention, hub, text_tower
from ttd_plugins.toolkit.dense_modes import PRESETS, DenseMode, diagonal_mask
from ttd_plugins.toolkit.family_plugin import family_plugin
from ttd_plugins.toolkit.last_block import BlockCalls, BlockParts, last_block, last_block_with_mask
from ttd_plugins.toolkit.open_clip_models import OpenCLIPModels
from ttd_plugins.toolkit.optional_library import import_library
from ttd_plugins.toolkit.transforms import DenseTransform, Normalisation

OLD_NAMES = [
    ("attention", "run_blocks", "call_checkpointed"),
    ("attention", "project_some", "project_with_queries"),
    ("exporting", "WAY_OUT", "ALTERNATIVES"),
    ("exporting", "state_of", "exportable_state_dict"),
    ("exporting", "number_formats", "parameter_dtypes"),
    ("exporting", "difference", "embedding_difference"),
    ("exporting", "require_same", "require_same_embeddings"),
    ("open_clip_models", "is_whole", "bundles_weights"),
    ("text_tower", "prefix", "name_prefix"),
    ("tokenizing", "takes_parameter", "accepts_parameter"),
]


# Deprecated names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "old", "new"), OLD_NAMES)
def test_an_old_name_warns_and_is_the_new_one(module: str, old: str, new: str) -> None:
    found = importlib.import_module(f"ttd_plugins.toolkit.{module}")
    with pytest.warns(FutureWarning, match=f"{module}.{old} is now ttd_plugins.toolkit.{module}.{new}"):
        value = getattr(found, old)
    assert value is getattr(found, new)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = found.no_such_name


def test_by_hand_and_is_whole_are_deprecated_aliases() -> None:
    with pytest.warns(FutureWarning, match=r"DenseMode.by_hand is now DenseMode.needs_explicit_qkv"):
        assert [mode.by_hand for mode in PRESETS.values()] == [m.needs_explicit_qkv for m in PRESETS.values()]
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(FutureWarning, match=r"lora_targets\(is_whole=...\) is now lora_targets\(is_plain=...\)"):
        assert text_tower.lora_targets(model, is_whole=lambda attention: True) == text_tower.lora_targets(model)  # type: ignore[call-arg]


def test_the_refusal_of_a_family_is_now_its_unsupported_reason() -> None:
    def reason(config: Any) -> str | None:
        return "it is refused"

    with pytest.warns(
        FutureWarning, match=r"OpenCLIPModels\(refusal=...\) is now OpenCLIPModels\(unsupported_reason=...\)"
    ):
        models = OpenCLIPModels(None, "family", refusal=reason)  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match=r"OpenCLIPModels.refusal is now OpenCLIPModels.unsupported_reason"):
        assert models.refusal is models.unsupported_reason is reason


def test_names_of_a_module_that_was_merged_are_found() -> None:
    sys.modules.pop("ttd_plugins.toolkit.text", None)
    with pytest.warns(FutureWarning, match=r"toolkit\.tokenizing"):
        text = importlib.import_module("ttd_plugins.toolkit.text")
    assert text.valid_unicode("a\ud800") == "a�"
    with pytest.warns(FutureWarning, match="accepts_parameter"):
        assert text.takes_parameter is text.accepts_parameter


# Default bodies of the contract --------------------------------------------------------------------------------------


def test_the_default_dense_transform_follows_the_description() -> None:
    adapter = toy()
    description = adapter.description
    height, width = 2 * description.patch_size[0], 3 * description.patch_size[1]
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    normalisation = Normalisation(description.mean, description.std, description.interpolation)
    for size, expected in (
        ((height, width), (height, width)),
        (height, (height, height)),
        (None, description.image_size),
    ):
        transform = DenseAdapter.dense_transform(adapter, size)
        assert torch.equal(transform(image), DenseTransform(expected, normalisation)(image))
    with pytest.raises(ImageSizeError, match="multiple of"):
        DenseAdapter.dense_transform(adapter, (height + 1, width))


def test_the_default_logit_scale_is_the_exponential_of_the_models() -> None:
    adapter = toy()
    adapter.model.logit_scale = nn.Parameter(torch.tensor([2.0]))
    scale = DenseAdapter.logit_scale(adapter)
    assert scale.shape == ()
    torch.testing.assert_close(scale, torch.tensor(2.0).exp())
    scale.backward()
    assert adapter.model.logit_scale.grad is not None


def test_pixel_grid_checks_shape_and_size() -> None:
    adapter = toy()
    rows, columns = adapter.description.patch_size
    assert adapter.pixel_grid(torch.zeros(2, 3, 2 * rows, 3 * columns)) == (2, 3)
    for shape in ((3, rows, columns), (1, 4, rows, columns)):
        with pytest.raises(ImageSizeError, match=r"must have shape \[images, 3, height, width\]"):
            adapter.pixel_grid(torch.zeros(shape))
    with pytest.raises(ImageSizeError, match="multiple of"):
        adapter.pixel_grid(torch.zeros(1, 3, rows + 1, columns))


# Plugins and libraries -----------------------------------------------------------------------------------------------


def test_family_plugin_registers_a_family_of_a_module_that_is_imported_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from fakes import FakeFamily

    plugin = type("Plugin", (), {})()
    plugin.register_adapters = family_plugin("late_module", "LateFamily")
    assert "late_module" not in sys.modules
    late = type(sys)("late_module")
    late.LateFamily = lambda: FakeFamily("late")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "late_module", late)
    with temporary_plugin(plugin, name="late"):
        assert isinstance(families()["late"], AdapterFamily)


def test_a_missing_library_and_a_missing_part_of_it_are_one_sentence() -> None:
    for module, attributes in (("no_such_library", ()), ("json", ("no_such_part",))):
        with pytest.raises(MissingDependencyError) as caught:
            import_library(module, "Such backbones", distribution="such", install="'such[x]'", attributes=attributes)
        message = str(caught.value)
        assert message.startswith("Such backbones need such, which cannot be imported (")
        assert message.endswith("; run: pip install 'such[x]'") and "\n" not in message
    assert import_library("json", "x", distribution="x", install="x").dumps([1]) == "[1]"


# The last block ------------------------------------------------------------------------------------------------------


def plain_block(width: int = 8, heads: int = 2) -> tuple[BlockParts, BlockCalls]:
    """A pre-norm block in parts, and by calls of its attention."""
    torch.manual_seed(0)
    norm_1, norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    attend = nn.MultiheadAttention(width, heads, batch_first=True).eval()

    def feed_forward(tokens: torch.Tensor) -> torch.Tensor:
        return mlp(norm_2(tokens))

    def branch(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = norm_1(tokens)
        return attend(normed, normed, normed, need_weights=False, attn_mask=mask)[0]

    def block(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = tokens + branch(tokens, mask)
        return out + feed_forward(out)

    parts = BlockParts(
        norm=norm_1,
        project=lambda query_tokens, x: attention.project_with_queries(attend, query_tokens, x),
        finish=lambda mixed, _: attend.out_proj(mixed),
        feed_forward=feed_forward,
    )
    return parts, BlockCalls(branch, feed_forward, block)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ffn", [False, True])
@pytest.mark.parametrize("kind", ["value", "plain"])
def test_parts_and_masked_calls_agree(prefix: int, averaged: bool, residual: bool, ffn: bool, kind: Any) -> None:
    parts, calls = plain_block()
    x = torch.randn(2, prefix + 6, 8)
    mode = DenseMode(kind, residual=residual, ffn=ffn)
    with torch.no_grad():
        trained, patches = last_block(parts, x, mode, (2, 3), prefix, averaged)
        for found in (calls, BlockCalls(calls.attention_branch, calls.feed_forward)):
            if averaged and found.block is None:
                continue
            masked_trained, masked_patches = last_block_with_mask(found, x, mode, prefix, averaged)
            torch.testing.assert_close(masked_trained, trained, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(masked_patches, patches, atol=1e-5, rtol=1e-5)


def test_a_diagonal_mask_opens_the_rows_of_prefix_tokens() -> None:
    for prefix in (0, 1, 2):
        mask = diagonal_mask(4, torch.zeros(1), prefix)
        assert (mask == 0).sum(1).tolist() == [4 if row < prefix else 1 for row in range(4)]
        assert torch.equal(mask.diagonal(), torch.zeros(4))


# Downloads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, int]]]:
    """A server that says of a file that it has so many bytes more than it sends."""
    missing = {"bytes": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(1000 + missing["bytes"]))
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/weights.pt", missing
        listening.shutdown()
        thread.join()


def test_a_download_is_complete_or_absent(server: tuple[str, dict[str, int]], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    url, missing = server
    missing["bytes"] = 5
    problem = hub.fetch_url(url, str(tmp_path / "cache"))
    assert problem is not None and "cannot be downloaded" in problem.reason
    assert "cannot be written" not in problem.reason
    assert list((tmp_path / "cache").iterdir()) == []
    missing["bytes"] = 0
    assert hub.fetch_url(url, str(tmp_path / "cache")) is None
    assert (tmp_path / "cache" / "weights.pt").read_bytes() == b"x" * 1000
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["weights.pt"]


def test_a_download_that_cannot_be_written_says_so(server: tuple[str, dict[str, int]], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    (tmp_path / "file").write_text("")
    problem = hub.fetch_url(server[0], str(tmp_path / "file"))
    assert problem is not None and str(tmp_path / "file") in problem.reason
