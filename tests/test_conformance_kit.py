"""The conformance kit: a healthy adapter passes, one broken in one way fails in that check, and nothing stops it."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from broken_toys import (
    BROKEN,
    ConvolutionalModel,
    EveryPositionMatters,
    NoLoRA,
    OneSize,
    PrefixLeftIn,
    Raises,
    TextLoRAOnly,
    Transposed,
)
from conforming_toy import (
    WIDTH,
    ConformingAdapter,
    ConformingFamily,
    ConformingModel,
    ConformingPlugin,
    conforming,
)
from helpers_kit import conforming_plugin as conforming_plugin
from helpers_kit import lines
from torch import Tensor, nn
from typer.testing import CliRunner

from ttd_plugins import cli, load
from ttd_plugins.adapter import API_VERSION, BackboneDescription, DenseAdapter, ImageFeatures
from ttd_plugins.errors import InputError, PluginError
from ttd_plugins.plugins import temporary_plugin
from ttd_plugins.testing import CHECKS, AdapterConformance, CheckResult, Session, check_adapter
from ttd_plugins.testing.module_snapshot import ModuleSnapshot

pytest.importorskip("peft")

NAMES = [check.name for check in CHECKS]
REGISTERED = {"api_version", "registered_once", "claimed_by_one_family"}
UNSTATED = {"preferred_size", "patches_match_library", "tokens_match_library", "pixels_match_library"}
"""Checks that are skipped for the toy, whose images are square and which states no references."""


# The healthy toy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_healthy_toy_passes_every_check(plugin: ConformingFamily, seed: int) -> None:
    report = check_adapter(lambda: load("conforming:toy@fixed", seed=seed))
    assert report.passed == [name for name in NAMES if name not in UNSTATED], lines(report)
    assert report.ok and report.adapter == "conforming:toy@random"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_pass_within_their_tolerance(dtype: torch.dtype) -> None:
    report = check_adapter(lambda: conforming().to(dtype))
    assert report.ok, lines(report)
    assert set(report.skipped) <= REGISTERED | UNSTATED | {"half_precision", "joint_space", "autocast", "float16"}


def test_without_a_registered_family_its_checks_are_skipped_with_the_reason() -> None:
    report = check_adapter(conforming)
    assert set(report.skipped) == REGISTERED | UNSTATED
    assert all("no installed plugin registers a family 'conforming'" in report.skipped[name] for name in REGISTERED)
    assert report.ok


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        (NoLoRA, {"lora_targets", "lora_reaches_features", "lora_unloads_and_merges"}),
        (TextLoRAOnly, set()),
        (OneSize, {"other_sizes", "sizes_match_library"}),
        (EveryPositionMatters, {"text_trimming"}),
    ],
)
def test_what_stays_within_the_contract_is_skipped_and_does_not_fail(
    kind: type[ConformingAdapter], skipped: set[str]
) -> None:
    report = check_adapter(lambda: conforming(kind))
    assert report.ok, lines(report)
    assert set(report.skipped) == REGISTERED | UNSTATED | skipped
    assert all(report.skipped.values())


# Broken toys ---------------------------------------------------------------------------------------------------------


# A third of the time, and left to the slow run where a toy is broken in nothing that they look at.
COSTLY = {
    "lora_reaches_features",
    "lora_unloads_and_merges",
    "tuning_unloads",
    "meta_images",
    "meta_texts",
    "large_batches",
    "trains_after_inference",
    "training_mode",
    "grad_checkpointing",
    "new_weights_count",
    "process_unchanged",
    "memory_freed",
    "export_holds_model",
    "autocast",
    "float16",
    "empty_batches",
    "any_layout",
    "sizes_match_library",
    "towers_complete",
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_toy_broken_in_one_way_fails_in_the_checks_that_say_so(name: str) -> None:
    kind, expected = BROKEN[name]
    wanted = [check for check in NAMES if check not in COSTLY or check in expected]
    report = check_adapter(lambda: conforming(kind), only=wanted)
    assert set(report.failed) == expected, lines(report)
    for result in report.results:
        if result.status == "failed":
            assert result.expected and result.seen and result.causes
            for sentence in (result.expected, result.seen, *result.causes):
                assert "\n" not in sentence and not sentence.endswith(".")
        if result.status == "skipped":
            assert result.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_toy_fails_in_no_other_check(name: str) -> None:
    kind, expected = BROKEN[name]
    report = check_adapter(lambda: conforming(kind))
    assert set(report.failed) == expected, lines(report)


def test_every_check_has_a_toy_that_it_alone_catches() -> None:
    caught = {check for _, checks in BROKEN.values() for check in checks if len(checks) == 1}
    # A copy that cannot be made cannot be pickled either.
    assert set(NAMES) - caught - REGISTERED - {"adapter_is_built"} == {"deep_copy"}
    assert any("deep_copy" in checks for _, checks in BROKEN.values())


def test_names_are_unique_and_needs_exist() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for check in CHECKS:
        assert set(check.needs) <= set(NAMES) - {check.name}
        assert check.causes and not check.what.endswith(".")
        assert check.name.isidentifier()


def test_a_check_that_builds_on_a_failed_one_is_skipped_and_says_on_which() -> None:
    report = check_adapter(lambda: conforming(Raises))
    assert report.failed == ["image_features"]
    assert report.skipped["gradients_to_pixels"] == "it depends on image_features"
    # Through another one, which was skipped itself.
    assert report.skipped["lora_reaches_features"].startswith("it depends on")
    assert "text_features" in report.passed and "calibration" in report.passed


def test_the_seen_says_what_happened() -> None:
    raised = check_adapter(lambda: conforming(Raises), only=["image_features"]).results[0]
    assert raised.seen == "ZeroDivisionError: two lines [bold]"
    place = check_adapter(lambda: conforming(Transposed), only=["patches_in_place"]).results[0]
    assert place.seen is not None and "rows and columns look exchanged" in place.seen
    text = str(place)
    assert text.splitlines()[0].startswith("patches_in_place: ")
    assert "  expected: " in text and "  seen: " in text and "  usual cause: the grid is transposed" in text


# Where features lie --------------------------------------------------------------------------------------------------


class ConvolutionalAdapter(ConformingAdapter):
    """Only its image features are looked at."""

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.patch_grid(*pixels.shape[-2:])
        x = self.model.stem(pixels)
        for number, (wide, point) in enumerate(zip(self.model.wide, self.model.points, strict=True)):
            x = x + point(torch.nn.functional.gelu(wide(x)))
            if number == 0:
                x = self.model.down(x)
        patches = self.model.head(self.turn(x))
        return ImageFeatures(patches, patches.mean((1, 2)) if pooled else None)

    def turn(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ConvolutionalTransposed(ConvolutionalAdapter):
    def turn(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(2).unflatten(2, x.shape[2:]).permute(0, 2, 3, 1)


def place_of(kind: type[ConformingAdapter], model: nn.Module) -> CheckResult:
    session = Session(lambda: kind(model), not_applicable={"batch_independent": "images alone", "deterministic": "so"})
    return session.run("patches_in_place")


@pytest.mark.parametrize("seed", range(6))
def test_overlapping_receptive_fields_pass_and_are_told_from_transposed_ones(seed: int) -> None:
    torch.manual_seed(seed)
    model = ConvolutionalModel()
    assert place_of(ConvolutionalAdapter, model).status == "passed"
    assert place_of(ConvolutionalTransposed, model).status == "failed"


@pytest.mark.parametrize("seed", range(8))
def test_transposition_and_prefixes_are_found_for_any_random_weights(seed: int) -> None:
    for name in ("Transposed", "PrefixLeftIn", "UpsideDown", "OneColumnLate"):
        found = check_adapter(lambda name=name: conforming(BROKEN[name][0], seed=seed), only=["patches_in_place"])
        assert found.failed == ["patches_in_place"], name
    assert check_adapter(lambda: conforming(seed=seed), only=["patches_in_place", "moving_object"]).ok


class SquareTransposed(OneSize, Transposed):
    pass


class SquarePrefix(OneSize, PrefixLeftIn):
    pass


@pytest.mark.parametrize("kind", [SquareTransposed, SquarePrefix])
def test_a_square_grid_alone_is_enough_to_tell(kind: type[ConformingAdapter]) -> None:
    assert check_adapter(lambda: conforming(kind)).failed == ["patches_in_place"]


# Families ------------------------------------------------------------------------------------------------------------


def test_two_families_that_claim_one_object(plugin: ConformingFamily) -> None:
    class Greedy(ConformingFamily):
        name = "greedy"

    with temporary_plugin(ConformingPlugin(Greedy()), name="greedy_plugin"):
        report = check_adapter(lambda: load("conforming:toy@fixed"))
    assert report.failed == ["claimed_by_one_family"]
    seen = report.results[NAMES.index("claimed_by_one_family")].seen
    assert seen is not None and "'greedy'" in seen and "'conforming'" in seen


def test_a_family_that_does_not_claim_its_own_model(plugin: ConformingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConformingFamily, "claims", lambda self, model: False)
    assert check_adapter(lambda: load("conforming:toy@fixed")).failed == ["claimed_by_one_family"]


def test_a_version_that_this_release_does_not_speak() -> None:
    class Future(ConformingFamily):
        api_version = API_VERSION + 1

    with temporary_plugin(ConformingPlugin(Future()), name="future"):
        report = check_adapter(lambda: load("conforming:toy@fixed"), family="conforming")
    assert report.failed == ["api_version"]
    assert f"version {API_VERSION + 1}" in (report.results[0].seen or "")
    assert set(report.skipped) >= {"adapter_is_built", "image_features"}


def test_a_family_must_state_its_version_itself(plugin: ConformingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ConformingFamily, "api_version")
    report = check_adapter(lambda: load("conforming:toy@fixed"))
    assert report.failed == ["api_version"]
    assert "sets none" in (report.results[0].seen or "")
    assert "image_features" in report.passed


def test_a_family_that_is_registered_twice(plugin: ConformingFamily) -> None:
    with temporary_plugin(ConformingPlugin(), name="again"):
        report = check_adapter(lambda: load("conforming:toy@fixed"), family="conforming")
    assert report.failed == ["registered_once"]
    assert "'again'" in (report.results[1].seen or "")
    assert report.skipped["adapter_is_built"] == "it depends on registered_once"


@pytest.mark.parametrize("made", [None, nn.Linear(2, 2), ZeroDivisionError("no"), SystemExit(4), PluginError("p")])
def test_what_is_no_adapter(made: Any) -> None:
    def make() -> DenseAdapter:
        if isinstance(made, BaseException):
            raise made
        return made

    report = check_adapter(make)
    assert report.failed == ["adapter_is_built"]
    assert set(report.skipped) == set(NAMES) - {"adapter_is_built"}
    assert report.adapter == "an adapter that cannot be described"


def test_ctrl_c_stops() -> None:
    def make() -> DenseAdapter:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_adapter(make)


# Everything as found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "LeavesHooks", "OverwritesPositions", "AddsAModule", "NudgesWeights", "Evaluates"]
)
def test_afterwards_everything_is_as_it_was(name: str) -> None:
    adapter = conforming(BROKEN[name][0] if name else ConformingAdapter)
    adapter.model.blocks[0].eval()
    adapter.model.norm.requires_grad_(False)
    adapter.model.norm.register_forward_hook(lambda *_: None)
    adapter.model.projection.weight.grad = torch.ones(WIDTH, WIDTH)
    keeper, own = ModuleSnapshot(adapter), dict(adapter.model.named_modules())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    check_adapter(lambda: adapter)
    assert keeper.changes() == []
    assert dict(adapter.model.named_modules()) == own
    assert not adapter.has_lora
    assert adapter.model.projection.weight.grad is not None
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert len(adapter.model.norm._forward_hooks) == 1


def test_the_answer_does_not_depend_on_the_callers_random_state() -> None:
    reports = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        reports.append(check_adapter(lambda: conforming(Transposed)))
    first, second = ([(r.name, r.status, r.seen) for r in report.results] for report in reports)
    assert first == second


def test_what_an_adapter_prints_is_kept_out_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    class Chatty(ConformingAdapter):
        def encode_text(self, ids: Tensor) -> Tensor:
            print("hello")
            return super().encode_text(ids)

    assert check_adapter(lambda: conforming(Chatty), only=["text_features"]).ok
    captured = capsys.readouterr()
    assert captured.out == "" and "hello" in captured.err


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda m: m.norm.weight.data.mul_(2), "the values of norm.weight changed"),
        (lambda m: m.eval(), "evaluation mode"),
        (lambda m: m.norm.requires_grad_(False), "requires_grad of norm.weight became False"),
        (lambda m: m.norm.register_forward_pre_hook(print), "a hook was added to or removed from norm"),
        (lambda m: setattr(m, "norm", nn.LayerNorm(WIDTH)), "modules were added, removed or replaced (norm)"),
        (lambda m: setattr(m, "class_token", nn.Parameter(m.class_token.clone())), "tensors were replaced"),
        (lambda m: setattr(m.norm, "eps", 1.0), "the attribute eps of norm changed"),
        (lambda m: setattr(m, "mask", torch.ones(2)), "the attribute mask of the model"),
        (lambda m: setattr(m, "new", 3), "attributes of the model were added or removed (new)"),
        (lambda m: m.calls.add_(1), "the values of calls changed"),
    ],
)
def test_the_snapshot_sees_and_undoes(change: Any, phrase: str) -> None:
    model = conforming().model
    keeper = ModuleSnapshot(model)
    assert keeper.changes() == []
    change(model)
    assert any(phrase in found for found in keeper.changes()), keeper.changes()
    keeper.restore()
    assert keeper.changes() == []


# Asking for less, and allowing for exceptions ------------------------------------------------------------------------


def test_only_some_checks_run_with_what_they_need() -> None:
    report = check_adapter(lambda: conforming(Transposed), only=["moving_object", "calibration"])
    assert [result.name for result in report.results] == ["calibration", "moving_object"]
    assert report.skipped == {"moving_object": "it depends on patches_in_place"}


def test_exceptions_with_a_reason() -> None:
    report = check_adapter(lambda: conforming(Transposed), not_applicable={"patches_in_place": "the map is a spiral"})
    assert report.skipped["patches_in_place"] == "the map is a spiral"
    assert "moving_object" in report.failed  # which the exception does not cover


@pytest.mark.parametrize("options", [{"only": ["patch_in_place"]}, {"not_applicable": {"patch_in_place": "x"}}])
def test_misspelt_checks_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="did you mean 'patches_in_place'"):
        check_adapter(conforming, **options)


def test_the_reference_can_be_given_and_its_absence_is_a_reason() -> None:
    class Bare(ConformingAdapter):
        pass

    made = conforming(Bare)
    names = ["pooled_matches_library", "text_matches_library"]
    nothing = check_adapter(lambda: made, only=names, image_reference=lambda *_: None, text_reference=lambda *_: None)
    assert set(nothing.skipped) == set(names)
    assert "neither encode_image nor get_image_features" in nothing.skipped["pooled_matches_library"]
    other = check_adapter(lambda: made, only=names, image_reference=lambda a, p: 2 * a.model.encode_image(p))
    assert other.failed == ["pooled_matches_library"]

    def raises(*_: Any) -> Tensor:
        raise KeyError("nothing")

    assert "KeyError" in check_adapter(lambda: made, only=names, image_reference=raises).skipped[names[0]]


def test_a_library_that_normalises_is_compared_in_direction() -> None:
    def unit(adapter: DenseAdapter, pixels: Tensor) -> Tensor:
        model: Any = adapter.model
        return nn.functional.normalize(model.encode_image(pixels), dim=-1)

    assert check_adapter(conforming, only=["pooled_matches_library"], image_reference=unit).ok


class InFloat32(ConformingModel):
    """Its own functions fail in bfloat16, as those of the original clip package do after ``model.to(bfloat16)``."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return nn.functional.linear(super().encode_image(pixels).float(), self.projection.weight)

    def embed(self, pixels: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().embed(pixels).float(), (WIDTH,), self.norm.weight, self.norm.bias)


