"""Faster copies for inference: the same features to 1e-3, an original that stays as it is, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_towers import resnet
from torch import Tensor, nn
from toy_backbone import SIDE, ToyAdapter, toy, toy_images
from typer.testing import CliRunner

import ttd_plugins
from ttd_plugins import TTD, cli, export_backbone, load, optimize_for_inference, wrap
from ttd_plugins.adapter import DenseAdapter, ImageFeatures
from ttd_plugins.errors import InputError, TTDError, UnsupportedModelError
from ttd_plugins.evaluation.protocols.runner import describe_backbone
from ttd_plugins.tagging import Tagger, tag_folder
from ttd_plugins.toolkit import fast_inference
from ttd_plugins.toolkit.fast_inference import TOLERANCE, has_bfloat16

pytest.importorskip("open_clip")
PHOTOGRAPHS = sorted((Path(ttd_plugins.__file__).parent / "embedded" / "photographs" / "images").glob("*.jpg"))
needs_bfloat16 = pytest.mark.skipif(
    not has_bfloat16(torch.device("cpu")), reason="the processor has no bfloat16 arithmetic"
)


@pytest.fixture(scope="module")
def plain() -> DenseAdapter:
    return load("open_clip:photo")


@pytest.fixture(scope="module")
def fast() -> DenseAdapter:
    return load("open_clip:photo", fast=True)


def features(adapter: DenseAdapter, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = adapter.encode_image(pixels)
    assert found.pooled is not None
    return [F.normalize(found.patches, dim=-1), F.normalize(found.pooled, dim=-1)]


def largest_difference(one: DenseAdapter, other: DenseAdapter, pixels: Tensor) -> float:
    pairs = zip(features(one, pixels), features(other, pixels), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def norms(adapter: DenseAdapter) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in adapter.model.modules())


# The same results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photograph", PHOTOGRAPHS[:2], ids=lambda path: path.stem)
def test_maps_and_scores_of_photographs_agree_to_the_tolerance(
    plain: DenseAdapter, fast: DenseAdapter, photograph: Path
) -> None:
    from PIL import Image

    image, tags = Image.open(photograph), ["dog", "person", "grass", "car"]
    before = TTD(plain).maps(image, "a dog and a person on the grass", tags=tags)
    after = TTD(fast).maps(image, "a dog and a person on the grass", tags=tags)
    for name in ("tag_maps", "caption_map", "scores", "probabilities"):
        assert abs(getattr(before, name) - getattr(after, name)).max() < TOLERANCE, name
    # Far below the bound: folding changes the last digits only.
    assert abs(before.tag_maps - after.tag_maps).max() < 1e-5
    assert before.selected.tolist() == after.selected.tolist()


def test_every_norm_of_the_default_backbone_is_folded(plain: DenseAdapter, fast: DenseAdapter) -> None:
    assert norms(plain) == fast.folded_norms > 40
    assert norms(fast) == 0
    kernels = [m.weight for m in fast.model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize(("count", "height", "width"), [(1, 448, 448), (5, 224, 320), (3, 64, 32)])
def test_a_batch_in_parts_has_the_features_of_the_whole(
    plain: DenseAdapter, fast: DenseAdapter, count: int, height: int, width: int
) -> None:
    pixels = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    assert largest_difference(plain, fast, pixels) < 1e-5
    assert fast.encode_image(pixels, pooled=False).pooled is None


@pytest.mark.parametrize("name", ["open_clip:tiny", "openai_clip:tiny", "siglip:tiny", "eva_clip:tiny"])
def test_towers_without_norms_of_batches_stay_the_same(name: str) -> None:
    adapter = load(name)
    side = adapter.description.image_size
    pixels = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(2))
    assert largest_difference(adapter, optimize_for_inference(adapter), pixels) < 1e-5


def test_norms_of_a_resnet_are_folded() -> None:
    model = resnet(full=False).eval()
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Statistics as after training: with those of a new norm, folding would change nothing.
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    adapter = wrap(model)
    fast = optimize_for_inference(adapter)
    pixels = torch.randn(2, 3, 64, 96, generator=generator)
    assert norms(adapter) > 0 == norms(fast)
    assert largest_difference(adapter, fast, pixels) < 1e-5


class _NormedToy(ToyAdapter):
    """A toy with a norm after its convolution, whose output may be used a second time."""

    again = 0.0

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        x = self.model.patch(pixels.to(self.dtype))
        hidden = torch.tanh(self.model.norm(x) + self.again * x).permute(0, 2, 3, 1)
        whole = self.model.pool_head(hidden.square().mean((1, 2))) if pooled else None
        return ImageFeatures(self.model.patch_head(hidden), whole)


class _SharingToy(_NormedToy):
    again = 0.5


def normed_toy(kind: type[_NormedToy], norm: nn.Module) -> _NormedToy:
    adapter = toy(kind=kind)
    assert isinstance(adapter, kind)
    adapter.model.norm = norm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("running_mean", "weight", "bias"):
            tensor = getattr(norm, name)
            if tensor is not None:
                torch.nn.init.normal_(tensor)
    return adapter.eval()


class _ScaledNorm(nn.BatchNorm2d):
    """A norm with a further step that nobody outside of its class knows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("kind", "norm", "folded"),
    [
        (_NormedToy, nn.BatchNorm2d(5), 1),
        (_NormedToy, nn.BatchNorm2d(5, affine=False), 1),
        (_SharingToy, nn.BatchNorm2d(5), 0),
        (_NormedToy, _ScaledNorm(5), 0),
        (_NormedToy, nn.BatchNorm2d(5, track_running_stats=False), 0),
    ],
    ids=["folded", "without weights", "output used twice", "unknown class", "no statistics"],
)
def test_norms_are_folded_only_where_features_stay(kind: type[_NormedToy], norm: nn.Module, folded: int) -> None:
    adapter = normed_toy(kind, norm)
    fast = optimize_for_inference(adapter)
    assert fast.folded_norms == folded
    assert norms(fast) == 1 - folded
    assert largest_difference(adapter, fast, toy_images(2)) < 1e-6


