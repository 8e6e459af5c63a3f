"""Old names work as before, and their FutureWarning names the new one and the caller."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import warnings
from types import ModuleType

import pytest

from ttd_plugins.utils import deprecation
from ttd_plugins.utils.deprecation import RenamedAttribute, renamed_keyword, renamed_names, warn_renamed


def only_warning(caught: list[warnings.WarningMessage]) -> str:
    (warning,) = caught
    assert warning.category is FutureWarning
    assert warning.filename == __file__, "the warning blames the caller"
    return str(warning.message)


def test_a_warning_names_both_names_and_the_release() -> None:
    def old() -> None:
        warn_renamed("old()", "new()")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old()
    assert only_warning(caught) == "old() is now new(); the old name goes with the next minor release"


class Result:
    figures = RenamedAttribute("metrics")
    shout = RenamedAttribute("speak")

    def __init__(self) -> None:
        self.metrics = {"loss": 1.0}

    def speak(self, word: str) -> str:
        return word.upper()


def test_an_attribute_is_read_and_set_under_its_old_name() -> None:
    result = Result()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert result.figures is result.metrics
    assert only_warning(caught).startswith("Result.figures is now Result.metrics;")
    with pytest.warns(FutureWarning, match="Result.figures is now Result.metrics"):
        result.figures = {}
    assert result.metrics == {}


def test_a_method_is_called_under_its_old_name() -> None:
    with pytest.warns(FutureWarning, match="Result.shout is now Result.speak"):
        assert Result().shout("word") == "WORD"


def test_a_module_resolves_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tests_module_with_old_names")
    module.new_function = len  # type: ignore[attr-defined]
    renamed = {"old_function": "new_function", "moved": "ttd_plugins.utils.deprecation.warn_renamed"}
    module.__getattr__ = renamed_names(module.__name__, renamed)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert module.old_function is len
    assert only_warning(caught).startswith(
        "tests_module_with_old_names.old_function is now tests_module_with_old_names.new_function;"
    )
    with pytest.warns(FutureWarning, match="is now ttd_plugins.utils.deprecation.warn_renamed"):
        assert module.moved is deprecation.warn_renamed
    with pytest.raises(AttributeError, match="module 'tests_module_with_old_names' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("ttd_plugins.data.image_paths", "find_images", "find_image_folder"),
        ("ttd_plugins.data.pair_source", "PackedTexts", "TextArray"),
        ("ttd_plugins.reports.formatting", "printable", "one_line"),
    ],
)
def test_names_that_other_modules_have_too_are_renamed(module: str, old: str, new: str) -> None:
    found = importlib.import_module(module)
    with pytest.warns(FutureWarning, match=rf"{module}\.{old} is now {module}\.{new}"):
        assert getattr(found, old) is getattr(found, new)


@renamed_keyword("most", "limit")
def join(words: list[str], limit: int = 3) -> str:
    return " ".join(words[:limit])


@renamed_keyword("size_of_patch", "patch_size")
@dataclasses.dataclass(frozen=True)
class Description:
    patch_size: int
    name: str = "plain"


def test_a_keyword_is_accepted_under_its_old_name() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert join(["a", "b"], most=1) == "a"
    assert only_warning(caught).startswith("join(most=...) is now join(limit=...);")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert join(["a", "b"], limit=1) == join(["a", "b"], 1) == "a"
    with pytest.raises(TypeError, match=r"join\(\) got both limit and its old name most"):
        join(["a"], limit=1, most=1)


def test_a_dataclass_is_constructed_with_an_old_keyword() -> None:
    with pytest.warns(FutureWarning, match=r"Description\(size_of_patch=...\) is now Description\(patch_size=...\)"):
        old = Description(size_of_patch=8)  # type: ignore[call-arg]
    assert old == Description(8)
    assert dataclasses.replace(old, name="other") == Description(8, "other")
    assert list(inspect.signature(Description).parameters) == ["patch_size", "name"]
