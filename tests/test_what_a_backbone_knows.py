"""What a backbone knows, and whether its probabilities are calibrated, is said wherever its answers are shown."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeAdapter, FakeFamily, FakeModel, FakePlugin
from PIL import Image
from typer.testing import CliRunner, Result

from ttd_plugins import TTD, TTDOptions, cli, load
from ttd_plugins.adapter import BackboneDescription, Calibration, DenseAdapter
from ttd_plugins.app.studio import Studio
from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.embedded import MODELS_FOLDER
from ttd_plugins.embedded.folder import read_settings
from ttd_plugins.errors import ImageSizeError, TTDError
from ttd_plugins.plugins import temporary_plugin

LIBRARIES = {"open_clip": "open_clip", "eva_clip": "open_clip", "openai_clip": "transformers", "siglip": "transformers"}
EMBEDDED = [
    pytest.param(f"{family}:tiny", marks=pytest.mark.skipif(not importlib.util.find_spec(needs), reason=f"no {needs}"))
    for family, needs in LIBRARIES.items()
]
CAPTION = "a dog on the grass"
FITTED = Calibration(4.0, -1.0)


class Knowing(FakeAdapter):
    """A fake whose description the test decides."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__(FakeModel())
        self.known = known

    @property
    def description(self) -> BackboneDescription:
        return replace(super().description, **self.known)


class KnowingFamily(FakeFamily):
    """``fake:small`` as a family that states more about it."""

    def __init__(self, **known: Any) -> None:
        super().__init__()
        self.known = known

    def load(self, model: str, weights: str, **options: Any) -> FakeAdapter:
        return Knowing({"model": model, "weights": weights} | self.known)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return file


@pytest.fixture
def drawings() -> Iterator[None]:
    with temporary_plugin(FakePlugin(KnowingFamily(trained_on="drawings")), name="fake_plugin"):
        yield


@pytest.fixture
def photographs() -> Iterator[None]:
    family = KnowingFamily(calibrated=True, calibration=FITTED)
    with temporary_plugin(FakePlugin(family), name="fake_plugin"):
        yield


def ttd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


# The embedded models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_tiny_model_says_what_it_has_seen(name: str) -> None:
    description = load(name).description
    assert description.trained_on == "drawings" and not description.calibrated
    (note,) = backbone_notes(description)
    assert note.startswith(f"{name} was pre-trained on drawings only")
    fresh = load(f"{name}@random").description
    assert fresh.trained_on is None and not fresh.calibrated
    (note,) = backbone_notes(fresh)
    assert "random weights" in note
    own = load(name, calibration=FITTED).description
    assert own.calibrated and own.calibration == FITTED and own.trained_on == "drawings"


def test_it_is_a_fact_of_the_model_folder(tmp_path: Path) -> None:
    for stored in MODELS_FOLDER.glob("*/ttd.json"):
        assert read_settings(stored.parent).trained_on == json.loads(stored.read_text()).get("trained_on")
    file = tmp_path / "ttd.json"
    file.write_text(json.dumps({"dense_mode": "value", "calibration": {"scale": 1, "shift": 2}}))
    assert read_settings(tmp_path).trained_on is None
    file.write_text(json.dumps({"dense_mode": "value", "calibration": {"scale": 1, "shift": 2}, "trained_on": 3}))
    with pytest.raises(TTDError, match="trained_on is no text"):
        read_settings(tmp_path)


# Where answers are shown ---------------------------------------------------------------------------------------------

NOTE = "fake:small was pre-trained on drawings only; on other images, such as photographs"


def test_tags_say_it(drawings: None, picture: Path) -> None:
    result = ttd("tags", picture, CAPTION, "--backbone", "fake:small")
    assert f"warning: {NOTE}" in result.stderr and "(uncalibrated)" in result.stdout
    result = ttd("tags", picture, CAPTION, "--backbone", "fake:small", "--json")
    assert f"warning: {NOTE}" in result.stderr
    answer = json.loads(result.stdout)
    assert answer["calibrated"] is False and answer["notes"][0].startswith(NOTE)
    assert all({"tag", "score", "uncalibrated_probability", "selected"} == set(row) for row in answer["tags"])


