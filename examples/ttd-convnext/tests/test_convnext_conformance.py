"""The conformance kit on ``convnext:tiny@random``, and on a trunk whose head is an MLP."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ttd_convnext", reason="needs: pip install -e examples/ttd-convnext")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

from helpers_convnext import convnext_clip

from ttd_plugins import load, wrap
from ttd_plugins.testing import AdapterConformance


class TestTiny(AdapterConformance):
    family = "convnext"

    def make_adapter(self) -> Any:
        return load("convnext:tiny@random")


class TestHeadIsAnMLP(AdapterConformance):
    """As in ``convnext_large_d``: the last step is no linear map of the position, so less of the kit applies."""

    family = "convnext"

    def make_adapter(self) -> Any:
        return wrap(convnext_clip("mlp"), tokenizer=open_clip.SimpleTokenizer(context_length=12))