def test_a_norm_that_cannot_be_folded_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    optimize_for_inference(normed_toy(_SharingToy, nn.BatchNorm2d(5)))
    assert "the batch norms of toy:ToyModel are not folded: its features would change" in caplog.text


# The original --------------------------------------------------------------------------------------------------------


def test_the_original_stays_as_it_is() -> None:
    adapter = load("open_clip:photo").train()
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    modules = {name: type(module) for name, module in adapter.named_modules()}
    strides = [parameter.stride() for parameter in adapter.parameters()]
    optimize_for_inference(adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    assert {name: type(module) for name, module in adapter.named_modules()} == modules
    assert [parameter.stride() for parameter in adapter.parameters()] == strides
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    assert all(module.training for module in adapter.modules())
    assert not any(module._forward_hooks for module in adapter.modules())


def test_lora_is_merged_into_the_copy() -> None:
    pytest.importorskip("peft")
    adapter = load("open_clip:photo", lora=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.normal_(0, 0.05, generator=generator)
    fast = optimize_for_inference(adapter)
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    assert adapter.has_lora and not fast.has_lora
    assert largest_difference(adapter, fast, pixels) < 1e-4
    assert largest_difference(load("open_clip:photo"), fast, pixels) > 1e-2


def test_a_snapshot_of_weights_is_not_copied() -> None:
    adapter = toy()
    adapter.snapshot_weights()
    with torch.no_grad():
        adapter.model.patch.weight.add_(1)
    fast = optimize_for_inference(adapter)
    assert fast._originals is None and adapter._originals is not None
    assert largest_difference(adapter, fast, toy_images(1)) < 1e-6


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda fast: fast.train(),
        lambda fast: TTD(fast).train(),
        lambda fast: TTD(fast)(toy_images(2), ["a dog", "a cat"]),
        lambda fast: fast.requires_grad_(),
        lambda fast: fast.add_lora(2),
        lambda fast: fast.set_grad_checkpointing(),
        lambda fast: fast.merge(),
        lambda fast: fast.unload(),
        lambda fast: fast.state_dict(),
        lambda fast: fast.model.state_dict(),
        lambda fast: copy.deepcopy(fast).model.state_dict(),
        optimize_for_inference,
    ],
)
def test_what_would_take_the_copy_for_the_original_is_refused(call: Callable[[DenseAdapter], object]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"this copy of toy:ToyModel is for inference only") as raised:
        call(optimize_for_inference(toy()))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["native", "weights"])
def test_the_copy_is_not_exported(fast: DenseAdapter, tmp_path: Path, form: Any) -> None:
    with pytest.raises(TTDError, match="for inference only"):
        export_backbone(fast, tmp_path / "export", form=form)
    assert not (tmp_path / "export").exists()


