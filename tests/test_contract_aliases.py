"""Old names of the adapter contract and of the engine's results, for one release."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from fakes import FakeAdapter, FakeModel

from ttd_plugins import adapter as contract
from ttd_plugins.adapter import BackboneDescription, DenseAdapter


def test_a_description_is_built_and_read_with_the_old_name_of_a_field() -> None:
    new = FakeAdapter(FakeModel()).description
    values = {field.name: getattr(new, field.name) for field in dataclasses.fields(new)}
    values["text_after_end_matters"] = values.pop("text_needs_full_context")
    with pytest.warns(FutureWarning, match=r"BackboneDescription\(text_after_end_matters=...\) is now "):
        old = BackboneDescription(**values)
    assert old == new
    with pytest.warns(FutureWarning, match=r"is now BackboneDescription.text_needs_full_context;"):
        assert old.text_after_end_matters is True


def test_the_supported_versions_have_an_old_name() -> None:
    with pytest.warns(FutureWarning, match=r"is now ttd_plugins.adapter.SUPPORTED_API_VERSIONS;"):
        assert contract.SPOKEN_API_VERSIONS is contract.SUPPORTED_API_VERSIONS


def tuned(adapter: DenseAdapter) -> torch.Tensor:
    """Change a weight after the snapshot, unload, and return the weight."""
    weight: torch.Tensor = adapter.model.text.weight  # type: ignore[union-attr,assignment]
    with torch.no_grad():
        weight.add_(1)
    adapter.unload()
    return weight


def test_weights_are_snapshot_under_the_old_name_of_the_method() -> None:
    adapter = FakeAdapter(FakeModel())
    before = adapter.model.text.weight.clone()
    with pytest.warns(FutureWarning, match=r"DenseAdapter.remember_weights is now DenseAdapter.snapshot_weights;"):
        adapter.remember_weights()
    assert torch.equal(tuned(adapter), before)


def test_an_adapter_that_overrides_the_old_name_of_the_method_is_called() -> None:
    with pytest.warns(FutureWarning, match=r"OldAdapter.remember_weights is now OldAdapter.snapshot_weights;"):

        class OldAdapter(FakeAdapter):
            calls = 0

            def remember_weights(self) -> None:
                self.calls += 1
                super().remember_weights()

    adapter = OldAdapter(FakeModel())
    before = adapter.model.text.weight.clone()
    with pytest.warns(FutureWarning, match=r"DenseAdapter.remember_weights is now"):
        adapter.snapshot_weights()
    assert adapter.calls == 1
    assert torch.equal(tuned(adapter), before)


def test_an_adapter_that_overrides_the_new_name_is_called_under_the_old_one() -> None:
    class NewAdapter(FakeAdapter):
        calls = 0

        def snapshot_weights(self) -> None:
            self.calls += 1
            super().snapshot_weights()

    adapter = NewAdapter(FakeModel())
    with pytest.warns(FutureWarning, match=r"DenseAdapter.remember_weights is now"):
        adapter.remember_weights()
    assert adapter.calls == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.snapshot_weights()
    assert adapter.calls == 2
