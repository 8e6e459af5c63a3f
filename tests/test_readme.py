"""README: what the package index shows of it, its pictures and tables, and the anchors that all pages link to."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from email import message_from_string
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers_examples import ROOT, example

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOME = PROJECT["urls"]["Homepage"]


class Addresses(HTMLParser):
    """Links, pictures, and the ids that links within the page may name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and (address := found.get("href")):
            self.links.append(address)
        if tag == "img":
            self.pictures.append(found.get("src") or "")


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The long description in the metadata of a wheel, which the index shows."""
    build_meta = pytest.importorskip("setuptools.build_meta", reason="the metadata is built with setuptools")
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "ttd_plugins").mkdir()
    (folder / "adapters").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(ROOT / "ttd_plugins" / name, folder / "ttd_plugins")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "out").mkdir()
        name = build_meta.prepare_metadata_for_build_wheel("out")
    metadata = message_from_string((folder / "out" / name / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    return str(metadata.get_payload())


@pytest.fixture(scope="module")
def shown(description: str) -> Addresses:
    """The page of the index."""
    markdown = pytest.importorskip("readme_renderer.markdown", reason="needs the extra 'test'")
    html = markdown.render(description)
    assert html, "the index would show plain text"
    return Addresses(html)


def test_the_index_shows_every_picture_and_link_absolutely(shown: Addresses) -> None:
    assert len(shown.pictures) == 5 and len(shown.links) > 40
    for address in (*shown.pictures, *shown.links):
        assert re.match(r"https?://|mailto:|#", address), address


def test_addresses_of_this_project_are_files_of_the_repository(shown: Addresses) -> None:
    own = [address for address in (*shown.pictures, *shown.links) if address.startswith(f"{HOME}/")]
    assert len(own) > 40
    for address in own:
        kind, branch, path = address.removeprefix(f"{HOME}/").split("/", 2)
        assert kind in ("blob", "raw") and branch == "main", address
        assert (ROOT / path.split("#")[0]).exists(), address
        assert (kind == "raw") == (address in shown.pictures), address


def prose(text: str) -> str:
    """The text of a page without its fenced blocks, in which ``#`` begins a comment."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings on the code host."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_anchors(page: Path, text: str) -> list[str]:
    """Links of a page to headings that do not exist, there or in another page of the repository."""
    dead = []
    for path, fragment in re.findall(r"\]\(([^()#:\s]*)#([^()\s]+)\)", prose(text)):
        target = page.parent / path if path else page
        if target.suffix == ".md" and fragment not in anchors(target.read_text(encoding="utf-8")):
            dead.append(f"{path}#{fragment}")
    return dead


# Pages in docs/api link to names, which are anchors of the built site only; its strict build checks them.
LINKING = sorted(
    file.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "ttd_plugins/**/*.md")
    for file in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", LINKING)
def test_links_with_a_fragment_name_a_heading(page: str) -> None:
    assert not dead_anchors(ROOT / page, (ROOT / page).read_text(encoding="utf-8"))


def test_a_dead_anchor_is_noticed() -> None:
    text = "[a](../README.md#install), [b](../README.md#licence-and-credit), [c](faq.md#no-such), [d](#here)\n# Here\n"
    assert dead_anchors(ROOT / "docs" / "page.md", "```\n[e](#nothing)\n```\n") == []
    assert dead_anchors(ROOT / "docs" / "faq.md", text) == [
        "../README.md#licence-and-credit",
        "faq.md#no-such",
        "#here",
    ]


def test_the_table_of_extras_has_every_extra_of_users() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|[^|]+\| \+ ", README, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(PROJECT["optional-dependencies"]) - {"docs", "test"}


def test_the_text_is_the_same_on_the_index(description: str) -> None:
    """Only addresses differ."""
    plain = re.compile(r"\]\([^)]*\)|(?:src|srcset)=\"[^\"]*\"")
    assert plain.sub("", description).split() == plain.sub("", README).split()


def test_the_first_screen_has_a_sentence_a_picture_and_the_installation() -> None:
    places = [README.index(part) for part in ("**Fine-tune any", "readme-hero.jpg", "pip install")]
    assert places == sorted(places) and README[: places[2]].count("\n") < 35
    assert README.index('pip install "ttd-plugins[demo]"') < README.index("pip install -e")


