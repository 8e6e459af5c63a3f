"""The gallery of `ttd app`: what it offers, answers that visitors share, and checks of uploads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fakes import FakeFamily, FakePlugin
from PIL import Image

pytest.importorskip("matplotlib")

from ttd_plugins.app import examples as examples_module
from ttd_plugins.app import maps_tab, segment_tab
from ttd_plugins.app.components import LatestRequest, check_upload, checked_upload
from ttd_plugins.app.examples import Example, ExampleAnswers, caption_examples, name_examples, thumbnails_css
from ttd_plugins.app.gradio_page import build_page
from ttd_plugins.app.rendering import render_error, render_result
from ttd_plugins.app.studio import AppResult, Studio
from ttd_plugins.embedded.photo_examples import photograph
from ttd_plugins.errors import InputError
from ttd_plugins.plugins import temporary_plugin

FAKE = "fake:small"


class CountingStudio(Studio):
    """Counts computations, and waits after the first stage of each until the gate is open."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.count, self.gate = 0, threading.Event()
        self.gate.set()

    def watch(self, *arguments: Any) -> Iterator[AppResult]:
        self.count += 1
        for result in super().watch(*arguments):
            yield result
            assert self.gate.wait(30)


@pytest.fixture
def studio() -> Iterator[CountingStudio]:
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        yield CountingStudio([FAKE])


def first(studio: Studio) -> Example:
    return next(one for group in caption_examples(studio).values() for one in group)


def test_the_gallery_offers_what_the_backbones_know(studio: Studio) -> None:
    groups = caption_examples(studio)
    assert list(groups) == ["Photographs"]
    image, caption = groups["Photographs"][0].open()
    assert (image.tobytes(), caption) == (photograph(0)[0].tobytes(), photograph(0)[1])
    every = [one for group in (*groups.values(), *name_examples(studio).values()) for one in group]
    assert len({one.key for one in every}) == len(every) and all(one.credit for one in every)
    css = thumbnails_css(every)
    assert all(css.count(f"#ttd-example-{one.key} ") == 1 for one in every) and css.count("image/jpeg") == len(every)
    assert len(css) < 250_000


def test_an_example_chooses_a_backbone_that_knows_it() -> None:
    one = Example("x", "x", lambda: photograph(0), ("a", "b"))
    assert one.fitting(["b", "c"]) == ["b", "c"]
    assert one.fitting(["c"]) == one.fitting([]) == ["a"]


def test_scenes_are_offered_for_backbones_of_scenes() -> None:
    pytest.importorskip("open_clip")
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        groups = caption_examples(Studio([FAKE, "open_clip:tiny"]))
        assert list(groups) == ["Photographs", "Generated scenes"]
        assert groups["Generated scenes"][0].fitting([FAKE]) == ["open_clip:tiny"]
        assert groups["Photographs"][0].fitting(["open_clip:tiny"]) == [FAKE]


def test_an_answer_is_computed_once_and_equals_that_of_the_studio(studio: CountingStudio) -> None:
    answers, one = ExampleAnswers(studio), first(studio)
    *stages, complete = answers.watch(one, [FAKE])
    assert stages and all(stage.views[0].stage for stage in stages) and not complete.views[0].stage
    assert [result is complete for result in answers.watch(one, [FAKE], "somebody")] == [True]
    assert studio.count == 1
    assert render_result(complete) == render_result(studio.view(*one.open(), [FAKE]))


def test_who_comes_while_an_answer_is_computed_sees_its_stages(studio: CountingStudio) -> None:
    answers, one = ExampleAnswers(studio), first(studio)
    studio.gate.clear()
    seen: dict[str, list[AppResult]] = {"one": [], "two": []}
    arrived = threading.Semaphore(0)

    def visit(who: str) -> None:
        for result in answers.watch(one, [FAKE], who):
            seen[who].append(result)
            arrived.release()

    threads = [threading.Thread(target=visit, args=(who,)) for who in seen]
    for thread in threads:
        thread.start()
        assert arrived.acquire(timeout=30)
    studio.gate.set()
    for thread in threads:
        thread.join(30)
    assert studio.count == 1 and seen["one"][-1] is seen["two"][-1] and not seen["two"][-1].views[0].stage
    assert seen["two"][0].views[0].stage


def test_an_answer_that_its_visitor_left_is_computed_anew(studio: CountingStudio) -> None:
    answers, one = ExampleAnswers(studio), first(studio)
    left = answers.watch(one, [FAKE])
    next(left)
    left.close()
    *_, result = answers.watch(one, [FAKE], "two")
    assert studio.count == 2 and result.views[0].before is not None


