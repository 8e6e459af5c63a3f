"""The conformance kit on ``perception_encoder:tiny@random``, and on a trunk without a class token."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ttd_perception_encoder", reason="needs: pip install -e examples/ttd-perception-encoder")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")

from helpers_perception_encoder import perception_encoder
from ttd_perception_encoder.tiny import CONTEXT

from ttd_plugins import load, wrap
from ttd_plugins.testing import AdapterConformance


class TestTiny(AdapterConformance):
    family = "perception_encoder"

    def make_adapter(self) -> Any:
        return load("perception_encoder:tiny@random")


class TestNoClassToken(AdapterConformance):
    """As in ``PE-Core-bigG-14-448``, and with a projection after the trunk."""

    family = "perception_encoder"

    def make_adapter(self) -> Any:
        tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
        return wrap(perception_encoder("no_class_token", projection=True), tokenizer=tokenizer)
