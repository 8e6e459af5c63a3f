"""Texts of the next batch are prepared while the device computes: the step finds no tags and tokenises nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_backbone import ToyAdapter, toy

from ttd_plugins import TTD
from ttd_plugins.errors import TagExtractionError
from ttd_plugins.method.text_embeddings import TokenCache
from ttd_plugins.training.config import OptimizerConfig
from ttd_plugins.training.loop import train_in_memory

LONG = "a brown dog and a black cat on the wet grass of a garden"
BATCHES = [[LONG, "dog"], ["two children and a kite", "cat"], [LONG, "a kite"]]


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def backbone() -> ToyAdapter:
    made = toy(3)
    made.tokenizer = object()
    return made


class Watched(TTD):
    """Notes the calls of extractor and tokenizer within a step."""

    def __init__(self, adapter: ToyAdapter) -> None:
        super().__init__(adapter)
        self.in_step: list[str] = []
        self.found: list[list[str]] = []
        self.stepping = False
        own, tokenize = self.extractor, adapter.tokenize

        def extract(captions: Any) -> Any:
            self.found.append(list(captions))
            if self.stepping:
                self.in_step.append("tags")
            return own(captions)

        def watched_tokenize(texts: Any) -> Any:
            if self.stepping:
                self.in_step += texts
            return tokenize(texts)

        self.extractor = extract  # type: ignore[assignment]
        adapter.tokenize = watched_tokenize  # type: ignore[method-assign]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.stepping = True
        try:
            return super().forward(*arguments, **options)
        finally:
            self.stepping = False


def train(ttd: TTD) -> list[float]:
    settings = OptimizerConfig(learning_rate=1e-2, warm_up=0)
    reports = train_in_memory(ttd, iter([(images(), captions) for captions in BATCHES]), 3, settings)
    return [report.loss for report in reports]


def test_a_step_of_a_training_finds_no_tags_and_tokenises_nothing() -> None:
    ttd = Watched(backbone())
    losses = train(ttd)
    assert ttd.in_step == []
    assert ttd.found == BATCHES
    assert losses[0] == float(TTD(backbone())(images(), BATCHES[0]).loss.detach())


def test_own_loops_prepare_texts_or_leave_it() -> None:
    ttd, plain = TTD(backbone(), template="a photo of a {}"), TTD(backbone(), template="a photo of a {}")
    for captions in BATCHES:
        tags = ttd.prepare_texts(images(), captions)
        assert tags == plain.candidates(images(), captions).tags
        assert torch.equal(ttd(images(), captions, tags).loss, plain(images(), captions).loss)
    own = [["wet grass"], []]
    assert ttd.prepare_texts(images(), BATCHES[0], own) == own


def test_prepared_tokens_of_any_length_serve_the_next_call_and_no_later_one() -> None:
    adapter, cache = backbone(), TokenCache(limit=4, longest=5)
    cache.tokenize_ahead(adapter, [LONG, "dog", LONG])
    before = len(adapter.tokenized)
    found, expected = cache.tokenize(adapter, [LONG, "dog"]), toy(3).tokenize([LONG, "dog"])
    assert len(adapter.tokenized) == before
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.lengths, expected.lengths)
    cache.tokenize_ahead(adapter, ["a kite"])
    cache.tokenize(adapter, [LONG])
    assert adapter.tokenized[-1] == [LONG]
    # Tokens of another tokenizer are of no use.
    cache.tokenize_ahead(adapter, [LONG])
    adapter.tokenizer = object()
    cache.tokenize(adapter, [LONG])
    assert adapter.tokenized[-1] == [LONG]
    del adapter.tokenizer
    cache.tokenize_ahead(adapter, [LONG])
    count = len(adapter.tokenized)
    cache.tokenize(adapter, [LONG])
    assert len(adapter.tokenized) == count + 1


def test_an_extractor_that_fails_on_the_next_batch_fails_in_the_step_of_that_batch() -> None:
    ttd = TTD(backbone())
    own = ttd.extractor

    def fails(captions: Any) -> Any:
        if "cat" in captions:
            raise TagExtractionError("no words")
        return own(captions)

    ttd.extractor = fails  # type: ignore[assignment]
    steps: list[int] = []
    with pytest.raises(TagExtractionError, match="no words"):
        train_in_memory(
            ttd,
            iter([(images(), captions) for captions in BATCHES]),
            3,
            OptimizerConfig(warm_up=0),
            on_step=lambda report: steps.append(report.step),
        )
    assert steps == [1]