def test_evaluation_mode_and_frozen_weights_are_kept(fast: DenseAdapter) -> None:
    assert fast.eval() is fast and fast.train(False) is fast and not fast.training
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    assert not fast.encode_image(pixels).patches.requires_grad
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast": "int8"}, "precision"),
        ({"fast": True, "lora": 2}, "leave one out"),
    ],
)
def test_wrong_arguments_of_load(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("open_clip:tiny", **options)


def test_only_adapters_are_optimised() -> None:
    with pytest.raises(InputError, match="takes an adapter"):
        optimize_for_inference(nn.Linear(1, 1))  # type: ignore[arg-type]


# bfloat16 ------------------------------------------------------------------------------------------------------------


def test_bfloat16_needs_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(UnsupportedModelError, match="no bfloat16 arithmetic"):
        optimize_for_inference(toy(), precision="bfloat16")


@needs_bfloat16
def test_bfloat16_is_a_choice_of_its_own(plain: DenseAdapter) -> None:
    fast = optimize_for_inference(plain, precision="bfloat16")
    pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(5))
    assert fast.encode_image(pixels).patches.dtype == torch.float32
    for before, after in zip(features(plain, pixels), features(fast, pixels), strict=True):
        assert float((before * after).sum(-1).min()) > 0.98
    # The reason why it is no part of --fast.
    assert largest_difference(plain, fast, pixels) > TOLERANCE


# Results and commands ------------------------------------------------------------------------------------------------


def test_results_say_how_they_were_computed(plain: DenseAdapter, fast: DenseAdapter) -> None:
    assert "inference" not in describe_backbone(plain)
    about = describe_backbone(fast)
    assert about["inference"] == "fast float32"
    assert about["name"] == describe_backbone(plain)["name"]
    assert about == describe_backbone(load("open_clip:photo", fast=True))


def test_a_file_of_tags_is_not_continued_by_a_copy(tmp_path: Path) -> None:
    adapter, file = toy(), tmp_path / "tags.jsonl"
    tag_folder(Tagger(adapter, ["dog", "cat"], size=SIDE), PHOTOGRAPHS[0], file)
    with pytest.raises(InputError, match="another vocabulary, backbone or option"):
        tag_folder(Tagger(optimize_for_inference(adapter), ["dog", "cat"], size=SIDE), PHOTOGRAPHS[0], file)


@pytest.mark.parametrize(
    "arguments",
    [["tags", "{image}", "--vocabulary", "dog, car, sky"], ["segment", "{image}", "dog, car", "--no-pamr"]],
    ids=lambda arguments: arguments[0],
)
def test_the_flag_keeps_the_results_of_commands(arguments: list[str], tmp_path: Path) -> None:
    def answer(*flags: str) -> dict[str, Any]:
        out = ["--out", str(tmp_path / "".join(flags))] if arguments[0] == "segment" else []
        given = [part.format(image=PHOTOGRAPHS[0]) for part in arguments]
        result = CliRunner().invoke(cli.app, [*given, "--size", "224", "--json", *out, *flags])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    before, after = answer(), answer("--fast")
    for one, other in zip(rows(before), rows(after), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            expected = pytest.approx(value, abs=TOLERANCE) if isinstance(value, float) else value
            assert key == "pixels" or other[key] == expected


def rows(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer["tags"] if "tags" in answer else answer["classes"]
    return found


def test_the_flag_reaches_every_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse(adapter: DenseAdapter, precision: str = "float32") -> DenseAdapter:
        asked.append(precision)
        raise TTDError("reached")

    monkeypatch.setattr(fast_inference, "optimize_for_inference", refuse)
    image = str(PHOTOGRAPHS[0])
    calls = [
        ["tags", image, "a dog"],
        ["tags", image, "--vocabulary", "dog"],
        ["heatmap", image, "a dog", "--out", str(tmp_path / "maps.png")],
        ["segment", image, "dog", "--out", str(tmp_path / "segments")],
    ]
    for call in calls:
        for flag, precision in (("--fast", "float32"), ("--bfloat16", "bfloat16")):
            result = CliRunner().invoke(cli.app, [*call, "--backbone", "open_clip:tiny", flag])
            assert result.exit_code == cli.USER_ERROR and "reached" in result.stderr, result.output
            assert asked.pop() == precision
    for command in (["app"], *(["eval", name] for name in ("tags", "text", "segment", "classify", "retrieval"))):
        assert "--fast" in CliRunner().invoke(cli.app, [*command, "--help"]).stdout


def test_the_app_shows_copies() -> None:
    from ttd_plugins.app.studio import Studio

    image = PHOTOGRAPHS[0]
    before = Studio(["open_clip:photo"]).view(image, "a dog on the grass", ["open_clip:photo"]).views[0]
    after = Studio(["open_clip:photo"], fast=True).view(image, "a dog on the grass", ["open_clip:photo"]).views[0]
    assert before.before is not None and after.before is not None, (before.error, after.error)
    assert abs(before.before.tag_maps - after.before.tag_maps).max() < TOLERANCE