def test_a_model_that_cannot_do_bfloat16_itself_is_no_fault_of_the_adapter() -> None:
    names = ["half_precision", "image_features"]
    report = check_adapter(lambda: ConformingAdapter(InFloat32()), only=names)
    assert report.passed == ["image_features"]
    assert report.skipped["half_precision"].startswith("the model itself does not support bfloat16: ")
    own = check_adapter(lambda: conforming(BROKEN["KeepsFloat32Pixels"][0]), only=names)
    assert own.failed == ["half_precision"]


def test_lengths_of_texts_are_the_librarys_business_where_embeddings_are_its_own() -> None:
    """timm starts the head of EVA a thousand times smaller, so that fresh models have texts that much longer."""
    made = conforming()
    with torch.no_grad():
        made.model.text_projection.weight.mul_(1000)
    assert check_adapter(lambda: made, only=["joint_space"]).ok
    unknown = check_adapter(lambda: made, only=["joint_space"], text_reference=lambda *_: None)
    assert unknown.failed == ["joint_space"] and "of text within a factor" in str(unknown.results[0].expected)


def test_large_images_go_through_the_model_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine full-size models are checked in minutes; what does not depend on the size has small images."""
    sizes: list[tuple[int, int]] = []

    class Large(ConformingAdapter):
        @property
        def description(self) -> BackboneDescription:
            return replace(ConformingAdapter.description.fget(self), image_size=(96, 96))  # type: ignore[attr-defined]

        def dense_transform(self, size: Any = None) -> Any:
            return super().dense_transform((96, 96) if size is None else size)

        def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
            if pixels.device.type == "cpu":
                sizes.extend([tuple(pixels.shape[-2:])] * len(pixels))
            return super().encode_image(pixels, pooled=pooled)

    # Only small models are checked at large sizes too.
    monkeypatch.setattr("ttd_plugins.testing.probes.SMALL_MODEL", 0)
    report = check_adapter(lambda: conforming(Large), not_applicable={"pickling": "the class is local"})
    assert report.ok, lines(report)
    assert (96, 96) in sizes
    # 64 checks: about one image each.
    assert sum(height * width for height, width in sizes) / 96**2 < 80


def test_outputs_of_transformers_are_understood() -> None:
    from types import SimpleNamespace

    from ttd_plugins.testing.library_reference import library_image_embedding, library_text_embedding

    class Model(nn.Module):
        def get_image_features(self, pixels: Tensor) -> Any:
            return SimpleNamespace(pooler_output=pixels + 1)

        def get_text_features(self, ids: Tensor) -> Any:
            return ids + 2, None

    adapter: Any = SimpleNamespace(model=Model())
    assert torch.equal(library_image_embedding(adapter, torch.zeros(2)), torch.ones(2))  # type: ignore[arg-type]
    assert torch.equal(library_text_embedding(adapter, torch.zeros(2)), 2 * torch.ones(2))  # type: ignore[arg-type]


class Peeks(ConformingAdapter):
    def encode_text(self, ids: Tensor) -> Tensor:
        assert not len(ids) or bool((ids == 2).any())
        return super().encode_text(ids)


def test_a_device_without_data_is_a_reason_and_not_a_failure() -> None:
    report = check_adapter(lambda: conforming(Peeks))
    assert report.ok, lines(report)
    assert "computation needs data" in report.skipped["meta_texts"]


# As a class of tests -------------------------------------------------------------------------------------------------


class TestTheToy(AdapterConformance):
    def make_adapter(self) -> DenseAdapter:
        return conforming()


class TestAnException(AdapterConformance):
    not_applicable: ClassVar[dict[str, str]] = {"patches_in_place": "transposed on purpose", "moving_object": "so too"}

    def make_adapter(self) -> DenseAdapter:
        return conforming(Transposed)


class TestOpenCLIP(AdapterConformance):
    def make_adapter(self) -> DenseAdapter:
        pytest.importorskip("open_clip")
        return load("open_clip:tiny@random")


OUTSIDE = """
from broken_toys import Transposed
from conforming_toy import conforming
from ttd_plugins.testing import AdapterConformance

