"""Old module names stay importable for one release."""

from __future__ import annotations

import importlib
import sys

import pytest

from ttd_plugins._renamed_modules import RENAMED_MODULES


@pytest.mark.parametrize("old_name", sorted(RENAMED_MODULES))
def test_an_old_name_warns_and_has_the_attributes_of_the_new_modules(old_name: str) -> None:
    names = RENAMED_MODULES[old_name]
    names = (names,) if isinstance(names, str) else names
    if any("torchmetrics" in name for name in names):
        pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    new_modules = [importlib.import_module(name) for name in names]
    sys.modules.pop(old_name, None)
    with pytest.warns(FutureWarning, match=f"{' and '.join(names)}; the old name goes"):
        old_module = importlib.import_module(old_name)
    for new_module in new_modules:
        own = [k for k, v in vars(new_module).items() if getattr(v, "__module__", None) == new_module.__name__]
        public = [name for name in own if not name.startswith("_")]
        assert public or len(names) == 1
        assert all(getattr(old_module, name) is getattr(new_module, name) for name in public)
    public = [name for name in vars(new_modules[0]) if not name.startswith("_")]
    assert public
    assert all(getattr(old_module, name) is getattr(new_modules[0], name) for name in public)


def test_a_module_that_never_existed_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ttd_plugins.similarities")
