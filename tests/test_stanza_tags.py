"""Nouns through a real Stanza pipeline, from a resources folder that needs no network."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ttd_plugins.errors import InputError, MissingDependencyError, TagExtractionError
from ttd_plugins.plugins import make_tag_extractor
from ttd_plugins.tag_extractors.stanza_tags import StanzaTags
from ttd_plugins.tags import TagExtractor, distinct

RESOURCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stanza"


@pytest.fixture(scope="module")
def resources() -> Path:
    pytest.importorskip("stanza", reason="Stanza is not installed")
    if not (RESOURCES / "resources.json").is_file():
        pytest.skip(f"there are no Stanza models in {RESOURCES}")
    return RESOURCES


@pytest.fixture(scope="module")
def nouns(resources: Path) -> StanzaTags:
    return StanzaTags(resources=resources)


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("A man's dog stands near a traffic light.", ["man", "dog", "traffic light"]),
        ("two well-dressed women in T-shirts play table tennis", ["women", "t-shirts", "table tennis"]),
        ("a close-up of black-and-white ice-cream cones", ["ice-cream cones"]),
        ("a kitchen, with a coffee machine", ["kitchen", "coffee machine"]),
        ("a dog and the Dog", ["dog"]),
        ("a dog\n\na cat", ["dog", "cat"]),
        ("🐶🔥 cute dog🐶 on grass", ["dog", "grass"]),
        ("a man sits at the dog’s house", ["man", "dog", "house"]),
    ],
)
def test_nouns_and_compounds(nouns: StanzaTags, caption: str, tags: list[str]) -> None:
    assert nouns([caption]) == [tags]


@pytest.mark.parametrize("caption", ["", "   ", "\n", "...", "!!! ???", "🐶", "\u200b"])
def test_captions_without_a_word_have_no_tags(nouns: StanzaTags, caption: str) -> None:
    assert nouns([caption, "a dog", caption]) == [[], ["dog"], []]


def test_adjectives_and_single_nouns_are_options(resources: Path) -> None:
    caption = "a small red car near a traffic light"
    assert StanzaTags(resources, adjectives=True)([caption]) == [["small", "red", "car", "traffic light"]]
    assert StanzaTags(resources, compounds=False)([caption]) == [["car", "traffic", "light"]]


def test_every_caption_gets_the_tags_that_it_gets_alone(nouns: StanzaTags) -> None:
    captions = [
        "a woman in a red dress",
        "",
        "a dog\nruns. A cat sleeps!",
        "  two boats  on the sea ",
        "?",
        "a woman in a red dress",
        " ".join(f"dog{i}" if i % 2 else "and a" for i in range(100)),
        "一只狗 in the garden",
    ]
    together = nouns(captions)
    nouns._cache.clear()
    nouns.batch_size, size = 1, nouns.batch_size
    try:
        assert together == nouns(captions)
    finally:
        nouns.batch_size = size
    assert together[2] == ["dog", "cat"]
    assert together[0] == together[5]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=40), max_size=6))
def test_any_text_is_taken_and_stays_with_its_caption(nouns: StanzaTags, texts: list[str]) -> None:
    framed = [item for text in texts for item in (text, "a dog on the grass")]
    found = nouns(framed)
    assert len(found) == len(framed)
    assert all(tags == ["dog", "grass"] for tags in found[1::2])
    assert all(tags == distinct(tags) and all(tags) for tags in found)


def test_captions_are_cached_and_batched(nouns: StanzaTags, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    process = nouns._pipeline.bulk_process
    monkeypatch.setattr(nouns._pipeline, "bulk_process", lambda texts: sizes.append(len(texts)) or process(texts))
    monkeypatch.setattr(nouns, "_cache", {})
    monkeypatch.setattr(nouns, "batch_size", 2)
    monkeypatch.setattr(nouns, "cache_size", 3)
    captions = [f"a photo of a cat and {number} dogs" for number in ("two", "three", "four", "five", "six")]
    first = nouns(captions + captions)
    assert sizes == [2, 2, 1]
    assert len(nouns._cache) == 3
    assert nouns(captions[-3:]) == first[2:5]
    assert sizes == [2, 2, 1]
    assert nouns(captions[:1]) == first[:1]
    assert sizes == [2, 2, 1, 1]


def test_a_caller_may_change_what_it_got(nouns: StanzaTags) -> None:
    nouns(["a boat"])[0].append("changed")
    assert nouns(["a boat"]) == [["boat"]]


def test_it_is_quiet_and_leaves_random_numbers_alone(
    resources: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import stanza

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    level = logging.getLogger("stanza").level
    with caplog.at_level(logging.DEBUG):
        make_tag_extractor("stanza", resources=str(resources))(["a lamp on a desk"])
    assert caplog.records == []
    assert tuple(capfd.readouterr()) == ("", "")
    assert stanza.logger.level == level
    after = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    assert after == (torch.rand(1), random.random(), np.random.rand())


def test_it_follows_the_protocol(nouns: StanzaTags) -> None:
    assert isinstance(nouns, TagExtractor)
    with pytest.raises(InputError, match="not one string"):
        nouns("a dog")


def test_a_failure_inside_stanza_is_one_sentence(nouns: StanzaTags, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(texts: list[str]) -> Any:
        raise RuntimeError("tensor of\nwrong size")

    monkeypatch.setattr(nouns._pipeline, "bulk_process", broken)
    with pytest.raises(
        TagExtractionError, match="batch of 1 captions, the first of them 'a kite': RuntimeError: tensor"
    ):
        nouns(["a kite"])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"cache_size": 0}])
def test_sizes_are_positive(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        StanzaTags(**options)  # type: ignore[arg-type]


# Without models, without Stanza --------------------------------------------------------------------------------------


@pytest.fixture
def stanza() -> Any:
    return pytest.importorskip("stanza", reason="Stanza is not installed")


@pytest.mark.parametrize("how", ["given", "environment"])
def test_models_that_are_absent_are_told_with_their_folder(
    stanza: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder = tmp_path / "models"
    if how == "environment":
        monkeypatch.setenv("STANZA_RESOURCES_DIR", str(folder))
    with pytest.raises(TagExtractionError) as caught:
        StanzaTags(folder if how == "given" else None)
    for part in (str(folder), "download=True", "stanza.download('en'"):
        assert part in str(caught.value)
    assert not folder.exists()


def test_half_of_the_models_is_told(stanza: Any, tmp_path: Path) -> None:
    (tmp_path / "resources.json").write_text('{"en": {"lang_name": "English"}}')
    with pytest.raises(TagExtractionError, match="are not in"):
        StanzaTags(tmp_path)
    (tmp_path / "resources.json").write_text("{")
    with pytest.raises(TagExtractionError, match="are not in"):
        StanzaTags(tmp_path)


def test_models_that_are_broken_are_told(resources: Path, tmp_path: Path) -> None:
    for file in resources.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(resources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes()[:1000] if file.suffix == ".pt" else file.read_bytes())
    with pytest.raises(TagExtractionError, match="cannot be loaded"):
        StanzaTags(tmp_path)


def test_an_unknown_language_is_told(resources: Path) -> None:
    with pytest.raises(TagExtractionError, match="models for 'xx' are not in"):
        StanzaTags(resources, language="xx")


def test_a_download_is_asked_for_only_when_allowed(
    stanza: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def pipeline(language: str, **options: Any) -> Any:
        asked.append((language, options["model_dir"], options["download_method"]))
        raise ConnectionError("no route to host")

    monkeypatch.setattr(stanza, "Pipeline", pipeline)
    with pytest.raises(TagExtractionError, match=r"could not be downloaded to .*: no route to host"):
        StanzaTags(tmp_path, download=True)
    assert asked.pop() == ("en", str(tmp_path), stanza.DownloadMethod.REUSE_RESOURCES)
    (tmp_path / "resources.json").write_text("{}")
    with pytest.raises(TagExtractionError):
        StanzaTags(tmp_path)
    assert asked == [("en", str(tmp_path), None)]


def test_without_stanza_the_module_imports_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stanza", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[stanza\]'"):
        StanzaTags()
    module = "ttd_plugins.tag_extractors.stanza_tags"
    code = f"import sys; import {module}; sys.exit('stanza' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