class TestMine(AdapterConformance):
    made = 0

    def make_adapter(self):
        type(self).made += 1
        assert self.made == 1, "made more than once"
        return conforming(Transposed)

class TestForgotten(AdapterConformance):
    pass
"""


def test_a_failed_check_is_a_failed_test_that_explains_itself(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(OUTSIDE)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfs", "--rootdir", str(tmp_path), str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**__import__("os").environ, "PYTHONPATH": f"{root / 'tests'}:{root}:{root / 'adapters'}"},
    )
    assert done.returncode == 1, done.stdout
    assert f"2 failed, {len(NAMES) - 10} passed, {len(NAMES) + 8} skipped" in done.stdout, done.stdout
    assert "TestMine.test_patches_in_place" in done.stdout
    assert "usual cause: the grid is transposed" in done.stdout
    assert "TestForgotten must define make_adapter(self)" in done.stdout
    assert "Traceback" not in done.stdout


def test_every_check_is_a_test_of_the_class() -> None:
    tests = [name for name in vars(AdapterConformance) if name.startswith("test_")]
    assert tests == [f"test_{name}" for name in NAMES]
    assert AdapterConformance.test_calibration.__doc__ is not None  # type: ignore[attr-defined]


def test_importing_the_kit_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import ttd_plugins.testing; print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


# open_clip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dense": "plain"},
        {"dense": "value_only"},
        {"dense": "sclip", "custom_text": True},
        {"dense": "naclip", "vision": {"layers": 8}},
        {"vision": {"pool_type": "avg"}, "init_logit_bias": -5.0},
    ],
    ids=str,
)
def test_small_random_open_clip_models_pass(options: dict[str, Any]) -> None:
    pytest.importorskip("open_clip")
    from helpers_open_clip import CONTEXT, WordTokenizer, tiny_clip
    from ttd_open_clip.adapter import OpenCLIPAdapter

    options = dict(options)
    dense = options.pop("dense", "maskclip")
    report = check_adapter(
        lambda: OpenCLIPAdapter(tiny_clip(**options), tokenizer=WordTokenizer(CONTEXT), dense=dense),
        # The tokenizer of the helper cannot encode unpaired surrogates' words, which valid_unicode mends before.
    )
    assert report.ok, lines(report)


# The command ---------------------------------------------------------------------------------------------------------


def ttd(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["check-adapter", *arguments])


def test_the_command_prints_a_table_and_its_status_says_whether_all_is_well(plugin: ConformingFamily) -> None:
    result = ttd("conforming:toy@fixed", "--backbone-option", "seed=2")
    assert result.exit_code == 0, result.output
    assert f"{len(NAMES) - len(UNSTATED)} passed, 0 failed, {len(UNSTATED)} skipped" in result.stdout
    assert all(name in result.stdout for name in NAMES)
    plugin.kind = Transposed
    result = ttd("conforming:toy@fixed")
    assert result.exit_code == 1
    assert f"1 failed, {2 + len(UNSTATED)} skipped" in result.stdout
    for part in ("expected: ", "seen: ", "usual cause: the grid is transposed", "it depends on"):
        assert part in result.stdout


def test_the_command_as_json(plugin: ConformingFamily) -> None:
    plugin.kind = Transposed
    result = ttd("conforming:toy@fixed", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert (answer["adapter"], answer["ok"]) == ("conforming:toy@random", False)
    assert [check["name"] for check in answer["checks"]] == NAMES
    found = {check["name"]: check for check in answer["checks"]}["patches_in_place"]
    assert found["status"] == "failed" and found["expected"] and found["seen"] and len(found["causes"]) == 3
    only = json.loads(ttd("conforming:toy@fixed", "--json", "--check", "calibration").stdout)
    assert [check["name"] for check in only["checks"]] == ["calibration"]


@pytest.mark.parametrize("name", ["Raises", "Leaves", "Nothing", "LyingWidth", "NoDescription"])
def test_an_adapter_that_raises_or_lies_does_not_take_the_command_down(plugin: ConformingFamily, name: str) -> None:
    plugin.kind = BROKEN[name][0]
    result = ttd("conforming:toy@fixed", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    text = ttd("conforming:toy@fixed")
    assert text.exit_code == 1 and "Traceback" not in text.output


def test_a_family_that_cannot_load_is_a_failed_check(plugin: ConformingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError("no"), SystemExit(9)):

        def load_it(*_: Any, _error: BaseException = error, **__: Any) -> DenseAdapter:
            raise _error

        monkeypatch.setattr(ConformingFamily, "load", load_it)
        result = ttd("conforming:toy@fixed", "--json")
        assert result.exit_code == 1
        failed = [check["name"] for check in json.loads(result.stdout)["checks"] if check["status"] == "failed"]
        assert failed == ["adapter_is_built"]


def test_a_family_registered_twice_is_a_failed_check(plugin: ConformingFamily) -> None:
    with temporary_plugin(ConformingPlugin(), name="again"):
        result = ttd("conforming:toy@fixed", "--json")
    assert result.exit_code == 1
    failed = [check["name"] for check in json.loads(result.stdout)["checks"] if check["status"] == "failed"]
    assert failed == ["registered_once"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("conformign:toy",), "did you mean 'conforming'"),
        (("conforming",), "names no model"),
        (("conforming:toy@fixed", "--backbone-option", "sede=2"), "did you mean 'seed'"),
        (("conforming:toy@fixed", "--check", "calibratoin"), "did you mean 'calibration'"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    plugin: ConformingFamily, arguments: tuple[str, ...], part: str
) -> None:
    result = ttd(*arguments)
    assert result.exit_code == cli.USER_ERROR
    assert result.stderr.count("\n") == 1 and part in result.stderr


# Documentation -------------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "conformance-kit.md"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_every_check_is_documented_as_it_describes_itself(check: Any) -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| `{check.name}` |")]
    assert len(rows) == 1
    _, _, what, causes, _ = rows[0].split("|")
    assert what.strip() == check.what
    assert causes.strip() == "; ".join(check.causes)


def test_the_document_names_no_check_that_is_gone() -> None:
    documented = [line.split("`")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert documented == NAMES


def test_results_can_be_sent_to_another_process() -> None:
    report = check_adapter(conforming, only=["calibration"])
    assert pickle.loads(pickle.dumps(report)) == report
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    assert str(report).startswith("conforming:toy@random:\ncalibration: passed")


def test_old_names_of_checks_work_and_warn() -> None:
    with pytest.warns(FutureWarning, match="the check any_picture is now any_image_mode"):
        report = check_adapter(conforming, only=["any_picture"])
    assert report.passed == ["any_image_mode"]
    with pytest.warns(FutureWarning, match="the check any_picture is now any_image_mode"):
        report = check_adapter(conforming, only=["any_image_mode"], not_applicable={"any_picture": "not here"})
    assert report.skipped == {"any_image_mode": "not here"}
