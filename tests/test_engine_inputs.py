"""What callers pass to the engine: refused in one sentence where it is wrong, warned of where it is probably wrong."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from toy_backbone import ToyAdapter, toy, toy_images

from ttd_plugins.adapter import Calibration
from ttd_plugins.calibration import fit_calibration, fit_logistic
from ttd_plugins.engine import TTD
from ttd_plugins.engine_checks import check_pixels
from ttd_plugins.errors import ImageSizeError, InputError, InputWarning, TagExtractionError, TTDError
from ttd_plugins.method.selection import select_tags
from ttd_plugins.utils import distributed
from ttd_plugins.utils.files import given_path
from ttd_plugins.utils.sizes import size_pair

CAPTIONS = ["a dog on grass", "red kite", "one owl"]
IMAGES = toy_images(3)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ((IMAGES * 255).byte(), "floating-point pixels, normalised for the backbone, not uint8"),
        (IMAGES.long(), "not int64"),
        (list(IMAGES), r"not a list of them; pass torch\.stack\(images\)"),
        (tuple(IMAGES), "not a tuple of them"),
        (IMAGES.numpy(), "not an object of class numpy.ndarray; transform each image by dense_transform"),
        ([Image.new("RGB", (8, 8))] * 3, "dense_transform"),
        ({"pixel_values": IMAGES, "n": 1}, "not a mapping with the keys 'pixel_values', 'n'"),
        (IMAGES[0], r"not \[3, 16, 16\]; for one image pass images\[None\]"),
        (IMAGES.permute(0, 2, 3, 1), r"pass images\.permute\(0, 3, 1, 2\)"),
        (IMAGES[:, :1], r"not \[3, 1, 16, 16\]"),
        ("photo.jpg", "builtins.str"),
        (None, "NoneType"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_images_that_are_no_batch_of_pixels_are_refused_in_every_step(images: Any, said: str) -> None:
    ttd = TTD(toy())
    ttd(IMAGES, CAPTIONS)
    candidates = ttd.candidates(IMAGES, CAPTIONS)
    for call in (
        lambda: ttd(images, CAPTIONS),
        lambda: ttd.candidates(images, CAPTIONS),
        lambda: ttd.align(images, CAPTIONS, candidates),
    ):
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ({"a": 1, "b": 2, "c": 3}, "not an object of class builtins.dict"),
        ({"a", "b", "c"}, "not an object of class builtins.set"),
        (torch.zeros(3, 4), "not an object of class torch.Tensor"),
        ((one for one in CAPTIONS), "generator"),
        (["a", 3, "b"], "caption 1 is a int, not a string"),
        (["a", math.nan, "b"], "caption 1 is a float"),
        ([["a", "b"], ["c"], ["d"]], "repeat the image for each of its captions and pass groups"),
    ],
)
def test_captions_that_are_no_strings_are_refused(captions: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TTD(toy())(IMAGES, captions)


def test_captions_may_be_a_tuple_or_an_array() -> None:
    expected = TTD(toy())(IMAGES, CAPTIONS).loss
    for captions in (tuple(CAPTIONS), np.array(CAPTIONS)):
        assert torch.equal(TTD(toy())(IMAGES, captions).loss, expected)


@pytest.mark.parametrize("tags", [{"a": 1}, 3, [["a"], "b", []], [["a"], [None], []], [1, 2, 3], [["a"], None, []]])
def test_tags_that_are_no_lists_of_strings_are_refused(tags: Any) -> None:
    with pytest.raises(InputError, match="tags must be a list of tags for each caption"):
        TTD(toy())(IMAGES, CAPTIONS, tags)


# Pixels of the first batch -------------------------------------------------------------------------------------------


def photographs(count: int = 3) -> torch.Tensor:
    """Pixels in [0, 1], as those of photographs."""
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_pixels_of_0_to_255_are_refused() -> None:
    with pytest.raises(InputError, match=r"pixels of the first batch are from .* to 25\d.* dense_transform"):
        TTD(toy())(photographs() * 255, CAPTIONS)
    with pytest.raises(InputError, match="pixels of the first batch"):
        TTD(toy())((photographs() * 255 - 0.5) / 0.25, CAPTIONS)


def test_pixels_that_were_not_normalised_are_warned_of_once() -> None:
    ttd = TTD(toy())
    with pytest.warns(InputWarning, match="as if they were not normalised"):
        ttd(photographs(), CAPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ttd(photographs(), CAPTIONS)


@pytest.mark.parametrize(
    "images",
    [
        toy_images(3),
        (photographs() - 0.5) / 0.3,
        torch.zeros(3, 3, 16, 16),
        torch.full((3, 3, 16, 16), 1.0),
        photographs() * 0.3 + 0.5,
        torch.full((3, 3, 16, 16), math.nan),
        (photographs() - 0.5) / 0.3 * torch.tensor([1, math.inf, 1]).view(3, 1, 1, 1),
    ],
    ids=["normal", "normalised", "black", "white", "bright", "nan", "infinite"],
)
def test_other_pixels_are_not_warned_of(images: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pixels(images, toy())


def test_a_picture_drawn_before_does_not_count_as_the_first_batch() -> None:
    ttd = TTD(toy())
    ttd.maps(Image.new("RGB", (16, 16)), "a dog")
    with pytest.raises(InputError, match="pixels of the first batch"):
        ttd(photographs() * 255, CAPTIONS)


def test_values_are_read_with_the_first_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value is a host synchronisation, so no later step may do it."""
    ttd = TTD(toy())
    ttd(IMAGES, CAPTIONS)

    def fail(*_: Any) -> None:
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    with pytest.raises(AssertionError, match="a value was read"):
        check_pixels(IMAGES, ttd.backbone)
    # The lengths of texts are on the CPU by contract, and the toy asserts on its own ids.
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: self.numpy().tolist())
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: bool(self.numpy()))
    ttd(IMAGES, CAPTIONS)