def test_errors_are_not_remembered_and_the_oldest_answer_is_dropped(
    studio: CountingStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples_module, "MAX_ANSWERS", 1)
    answers = ExampleAnswers(studio)

    def fail() -> tuple[Image.Image, str]:
        raise InputError("no such example")

    broken = Example("broken", "", fail, (FAKE,))
    for _ in range(2):
        with pytest.raises(InputError, match="no such example"):
            list(answers.watch(broken, [FAKE]))
    answers.prepare(broken, [FAKE])
    one, two = caption_examples(studio)["Photographs"][:2]
    for example in (one, two, two, one):
        answers.prepare(example, [FAKE])
    assert studio.count == 3


def test_only_the_newest_request_of_a_visitor_is_current() -> None:
    latest = LatestRequest()
    old, other = latest.begin("a"), latest.begin("b")
    assert old() and other()
    new = latest.begin("a")
    assert (old(), new(), other()) == (False, True, True)
    latest.forget("a")
    assert not new() and other()


class CountingRequests(LatestRequest):
    """Lists its objects, each with the visitors whom it knows."""

    every: ClassVar[list[CountingRequests]] = []

    def __init__(self) -> None:
        super().__init__()
        self.visitors: set[str] = set()
        self.every.append(self)

    def begin(self, visitor: str) -> Any:
        self.visitors.add(visitor)
        return super().begin(visitor)

    def forget(self, visitor: str) -> None:
        self.visitors.discard(visitor)
        super().forget(visitor)


def test_a_visitor_who_leaves_is_forgotten_by_both_tabs(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setattr(CountingRequests, "every", [])
    for module in (maps_tab, segment_tab):
        monkeypatch.setattr(module, "LatestRequest", CountingRequests)
    page = build_page(studio)
    for tab in CountingRequests.every:
        tab.begin("one")
        tab.begin("two")
    (leave,) = [one.fn for one in page.fns.values() if any(event == "unload" for _, event in one.targets)]
    leave(SimpleNamespace(session_hash="one"))
    assert [tab.visitors for tab in CountingRequests.every] == [{"two"}, {"two"}]


class Skips:
    """What `checked_upload` needs of gradio."""

    @staticmethod
    def skip() -> str:
        return "unchanged"


def test_an_upload_is_checked_at_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "a.tiff")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "<b>.png").write_text("x")
    assert "a.png, 8 × 6 pixels" in check_upload(str(tmp_path / "a.png")).note
    shown = check_upload(str(tmp_path / "a.tiff")).shown
    assert shown is not None and shown.size == (8, 6) and check_upload(str(tmp_path / "a.png")).shown is None
    for name in ("cut.png", "<b>.png", "missing.png"):
        state = check_upload(str(tmp_path / name))
        assert not state.usable and 'role="alert"' in state.note and "choose another file" in state.note
        assert str(tmp_path) not in state.note and "<b>" not in state.note
        assert checked_upload(Skips, str(tmp_path / name), "a dog", ()) == (None, "unchanged", state)
    image, text, _ = checked_upload(Skips, str(tmp_path / "a.png"), "a cat", {"a cat"})
    assert (image, text) == ("unchanged", "")
    assert checked_upload(Skips, None, "mine", {"a cat"})[:2] == ("unchanged", "unchanged")


def test_a_sentence_begins_with_a_capital_letter_and_a_name_as_it_is() -> None:
    assert ">There is no image yet<" in render_error("there is no image yet")
    assert ">open_clip:tiny failed<" in render_error("open_clip:tiny failed")


def test_the_palette_has_enough_contrast_for_every_button() -> None:
    gradio = pytest.importorskip("gradio")
    from helpers_app_page import luminance

    from ttd_plugins.app.theme import make_theme

    theme = make_theme(gradio)
    for kind in ("primary", "secondary"):
        for state in ("", "_hover"):
            for scheme in ("", "_dark"):
                colours = [
                    getattr(theme, f"button_{kind}_{part}{state}{scheme}") for part in ("text_color", "background_fill")
                ]
                rgb = [", ".join(str(part) for part in bytes.fromhex(colour[1:])) for colour in colours]
                dark, bright = sorted(luminance(f"rgb({one})") for one in rgb)
                assert (bright + 0.05) / (dark + 0.05) > 4.5, (kind, state, scheme)


def test_the_screenshot_of_the_guide_is_made_or_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import make_app_image as script

    arguments = ["--out", str(tmp_path / "images"), "--backbones", FAKE]
    with monkeypatch.context() as patched:
        patched.setattr(script, "missing_browser", lambda: "no browser was found")
        script.main(arguments)
    assert capsys.readouterr().out == "skipped: no browser was found\n" and not (tmp_path / "images").exists()
    if script.missing_browser() is not None:
        pytest.skip(str(script.missing_browser()))
    with temporary_plugin(FakePlugin(FakeFamily()), name="fake_plugin"):
        script.main(arguments)
    with Image.open(tmp_path / "images" / "app.jpg") as image:
        assert image.width == script.WIDTH and image.height > 900
