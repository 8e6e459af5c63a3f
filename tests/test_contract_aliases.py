"""Old names of the adapter contract and of the engine's results, for one release."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from fakes import FakeAdapter, FakeModel

from ttd_plugins import adapter as contract
from ttd_plugins.adapter import BackboneDescription, DenseAdapter
from ttd_plugins.engine import TTD
from ttd_plugins.method import text_embeddings


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


def test_results_of_the_engine_have_old_names() -> None:
    ttd = TTD(FakeAdapter(FakeModel()))
    output = ttd(torch.randn(2, 3, 32, 32), ["a red dog", "a cat"])
    with pytest.warns(FutureWarning, match=r"TTDOutput.figures is now TTDOutput.device_statistics;"):
        assert output.figures.keys() == output.device_statistics.keys() == output.statistics.keys()
    candidates = output.alignment.candidates
    with pytest.warns(FutureWarning, match=r"Candidates.most is now Candidates.max_tags;"):
        assert candidates.most == candidates.max_tags == 2


def test_text_encoding_has_old_names() -> None:
    adapter = FakeAdapter(FakeModel())
    with pytest.warns(FutureWarning, match=r"encode_texts\(activation_checkpointing=...\)"):
        old, _ = text_embeddings.encode_texts(adapter, ["a dog"], recompute=False)  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match=r"encode_texts\(token_cache=...\)"):
        text_embeddings.encode_texts(adapter, ["a dog"], memory=None)  # type: ignore[call-arg]
    assert torch.equal(old, text_embeddings.encode_texts(adapter, ["a dog"])[0])
    with pytest.warns(FutureWarning, match=r"TextMemory is now ttd_plugins.method.text_embeddings.TextEmbeddingCache"):
        assert text_embeddings.TextMemory is text_embeddings.TextEmbeddingCache