# Calibration and precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "said"), [(40.0, "100% of them above 0.99"), (-40.0, "none of them above 0.0001")])
def test_a_saturated_calibration_is_warned_of_with_the_first_batch(shift: float, said: str) -> None:
    for options in ({}, {"rule": "probability", "activation": "minmax"}):
        ttd = TTD(toy(), calibration=Calibration(1.0, shift), **options)
        with pytest.warns(InputWarning, match=said) as found:
            ttd(IMAGES, CAPTIONS)
        assert "fit_calibration" in str(found[0].message) and "toy:ToyModel" in str(found[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ttd(IMAGES, CAPTIONS)


@pytest.mark.parametrize("options", [{"activation": "minmax"}, {"tag_weight": 0.0, "distill_weight": 0.0}])
def test_a_calibration_that_is_not_used_is_not_warned_of(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TTD(toy(), calibration=Calibration(1.0, 40.0), **options)(IMAGES, CAPTIONS)
        TTD(toy())(IMAGES, CAPTIONS)


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float16, "overflows to NaN"), (torch.bfloat16, "loses small steps")]
)
def test_training_half_precision_is_warned_of_before_the_first_step(dtype: torch.dtype, said: str) -> None:
    ttd = TTD(toy(dtype=dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            ttd(IMAGES, CAPTIONS)
    with pytest.warns(InputWarning, match=said):
        ttd(IMAGES, CAPTIONS)
    pytest.importorskip("peft", reason="LoRA needs peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TTD(toy(dtype=dtype).add_lora(2))(IMAGES, CAPTIONS)


# Groups --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [
        ["a", "a", "b"],
        [1, 1, 2],
        (7, 7, 0),
        torch.tensor([1, 1, 2]),
        np.array([1, 1, 2]),
        np.array(["x", "x", "y"]),
        [b"a", b"a", b"b"],
        [(1, "a"), (1, "a"), (1, "b")],
        [Path("a"), Path("a"), Path("b")],
        [1, np.int64(1), 2],
        [torch.tensor(1), torch.tensor(1), torch.tensor(2)],
        [frozenset("ab"), frozenset("ba"), frozenset("a")],
        [1, 1.0, 1.5],
        [-1, -1, 2**70],
        [0, 0, 1],
    ],
    ids=lambda groups: f"{type(groups).__name__} of {type(groups[0]).__name__}",
)
def test_ids_of_images_may_be_of_any_kind(groups: Any) -> None:
    expected = TTD(toy())(IMAGES, CAPTIONS, groups=["x", "x", "y"]).losses["contrastive"]
    assert torch.equal(TTD(toy())(IMAGES, CAPTIONS, groups=groups).losses["contrastive"], expected)


def test_ids_of_other_kinds_are_not_taken_for_each_other() -> None:
    ids = ["1", 1, b"1", ("1",), (1,), ("1", ""), (("1",),), frozenset(["1"]), 1.5, "1.5", "", (), Path("1")]
    assert len(set(distributed.group_numbers(ids, torch.device("cpu")).tolist())) == len(ids)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([1, None, 2], "group 1 is None; every pair needs the id of its image"),
        ([1, math.nan, 2], "group 1 is nan"),
        ([[1], [1], [2]], "group 0 is a list; the id of an image"),
        (torch.zeros(3, 2), "group 0 is a list"),
        ([1, 2], "3 images came with 2 groups"),
        ("abc", "groups must be a list"),
        ({1, 2, 3}, "groups must be a list"),
        ({1: 1, 2: 2, 3: 3}, "groups must be a list"),
        (3, "groups must be a list"),
    ],
)
def test_ids_that_name_no_image_are_refused(groups: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TTD(toy())(IMAGES, CAPTIONS, groups=groups)


# Backbones, extractors and options -----------------------------------------------------------------------------------


def test_what_is_no_adapter_is_refused_with_what_to_do() -> None:
    backbone = toy()
    for given, said in (
        (backbone.model, r"an object of class toy_backbone\.ToyModel; pass wrap\(model, tokenizer=tokenizer\)"),
        ("family:model", r"pass load\('family:model'\)"),
        (torch.compile(backbone), "pass the adapter inside it; compile, shard or distribute TTD"),
        (nn.DataParallel(backbone), "pass the adapter inside it"),
        (TTD(backbone), "pass its attribute backbone"),
        (None, r"pass the result of wrap\(\) or load\(\)"),
    ):
        with pytest.raises(InputError, match=said):
            TTD(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", ["fine_tune", "export_backbone", "fit_calibration", "save_lora", "load_lora"])
def test_no_function_takes_a_raw_model(function: str, tmp_path: Path) -> None:
    import ttd_plugins

    model: Any = toy().model
    calls: dict[str, Any] = {
        "fine_tune": lambda: ttd_plugins.fine_tune({}, tmp_path / "run", backbone=model),
        "export_backbone": lambda: ttd_plugins.export_backbone(model, tmp_path / "out"),
        "fit_calibration": lambda: fit_calibration(model, []),
        "save_lora": lambda: ttd_plugins.save_lora(model, tmp_path),
        "load_lora": lambda: ttd_plugins.load_lora(model, tmp_path),
    }
    with pytest.raises(InputError, match=rf"{function}\(\) takes an adapter.* not an object of class toy_backbone"):
        calls[function]()
    assert not list(tmp_path.iterdir())


def test_a_tower_without_parameters_is_an_error() -> None:
    class Towerless(ToyAdapter):
        def tower_parameters(self, tower: Any) -> Any:
            return [] if tower == "image" else super().tower_parameters(tower)

    with pytest.raises(TTDError, match=r"tower_parameters\('image'\) names no parameter"):
        TTD(toy(kind=Towerless))


def test_an_extractor_may_be_named_as_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = TTD(toy(), extractor="words", extractor_options={"stop_words": ["dog"]})
    assert (found.options.extractor, found.extractor(["a dog"])) == ("words", [["a"]])
    with pytest.raises(TagExtractionError, match="unknown tag extractor 'nouns'; known:"):
        TTD(toy(), extractor="nouns")
    for wrong in (3, list, ["words"]):
        with pytest.raises(InputError, match="extractor is the name of a tag extractor, such as 'words', or an object"):
            TTD(toy(), extractor=wrong)  # type: ignore[arg-type]


def test_stanza_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttd_plugins.tag_extractors import stanza_tags

    asked: list[Any] = []
    monkeypatch.setattr(stanza_tags, "_pipeline", lambda *arguments: asked.append(arguments))
    ttd = TTD(toy(), extractor="stanza", extractor_options={"resources": "folder"})
    assert isinstance(ttd.extractor, stanza_tags.StanzaTags) and asked == [("folder", "en", False)]


@pytest.mark.parametrize("tags", [None, {}, [["a"], None, []], [["a"], "b", []], [["a"], [1], []]])
def test_an_extractor_that_returns_something_else_is_named(tags: Any) -> None:
    def careless(captions: Any) -> Any:
        return tags

    with pytest.raises(TagExtractionError, match="tag extractor 'function' "):
        TTD(toy(), extractor=careless)(IMAGES, CAPTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 5}, "threshold must be at least 0 and at most 1 with the rule minmax, not 5"),
        ({"threshold": -0.01}, "threshold must be at least 0"),
        ({"rule": "probability", "threshold": 1.5}, "with the rule probability, not 1.5"),
        ({"rule": "absolute", "threshold": -1.5}, "at least -1 and at most 1 with the rule absolute"),
        ({"threshold": math.nan}, "threshold must be a finite number"),
        ({"threshold": "0.5"}, "threshold must be a number, not the text '0.5'"),
        ({"distill_weight": math.inf}, "distill_weight must be a finite number"),
        ({"options": {"rule": "minmax"}}, "options of TTD() is a TTDOptions"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        TTD(toy(), **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": "8"}, {"rank": 0}, {"rank": 2.5}, {"rank": True}, {"rank": 10**9}, {"alpha": math.inf},
        {"alpha": math.nan}, {"alpha": "16"}, {"alpha": 0}, {"dropout": "0"}, {"dropout": math.nan}, {"dropout": 1},
        {"towers": "vision"}, {"towers": []}, {"towers": 3},
    ],
    ids=repr,
)  # fmt: skip
def test_options_of_lora_out_of_range_are_refused(options: dict[str, Any]) -> None:
    backbone = toy()
    with pytest.raises(InputError, match="of LoRA must be"):
        backbone.add_lora(**options)
    assert not backbone.has_lora


@pytest.mark.parametrize("size", ["224", 2.5, True, (1, 2, 3), (True, 4), -4, 0, (4, 0), 10**6, ("4", 4), None, {}])
def test_sizes_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(ImageSizeError, match="image size"):
        size_pair(size)
    if size is not None:
        with pytest.raises(ImageSizeError, match="image size"):
            TTD(toy()).maps(Image.new("RGB", (8, 8)), "a dog", size=size)


def test_sizes_may_be_of_numpy() -> None:
    assert size_pair(np.int64(8)) == (8, 8) and size_pair(np.array([4, 8])) == (4, 8) and size_pair([4, 8]) == (4, 8)


@pytest.mark.parametrize("image", [None, b"", np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8)], ids=type)
def test_maps_are_of_a_picture_or_a_path(image: Any) -> None:
    with pytest.raises(InputError, match="must be a PIL image or a path"):
        TTD(toy()).maps(image, "a dog")
    with pytest.raises(InputError, match="the caption must be a string, not a NoneType"):
        TTD(toy()).maps(Image.new("RGB", (8, 8)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["0.5", None, math.nan, math.inf, True, [0.5]])
def test_numbers_of_functions_are_checked(wrong: Any) -> None:
    for call in (
        lambda: fit_calibration(toy(), [], held_out=wrong),
        lambda: fit_calibration(toy(), [], batch_size=wrong),
        lambda: fit_logistic(np.array([0.1, 0.2]), np.array([True, False]), ridge=wrong),
        lambda: select_tags(torch.zeros(2), torch.zeros(2, dtype=torch.long), 1, threshold=wrong),
    ):
        with pytest.raises(InputError, match="must be a"):
            call()


@pytest.mark.parametrize("path", ["", "  ", None, 3, "a\0b"])
def test_an_output_path_that_is_none_is_refused(path: Any) -> None:
    from ttd_plugins import export_backbone, fine_tune

    for call in (lambda: given_path(path), lambda: fine_tune({}, path), lambda: export_backbone(toy(), path)):
        with pytest.raises(InputError, match="out must be a path"):
            call()
    assert given_path(".") == Path() and given_path(Path("a")) == Path("a")