def test_pictures_are_small_and_sharp() -> None:
    from PIL import Image

    for name, width in (("readme-hero.jpg", 1760), ("readme-hero-narrow.jpg", 880)):
        file = ROOT / "docs" / "images" / name
        with Image.open(file) as image:
            assert image.width == width
            assert min(image.convert("L").getpixel((x, 0)) for x in (0, image.width - 1)) > 250  # type: ignore[operator]
        assert file.stat().st_size <= 200_000
    width = re.search(r'readme-hero\.jpg" width="(\d+)"', README)
    assert width is not None and 2 * int(width[1]) == 1760


def test_badges_say_what_the_project_says() -> None:
    pytest.importorskip("matplotlib", reason="the badges are drawn with its font metrics")
    program = example("make_readme_image")
    badges = program.badges()
    assert badges["badge-python.svg"][1] == "3.11 | 3.12 | 3.13" and badges["badge-licence.svg"][1] == "MIT"
    for name, (label, value, colour) in badges.items():
        content = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert content == program.badge(label, value, colour), f"run examples/make_readme_image.py for {name}"
        assert f"docs/images/{name}" in README
    assert "shields.io" not in README


def test_the_table_of_features_is_what_the_adapters_do() -> None:
    for package in ("open_clip", "timm", "transformers"):
        pytest.importorskip(package, reason=f"the table loads every family, which needs {package}")
    found = example("support_matrix").MARKS.search(README)
    assert found is not None
    written = found[0].split("\n", 1)[1].rsplit("<!--", 1)[0]
    assert written == example("support_matrix").table(), "run examples/support_matrix.py"


def test_the_table_of_dense_modes_is_made_by_its_program() -> None:
    program = example("dense_modes")
    rows = [
        {"mode": mode, "arm": arm, "metrics": dict.fromkeys(program.METRICS.values(), value)}
        for mode in ("maskclip", "sclip")
        for arm, value in (("before", 0.1), ("control", 0.2), ("after", 0.3))
    ]
    lines = program.markdown(rows[:-1]).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| `maskclip` | 0.100, 0.200, **0.300** |")
    table = re.search(r"<!-- dense-modes -->\n(.*?)<!-- end -->", README, re.DOTALL)
    page = (ROOT / "docs" / "why-ttd.md").read_text(encoding="utf-8")
    assert table is not None
    for mode, iou in re.findall(r"^\| (?:\*\*)?`(\w+)`(?:[^|]*)\| ([^|]+) \|", table[1], re.MULTILINE):
        assert re.search(rf"^\| `{mode}` \| {re.escape(iou)} \|", page, re.MULTILINE), (mode, iou)


def test_dense_modes_are_measured_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("open_clip", "resvg_py", "peft"):
        pytest.importorskip(package, reason=f"the program needs {package}")
    program = example("dense_modes")
    arguments = ["--out", str(tmp_path / "rows.jsonl"), "--modes", "sclip", "--steps", "1", "--batch-size", "4"]
    rows = program.main([*arguments, "--scenes", "8"])
    assert [(row["mode"], row["arm"]) for row in rows] == [("sclip", arm) for arm in program.ARMS]
    assert rows[0]["metrics"] != rows[2]["metrics"]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    monkeypatch.setattr(program, "measure", None)
    assert program.main([*arguments, "--scenes", "8"]) == rows
    assert "| `sclip` |" in capsys.readouterr().out


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    import numpy as np

    pytest.importorskip("matplotlib", reason="maps and text are drawn with it")
    program = example("make_readme_image")
    image = np.full((27, 36, 3), 90, np.uint8)
    panels = [program.Panel("Photograph", "", image, {})] + [
        program.Panel("Map", "", image, {"cat": share, "canary": 0.5}) for share in (0.0, 0.4, 1.0)
    ]
    wide, narrow = program.draw(panels, 4, 880, 14), program.draw(panels, 2, 440, 14)
    assert wide.width == 880 and narrow.width == 440 and narrow.height > wide.height
    program.save(wide, tmp_path / "wide.jpg")
    assert (tmp_path / "wide.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_the_objects_of_the_picture_are_in_its_masks() -> None:
    masks = example("make_readme_image").object_masks()
    assert set(masks) == {"cat", "canary"}
    assert masks["cat"].sum() > masks["canary"].sum() > 500 and not (masks["cat"] & masks["canary"]).sum() > 500