def test_tags_of_a_backbone_that_knows_photographs(photographs: None, picture: Path) -> None:
    result = ttd("tags", picture, CAPTION, "--backbone", "fake:small")
    assert result.stderr == "" and "uncalibrated" not in result.stdout
    answer = json.loads(ttd("tags", picture, CAPTION, "--backbone", "fake:small", "--json").stdout)
    assert answer["calibrated"] is True and answer["notes"] == []
    assert all(set(row) == {"tag", "score", "probability", "selected"} for row in answer["tags"])


def test_a_heat_map_says_it_in_its_footer(
    drawings: None, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    texts: list[str] = []
    write = Figure.text
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **more: texts.append(s) or write(self, x, y, s, **more))
    result = ttd("heatmap", picture, CAPTION, "--backbone", "fake:small", "--out", tmp_path / "maps.png")
    assert f"warning: {NOTE}" in result.stderr and result.exit_code == 0
    (footer,) = (" ".join(text.split()) for text in texts if "colours show where" in text)
    assert NOTE in footer and footer.endswith("not how much.")


def test_the_app_says_it_and_leaves_guesses_out(drawings: None, picture: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins.app.rendering import render_result

    result = Studio(["fake:small"]).view(picture, CAPTION, ["fake:small"])
    assert any(note.startswith(NOTE) for note in result.views[0].notes)
    page = render_result(result)
    assert NOTE in page and "Not calibrated" in page and "ttd-probability" not in page


def test_the_app_shows_calibrated_probabilities(photographs: None, picture: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins.app.rendering import render_result

    result = Studio(["fake:small"]).view(picture, CAPTION, ["fake:small"])
    assert result.views[0].notes == () and result.views[0].before is not None
    page = render_result(result)
    assert page.count("ttd-probability") == len(result.tags)
    assert f"{float(result.views[0].before.probabilities[0]):.0%}" in page


def test_maps_say_it_in_python(drawings: None, picture: Path) -> None:
    backbone = load("fake:small")
    maps = TTD(backbone).maps(picture, CAPTION)
    assert not maps.calibrated and maps.probability_label == "probability (uncalibrated)"
    assert maps.notes[0].startswith(NOTE)
    fitted = TTD(backbone, calibration=FITTED, rule="probability").maps(picture, CAPTION)
    assert fitted.calibrated and fitted.probability_label == "probability" and len(fitted.notes) == 1
    # The default map, passed by hand, is no fit.
    assert not TTD(backbone, calibration=Calibration()).maps(picture, CAPTION).calibrated
    guessed = TTD(backbone, TTDOptions(rule="probability")).maps(picture, CAPTION)
    assert any("probabilities that are not calibrated" in note for note in guessed.notes)


def test_random_weights_are_said_too(picture: Path) -> None:
    with temporary_plugin(FakePlugin(KnowingFamily(weights="random")), name="fake_plugin"):
        result = ttd("tags", picture, CAPTION, "--backbone", "fake:small@random")
    assert "random weights, so its scores and maps mean nothing" in result.stderr


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["100000", "999999", "9" * 5000, "8x800000", "100000x100000", "0", "-8", "٣٢"])
@pytest.mark.parametrize("command", ["tags", "heatmap"])
def test_a_size_that_would_hang_is_one_sentence(
    photographs: None, picture: Path, tmp_path: Path, command: str, size: str
) -> None:
    more = ["--out", str(tmp_path / "maps.png")] if command == "heatmap" else []
    begun = time.monotonic()
    result = ttd(command, picture, CAPTION, "--backbone", "fake:small", f"--size={size}", *more)
    assert result.exit_code == 2 and time.monotonic() - begun < 5
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and len(result.stderr) < 300


def test_every_way_to_a_size_has_the_limit(photographs: None) -> None:
    backbone = load("fake:small")
    image = Image.new("RGB", (8, 8))
    for call in (
        lambda side: backbone.patch_grid(side, side),
        lambda side: DenseAdapter.dense_transform(backbone, side),
        lambda side: TTD(backbone).maps(image, CAPTION, size=side),
    ):
        with pytest.raises(ImageSizeError, match="1000 x 1000 patches, more than 32,768"):
            call(8_000)
        with pytest.raises(ImageSizeError, match=r"12500 x 12500 patches|from 1 to 16384 pixels, not 100000 x 100000"):
            call(100_000)
    assert backbone.patch_grid(8 * 128, 8 * 256) == (128, 256)
