"""The conformance kit on honest adapters of other kinds, stated references of the library, and state of the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from broken_toys import BROKEN
from conforming_toy import (
    ConformingAdapter,
    ConformingFamily,
    ConformingModel,
    ReferencedAdapter,
    conforming,
)
from helpers_kit import conforming_plugin as conforming_plugin
from helpers_kit import lines
from torch import Tensor
from typer.testing import CliRunner

from ttd_plugins import cli, load
from ttd_plugins.adapter import ImageFeatures, LibraryReference
from ttd_plugins.testing import check_adapter
from ttd_plugins.testing.process_state import ProcessState

pytest.importorskip("peft")


def ttd(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["check-adapter", *arguments])


# References ----------------------------------------------------------------------------------------------------------


def test_stated_references_are_compared_and_the_command_reads_them(plugin: ConformingFamily) -> None:
    names = ["patches_match_library", "tokens_match_library", "pixels_match_library"]
    plugin.kind = ReferencedAdapter
    assert check_adapter(lambda: conforming(ReferencedAdapter), only=names).passed == names
    result = ttd("conforming:toy@fixed", "--json", *(part for name in names for part in ("--check", name)))
    assert [check["status"] for check in json.loads(result.stdout)["checks"]] == ["passed"] * 3
    plugin.kind = BROKEN["NoCapitals"][0]
    result = ttd("conforming:toy@fixed", "--check", "tokens_match_library")
    assert result.exit_code == 1 and "'A Photo of TWO Cats.', which continue at position 1" in result.stdout


def test_a_reference_that_is_something_else_is_a_finding() -> None:
    class Lambda(ConformingAdapter):
        library_reference: ClassVar[Any] = {"image": None}

    report = check_adapter(lambda: conforming(Lambda), only=["tokens_match_library"])
    assert "library_reference is a dict, not a LibraryReference" in str(report.results[0].seen)


class Masked(ConformingModel):
    """Its function of texts takes a mask, as those of transformers do, and pools the mean."""

    encode_text = None  # type: ignore[assignment]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids) + self.text_positions[: input_ids.shape[1]]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.text_projection(self.text_norm(pooled + self.text_mlp(pooled)))


class MaskedAdapter(ConformingAdapter):
    with_mask = True

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.get_text_features(ids, (ids != 0).long() if self.with_mask else None)


class UnmaskedAdapter(MaskedAdapter):
    with_mask = False


class UnmaskedStated(UnmaskedAdapter):
    library_reference = LibraryReference(text=lambda model, ids, mask: model.get_text_features(ids, mask))


def test_a_mask_is_passed_to_functions_that_take_one() -> None:
    names = ["text_matches_library"]
    assert check_adapter(lambda: MaskedAdapter(Masked()), only=names).passed == names
    unclear = check_adapter(lambda: UnmaskedAdapter(Masked()), only=names)
    assert "state in library_reference.text which call" in unclear.skipped[names[0]]
    assert check_adapter(lambda: UnmaskedStated(Masked()), only=names).failed == names
    # Without any reference, the claim that positions after the end have no effect is false.
    assert check_adapter(lambda: UnmaskedAdapter(Masked()), only=["text_trimming"]).failed == ["text_trimming"]


# Honest adapters -----------------------------------------------------------------------------------------------------

QUICK = ("chinese_clip", "alt_clip", "attention_pooled", "efficientnet")
"""One of each kind, which are checked in a few seconds; the slow run has all of them over ten seeds."""


def assert_honest(name: str, seed: int) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    from honest_adapters import HONEST

    report = check_adapter(lambda: HONEST[name](seed))
    assert report.ok, lines(report)
    assert not {"patches_in_place", "joint_space", "new_weights_count", "lora_unloads_and_merges"} & set(report.skipped)


@pytest.mark.parametrize("name", QUICK)
def test_honest_adapters_of_other_kinds_pass(name: str) -> None:
    assert_honest(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["align", "chinese_clip", "alt_clip", "fastvit", "convnext", "resnet", "efficientnet",
                                  "byobnet", "attention_pooled", "resnet_pooled"])  # fmt: skip
def test_honest_adapters_pass_for_any_random_weights(name: str, seed: int) -> None:
    assert_honest(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["open_clip", "openai_clip", "siglip", "eva_clip"])
def test_shipped_families_pass_for_any_random_weights(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    report = check_adapter(lambda: load(f"{name}:tiny@random"))
    assert report.ok, lines(report)


def test_transposed_maps_of_large_receptive_fields_are_found() -> None:
    pytest.importorskip("timm")
    from honest_adapters import HONEST

    made = HONEST["fastvit"](0)
    encode = made.encode_image

    def transposed(pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        found = encode(pixels, pooled=pooled)
        rows, columns = found.patches.shape[1:3]
        return ImageFeatures(found.patches.flatten(1, 2).unflatten(1, (columns, rows)).transpose(1, 2), found.pooled)

    vars(made)["encode_image"] = transposed
    assert check_adapter(lambda: made, only=["patches_in_place"]).failed == ["patches_in_place"]


def test_the_recipes_are_code_of_honest_adapters() -> None:
    root = Path(__file__).parents[1]
    code = {line.strip() for line in (root / "tests" / "honest_adapters.py").read_text().splitlines()}
    blocks = (root / "docs" / "adapter-recipes.md").read_text().split("```python\n")[1:]
    shown = [line.strip() for block in blocks for line in block.split("```")[0].splitlines() if line.strip()]
    assert len(shown) > 10 and not [line for line in shown if line not in code]


# The process ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch._C._set_grad_enabled(False),
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: __import__("os").environ.update(TTD_KIT_TEST="1"),
    ],
)
def test_what_an_adapter_leaves_in_the_process_is_found_and_undone(change: Any) -> None:
    class Careless(ConformingAdapter):
        def logit_bias(self) -> Tensor | None:
            change()
            return None

    before = ProcessState()
    try:
        report = check_adapter(lambda: conforming(Careless), only=["process_unchanged", "logits"])
        assert report.failed == ["process_unchanged"], lines(report)
        assert before.changes() == []
    finally:
        before.restore()
