"""The plain word split: any script, any length, each tag once."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ttd_plugins.errors import InputError
from ttd_plugins.tag_extractors.word_tags import STOP_WORDS, WordTags
from ttd_plugins.tags import TagExtractor, distinct, fold, split_words, unescape_entities, without_symbols

captions = st.text(max_size=80)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t ", []),
        ("...!?", []),
        ("A dog, on grass.", ["A", "dog", "on", "grass"]),
        ("a dog's t-shirt", ["a", "dog's", "t-shirt"]),
        ("dogs' 'quoted' -dash- a--b rock 'n' roll", ["dogs", "quoted", "dash", "a", "b", "rock", "n", "roll"]),
        ("the dog’s T‑shirt", ["the", "dog's", "T-shirt"]),
        ("mother-in-law's", ["mother-in-law's"]),
        ("a mark-\u0301after a joiner", ["a", "mark", "after", "a", "joiner"]),
        ("snake_case a/b #tag @you", ["snake", "case", "a", "b", "tag", "you"]),
        ("4 wheels, 3.5 m", ["4", "wheels", "3", "5", "m"]),
        ("dog🐶cat 🔥 1️⃣ 🇩🇪 👩‍👩‍👧 ☀️ sun", ["dog", "cat", "1", "sun"]),
        ("Café naïve cafe\u0301", ["Café", "naïve", "café"]),
        ("Ein Hündchen läuft über die Straße", ["Ein", "Hündchen", "läuft", "über", "die", "Straße"]),
        ("собака на траве", ["собака", "на", "траве"]),
        ("كلب على العشب", ["كلب", "على", "العشب"]),
        ("हिन्दी में एक कुत्ता", ["हिन्दी", "में", "एक", "कुत्ता"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("หมาบนหญ้า", ["หมาบนหญ้า"]),
        ("一只狗，在草地上。", ["一只狗", "在草地上"]),
        ("犬が芝生の上にいる", ["犬が芝生の上にいる"]),
        ("개가 잔디 위에 있다", ["개가", "잔디", "위에", "있다"]),
        ("A dog &amp; a cat", ["A", "dog", "a", "cat"]),
        (
            "a dog&#39;s &quot;bed&quot;&nbsp;&lt;here&gt; caf&eacute; &#x72AC; &amp;amp;",
            ["a", "dog's", "bed", "here", "café", "犬"],
        ),
        ("AT&T; rock & roll &copy 2 &nosuch; &;", ["AT", "T", "rock", "roll", "copy", "2", "nosuch"]),
        ("sun\u00adflower sun&shy;flower", ["sunflower", "sunflower"]),
        ("\ufeffdog\u2060house \u202bכלב\u202c li\u200eght", ["doghouse", "כלב", "light"]),
        ("e\u00ad\u0301 dog\u200bcat", ["é", "dog", "cat"]),
    ],
)
def test_words_of_any_script(text: str, words: list[str]) -> None:
    assert split_words(text) == [unicodedata.normalize("NFC", word) for word in words]


@given(captions)
@example("-'-")
@example("a\u0301\u200d'b")
def test_a_word_has_a_letter_at_both_ends_and_no_separator_inside(text: str) -> None:
    for word in split_words(text):
        assert unicodedata.category(word[0])[0] in "LN"
        assert word[-1] not in "'-\u200c\u200d"
        assert not any(
            unicodedata.category(character)[0] in "ZCPS" for character in word if character not in "'-\u200c\u200d"
        )
        assert "--" not in word
        assert "''" not in word


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_the_quick_way_for_ascii_gives_what_the_other_gives(text: str) -> None:
    # A letter that is not ASCII, set apart at the end, sends the same text through the general way.
    assert split_words(text) == split_words(text + " é")[:-1]


@given(captions)
def test_no_letter_is_lost(text: str) -> None:
    def letters(of: str) -> list[str]:
        return [character for character in of if unicodedata.category(character)[0] in "LN"]

    plain = "".join(c for c in unescape_entities(text) if unicodedata.category(c) != "Cf")
    assert letters("".join(split_words(text))) == letters(unicodedata.normalize("NFC", plain).replace("ʼ", "'"))


@given(st.lists(captions, max_size=4))
def test_each_tag_comes_once_in_lower_case_and_in_order(texts: list[str]) -> None:
    extractor = WordTags(stop_words=None)
    found = extractor(texts)
    assert len(found) == len(texts)
    for text, tags in zip(texts, found, strict=True):
        words = [fold(word) for word in split_words(text)]
        assert [fold(tag) for tag in tags] == list(dict.fromkeys(fold(word.lower()) for word in split_words(text)))
        assert tags == [tag.lower() for tag in tags]
        assert len({fold(tag) for tag in tags}) == len(tags) <= len(words)
    # A caption's tags do not depend on its neighbours.
    assert found == [extractor([text])[0] for text in texts]


@given(captions)
def test_stop_words_only_take_tags_away(text: str) -> None:
    everything, rest = WordTags(stop_words=None)([text])[0], WordTags()([text])[0]
    assert rest == [tag for tag in everything if fold(tag) not in STOP_WORDS["english"]]


def test_the_default_drops_english_stop_words() -> None:
    caption = "There's a man who isn't in the picture, and his two dogs are lying NEAR an old traffic light"
    assert WordTags()([caption]) == [["man", "picture", "two", "dogs", "lying", "old", "traffic", "light"]]
    assert WordTags()(["of the", "", "It’s on it"]) == [[], [], []]


@pytest.mark.parametrize("word", ["dog", "red", "two", "sitting", "left", "top", "may-pole", "will-power"])
def test_words_that_name_something_are_no_stop_words(word: str) -> None:
    assert WordTags()([word]) == [[word]]


def test_a_case_folded_pair_is_one_tag_in_its_first_spelling() -> None:
    assert WordTags()(["Straße STRASSE strasse Dog dog"]) == [["straße", "dog"]]
    assert distinct(["b", "A", "B", "a", "c"]) == ["b", "A", "c"]


def test_a_caption_of_a_hundred_words_keeps_them_all() -> None:
    words = [f"word{i}" for i in range(100)]
    assert WordTags()([" ".join(words)]) == [words]


@given(captions)
def test_text_without_symbols_is_one_line_with_the_same_words(text: str) -> None:
    plain = without_symbols(text)
    assert plain == " ".join(plain.split())
    assert "🐶" not in without_symbols(text + "🐶")
    assert not any(unicodedata.category(character) in {"So", "Cc", "Cs"} for character in plain)


def test_stop_words_come_from_a_file_or_a_list(tmp_path: Path) -> None:
    file = tmp_path / "stop.txt"
    file.write_text("Hund  ’twas\nKATZE don’t\n", encoding="utf-8")
    for given_words in (file, str(file), ["Hund", "KATZE", "don’t"], {"hund", "katze", "don't"}):
        assert WordTags(stop_words=given_words)(["der hund, die Katze don't"]) == [["der", "die"]]


@pytest.mark.parametrize(
    ("stop_words", "said"),
    [
        ("englsh", "'englsh' are neither a file nor a built-in list; built in: english"),
        (Path("no/such/file"), "are neither a file"),
        (Path(__file__).parent, "cannot be read"),
        ([1], "stop words must be strings, not int"),
    ],
)
def test_stop_words_that_cannot_be_read_are_told(stop_words: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        WordTags(stop_words=stop_words)


def test_a_file_of_stop_words_that_is_no_text_is_told(tmp_path: Path) -> None:
    file = tmp_path / "stop.bin"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read from"):
        WordTags(stop_words=file)


@pytest.mark.parametrize(
    ("captions", "said"), [("a dog", "not one string"), (["a dog", None], "caption 1 is a NoneType, not a string")]
)
def test_captions_of_the_wrong_kind_are_told(captions: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        WordTags()(captions)


def test_it_follows_the_protocol_and_travels_to_workers() -> None:
    extractor = WordTags(stop_words=["dog"])
    assert isinstance(extractor, TagExtractor)
    assert pickle.loads(pickle.dumps(extractor))(["a dog"]) == [["a"]]


def test_it_needs_no_torch() -> None:
    module = "ttd_plugins.tag_extractors.word_tags"
    code = f"import sys; from {module} import WordTags; WordTags()(['a dog']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_word_split_is_importable_from_its_old_module() -> None:
    from ttd_plugins import tags

    with pytest.warns(FutureWarning, match=r"ttd_plugins.tags.WordTags is now ttd_plugins.tag_extractors.word_tags."):
        assert tags.WordTags is WordTags


def test_a_symbol_that_is_escaped_is_one() -> None:
    assert without_symbols("a dog &amp; sun\u00adflower\u200b &hearts; caf&eacute;") == "a dog & sunflower café"


@given(captions)
def test_texts_without_entities_stay(text: str) -> None:
    if "&" not in text or ";" not in text:
        assert unescape_entities(text) is text
