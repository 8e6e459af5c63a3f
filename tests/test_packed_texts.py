"""Texts that are packed into rows have the embeddings and gradients that each has alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import torch
from helpers_full_size import BACKBONES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ttd_plugins.method.text_embeddings as texts_module
from ttd_plugins import wrap
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.packed_texts import ROW_TOKENS, PackedTexts, pack_texts, packed_text_encoder, sorted_texts
from ttd_plugins.testing import check_adapter

CAUSAL = ["open_clip", "eva01", "eva02", "transformers_clip", "original_vit", "original_resnet"]
TEXTS = [
    "a brown dog and a black cat on the wet grass",
    "dog",
    "a brown dog",
    "two children fly a kite over the beach near an old wooden boat while the sun sets behind the hills",
    "Dog",
    "",
    "a brown horse and a black cat",
    *(f"the {word} of number {number}" for number in range(9) for word in ("house", "boat", "tree")),
]


def small(kind: str, lora: bool = False) -> DenseAdapter:
    backbone = BACKBONES[kind]
    adapter = wrap(backbone.build(False), tokenizer=backbone.tokenizer())
    if lora:
        adapter.add_lora(3)
        with torch.no_grad():
            for parameter in adapter.lora_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
    return adapter


def packed(adapter: DenseAdapter, texts: list[str], few_shapes: bool) -> Tensor:
    """Embeddings of distinct texts in their order."""
    encoder = packed_text_encoder(adapter)
    assert encoder is not None
    ids = adapter.tokenize(texts).ids
    positions = encoder.pooling_positions(ids)
    assert positions is not None
    return encoder.encode_packed_texts(pack_texts(sorted_texts(ids, positions), few_shapes=few_shapes))[: len(texts)]


class OfTheRow(PackedTexts):
    """Texts whose mask or positions are those of a row."""

    def additive_mask(self, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        mask = torch.full(self.visible.shape, float("-inf"), dtype=dtype).triu(1)
        return mask if heads is None else mask.repeat_interleave(heads, dim=0)


@pytest.mark.parametrize("kind", ["open_clip", "transformers_clip", "original_vit"])
@pytest.mark.parametrize("fault", ["none", "mask", "positions"])
def test_the_kit_compares_packed_texts(kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind_of = type(small(kind))
    own = kind_of.encode_packed_texts

    def broken(self: Any, made: PackedTexts) -> Tensor:
        if fault == "mask":
            made = OfTheRow(**vars(made))
        elif fault == "positions":
            made = replace(made, positions=torch.arange(made.ids.shape[1]).expand_as(made.ids))
        return own(self, made)

    monkeypatch.setattr(kind_of, "encode_packed_texts", broken)
    report = check_adapter(lambda: small(kind), only=["texts_independent"])
    assert report.failed == ([] if fault == "none" else ["texts_independent"])
    assert fault == "none" or "packed into a row" in str(report)


def gradients(adapter: DenseAdapter, embeddings: Tensor) -> dict[str, Tensor]:
    adapter.zero_grad(set_to_none=True)
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def expect_equal(adapter: DenseAdapter, ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    mine, theirs = gradients(adapter, ours), gradients(adapter, expected)
    assert mine.keys() == theirs.keys() and mine
    difference = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine) ** 0.5
    assert difference <= 1e-4 * sum(float(value.square().sum()) for value in theirs.values()) ** 0.5


@pytest.mark.parametrize("few_shapes", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_texts_have_the_embeddings_and_gradients_of_each_text_alone(
    kind: str, lora: bool, few_shapes: bool
) -> None:
    adapter = small(kind, lora)
    adapter.train()
    texts = list(dict.fromkeys(TEXTS))
    expect_equal(adapter, packed(adapter, texts, few_shapes), adapter.encode_text(adapter.tokenize(texts).ids))


@pytest.mark.parametrize("how", ["hooks", "checkpointing", "eval"])
@pytest.mark.parametrize("kind", ["open_clip", "transformers_clip", "original_vit"])
def test_blocks_that_are_hooked_checkpointed_or_on_torchs_fast_path_agree(kind: str, how: str) -> None:
    adapter = small(kind)
    adapter.train()
    expected = adapter.encode_text(adapter.tokenize(TEXTS).ids)
    if how == "eval":
        with torch.no_grad():
            torch.testing.assert_close(encode_as_given(adapter.eval()), expected, atol=1e-5, rtol=1e-5)
        return
    if how == "hooks":
        for module in adapter.model.modules():
            module.register_forward_pre_hook(lambda *_: None)
    else:
        adapter.set_grad_checkpointing()
    expect_equal(adapter, encode_as_given(adapter), expected)


def encode_as_given(adapter: DenseAdapter) -> Tensor:
    """Embeddings by the engine's function, with the norms of the tower's own."""
    embeddings, _ = encode_texts(adapter, TEXTS)
    norms = adapter.encode_text(adapter.tokenize(TEXTS).ids).norm(dim=-1, keepdim=True)
    return embeddings * norms


@pytest.mark.parametrize("kind", sorted(set(BACKBONES) - set(CAUSAL)))
def test_towers_that_see_later_tokens_are_never_packed(kind: str) -> None:
    adapter = small(kind)
    encoder = packed_text_encoder(adapter)
    assert encoder is None or encoder.pooling_positions(adapter.tokenize(["dog"]).ids) is None


def test_an_override_of_encode_text_is_called() -> None:
    adapter = small("open_clip")
    kind = type(adapter)
    assert packed_text_encoder(adapter) is adapter
    calls: list[int] = []

    class Prompted(kind):  # type: ignore[misc,valid-type]
        def encode_text(self, ids: Tensor) -> Tensor:
            calls.append(len(ids))
            return super().encode_text(ids)

    prompted = Prompted(adapter.model, tokenizer=BACKBONES["open_clip"].tokenizer())
    assert packed_text_encoder(prompted) is None
    encode_texts(prompted, ["dog", "cat"])
    assert calls == [2]
    adapter.encode_text = lambda ids: kind.encode_text(adapter, ids)  # type: ignore[method-assign]
    assert packed_text_encoder(adapter) is None


tokens_of_a_text = st.lists(st.integers(1, 3), min_size=0, max_size=9).map(lambda inner: (0, *inner, 9))


@settings(deadline=None, max_examples=80)
@given(st.lists(tokens_of_a_text, min_size=1, max_size=40), st.booleans(), st.integers(8, 40))
def test_every_token_sees_its_own_text_and_nothing_else(
    texts: list[tuple[int, ...]], few_shapes: bool, row_tokens: int
) -> None:
    ids = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    pooled = torch.tensor([len(text) - 1 for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttd_plugins.packed_texts.ROW_TOKENS", row_tokens)
        made = pack_texts(sorted_texts(ids, pooled), few_shapes=few_shapes)
    check(made, texts)
    # No more tokens than the texts have; every start token but one of each row is shared.
    used = (made.visible.sum(-1) > 1).sum() + len(made.ids)
    assert int(used) <= sum(map(len, texts)) - len(texts) + len(made.ids)
    if few_shapes:
        assert made.ids.shape[1] % 8 == 0 or made.ids.shape[1] == row_tokens
        assert len(texts) <= len(made) <= 1.125 * len(texts)


def check(made: PackedTexts, texts: list[tuple[int, ...]]) -> None:
    """A text is the chain of tokens that its pooled token sees, in the order of their positions."""
    length = made.ids.shape[1]
    slots = made.slot_text.shape[1]
    for number, text in enumerate(texts):
        row, place = divmod(int(made.text_token[number]), length)
        seen = made.visible[row, place].nonzero()[:, 0]
        order = made.positions[row, seen].argsort()
        assert made.ids[row, seen[order]].tolist() == list(text)
        assert made.positions[row, seen[order]].tolist() == list(range(len(text)))
        # An ancestor sees the beginning of the chain, so that it depends on nothing else.
        for depth, token in enumerate(seen[order].tolist()):
            assert sorted(made.visible[row, token].nonzero()[:, 0].tolist()) == sorted(
                seen[order][: depth + 1].tolist()
            )
        slot = divmod(int(made.text_slot[number]), slots)
        assert int(made.slot_text[slot]) == number
        assert int(made.slot_token[slot]) == int(made.text_token[number])
    assert bool((made.slot_token // length == torch.arange(len(made.ids))[:, None]).all())


def test_shapes_on_a_gpu_are_few() -> None:
    shapes = set()
    for count in range(100, 200):
        ids = torch.arange(count)[:, None] * 10 + torch.arange(12)
        ids[:, 0] = 0
        made = pack_texts(sorted_texts(ids, torch.full((count,), 11)), few_shapes=True)
        shapes.add((made.ids.shape, len(made), made.slot_text.shape))
    assert len(shapes) <= 16


def test_texts_longer_than_a_row_have_rows_of_their_length() -> None:
    length = ROW_TOKENS + 60
    ids = torch.arange(length).repeat(3, 1)
    ids[:, 1] = torch.tensor([5, 6, 7])
    for few_shapes in (False, True):
        made = pack_texts(sorted_texts(ids, torch.full((3,), length - 1)), few_shapes=few_shapes)
        check(made, [tuple(row) for row in ids.tolist()])


def test_captions_and_tags_are_one_call_of_fewer_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small("open_clip")
    calls: list[int] = []
    own = type(adapter).encode_packed_texts
    monkeypatch.setattr(
        type(adapter), "encode_packed_texts", lambda self, made: (calls.append(len(made)), own(self, made))[1]
    )

    def operations() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encode_texts(adapter, TEXTS)
        return int(counter.get_total_flops())

    ours = operations()
    assert calls == [len(TEXTS)]
    monkeypatch.setattr(texts_module, "packed_text_encoder", lambda _: None)
    assert ours < operations()


def test_autocast_agrees_with_full_precision() -> None:
    adapter = small("open_clip")
    exact, _ = encode_texts(adapter, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = encode_texts(adapter, TEXTS)
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0)
    similarity: Any = torch.nn.functional.cosine_similarity(rough, exact)
    assert float(similarity.detach().min()) > 0.999
