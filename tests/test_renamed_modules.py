"""Old module names stay importable for one release."""

from __future__ import annotations

import importlib
import sys

import pytest

from ttd_plugins._renamed_modules import RENAMED_MODULES


@pytest.mark.parametrize("old_name", sorted(RENAMED_MODULES))
def test_an_old_name_warns_and_has_the_attributes_of_the_new_module(old_name: str) -> None:
    new_module = importlib.import_module(RENAMED_MODULES[old_name])
    sys.modules.pop(old_name, None)
    with pytest.warns(FutureWarning, match=f"{RENAMED_MODULES[old_name]}; the old name goes"):
        old_module = importlib.import_module(old_name)
    public = [name for name in vars(new_module) if not name.startswith("_")]
    assert public
    assert all(getattr(old_module, name) is getattr(new_module, name) for name in public)


def test_a_module_that_never_existed_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ttd_plugins.similarities")
