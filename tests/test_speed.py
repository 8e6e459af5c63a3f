"""Every fast path gives what the step that shares nothing gives, and costs the operations that it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'open_clip'")
pytest.importorskip("transformers", reason="needs the extra 'siglip'")
pytest.importorskip("peft", reason="needs the extra 'lora'")

import torch
from helpers_compiling import compile_counted
from helpers_eva_clip import KINDS, eva_clip
from helpers_full_size import BACKBONES, _simple_tokenizer
from helpers_open_clip import tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from toy_backbone import toy

import ttd_plugins.method.text_embeddings as texts_module
from ttd_plugins import TTD, wrap
from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.benchmark.unshared_baseline import unshared_losses
from ttd_plugins.engine import TTDOutput
from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.method.text_embeddings import (
    TextEmbeddingCache,
    TokenCache,
    checkpointed_text_blocks,
    encode_texts,
    plan_chunks,
)

CAPTIONS = [
    "a brown dog and a black cat on the wet grass",
    "dog",
    "two children fly a kite over the beach near an old wooden boat while the sun sets behind the hills",
    "a brown dog and a black cat on the wet grass",
    "of the",
    "the cat and a kite",
]


def small(kind: str, dense: str | None = None) -> DenseAdapter:
    """A small model of a kind of backbone; ``KIND/avg`` averages its patches."""
    name, _, pool = kind.partition("/")
    options: dict[str, Any] = {} if dense is None else {"dense": dense}
    if pool and name == "open_clip":
        text = {"context_length": 77, "vocab_size": 49408}
        return wrap(tiny_clip(text=text, vision={"pool_type": "avg"}), tokenizer=_simple_tokenizer(), **options)
    if pool:
        text = {"context_length": 77, "vocab_size": 49408}
        model = eva_clip(KINDS["eva02_base"] | {"global_pool": "avg"}, text=text)
        return wrap(model, tokenizer=_simple_tokenizer(), **options)
    backbone = BACKBONES[name]
    return wrap(backbone.build(False), tokenizer=backbone.tokenizer(), **options)


def watched(adapter: DenseAdapter) -> DenseAdapter:
    """The same with a hook on every module, which keeps adapters from running blocks part by part."""
    for module in adapter.model.modules():
        module.register_forward_pre_hook(lambda *_: None)
    return adapter


def gradients(adapter: DenseAdapter, loss: Tensor) -> dict[str, Tensor]:
    adapter.zero_grad(set_to_none=True)
    loss.backward()
    named = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    assert named
    return named


def expect_the_unshared_step(adapter: DenseAdapter, images: Tensor) -> None:
    ttd = TTD(adapter)
    output = ttd(images, CAPTIONS)
    # Selection is a step function: a score at the threshold would be a matter of rounding.
    scores, index = output.alignment.scores.detach(), output.alignment.candidates.image_index
    for image in range(len(CAPTIONS)):
        own = scores[index == image]
        if len(own) > 1:
            ranks = (own - own.min()) / (own.max() - own.min())
            assert float((ranks - 0.5).abs().min()) > 1e-5
    ours = gradients(adapter, output.loss)
    flags = {name: p.requires_grad for name, p in adapter.named_parameters()}
    plain = watched(adapter)
    expected = unshared_losses(plain, images, CAPTIONS, output.alignment.candidates.tags)
    for name, value in output.losses.items():
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected["loss"], atol=1e-5, rtol=1e-5)
    theirs = gradients(plain, expected["loss"])
    assert flags == {name: p.requires_grad for name, p in adapter.named_parameters()}
    # A mask leaves zeros where the value path leaves nothing.
    names = ours.keys() | theirs.keys()
    assert all(not theirs[name].any() for name in theirs.keys() - ours.keys())
    zero = torch.zeros(())
    difference = sum(float((ours.get(n, zero) - theirs.get(n, zero)).square().sum()) for n in names) ** 0.5
    assert difference <= 1e-4 * sum(float(value.square().sum()) for value in theirs.values()) ** 0.5


def images_of(adapter: DenseAdapter, seed: int = 0) -> Tensor:
    height, width = adapter.description.image_size
    return torch.randn(len(CAPTIONS), 3, height, width, generator=torch.Generator().manual_seed(seed))


def with_lora(adapter: DenseAdapter) -> DenseAdapter:
    adapter.add_lora(3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [*(name for name in BACKBONES if name != "siglip2"), "open_clip/avg", "eva/avg"])
def test_a_step_equals_the_one_that_shares_nothing(kind: str, lora: bool) -> None:
    adapter = small(kind)
    adapter = with_lora(adapter) if lora else adapter
    expect_the_unshared_step(adapter, images_of(adapter))


MODES = [
    ("open_clip", "value_only"),
    ("open_clip/avg", "value_only"),
    ("open_clip/avg", "sclip"),
    ("open_clip/avg", "plain"),
    ("eva/avg", "value_only"),
    ("siglip", "value,last_block=value"),
    ("transformers_siglip", "value,last_block=value"),
    ("original_vit", "value_only"),
]


@pytest.mark.parametrize(("kind", "dense"), MODES)
def test_other_dense_modes_equal_the_one_that_shares_nothing(kind: str, dense: str) -> None:
    adapter = small(kind, dense)
    expect_the_unshared_step(adapter, images_of(adapter))


# Texts ---------------------------------------------------------------------------------------------------------------


def cost(chunks: list[list[int]], lengths: list[int], call_cost: int) -> int:
    return sum(len(chunk) * max(lengths[number] for number in chunk) + call_cost for chunk in chunks)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(0, 40))
def test_chunks_hold_every_text_once_and_no_other_split_of_sorted_texts_costs_less(
    lengths: list[int], call_cost: int
) -> None:
    chunks = plan_chunks(lengths, call_cost)
    assert sorted(number for chunk in chunks for number in chunk) == list(range(len(lengths)))
    assert all(chunk == sorted(chunk) for chunk in chunks)
    ordered = sorted(range(len(lengths)), key=lambda number: lengths[number])
    least = min(
        cost(split, lengths, call_cost) for bits in range(2 ** (len(lengths) - 1)) for split in [_split(ordered, bits)]
    )
    assert cost(chunks, lengths, call_cost) == least


def _split(ordered: list[int], bits: int) -> list[list[int]]:
    parts = [[ordered[0]]]
    for place, number in enumerate(ordered[1:]):
        if bits >> place & 1:
            parts.append([])
        parts[-1].append(number)
    return parts


def test_texts_are_encoded_in_chunks_and_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttd_plugins.method.text_embeddings.CPU_CALL_COST", 3)
    backbone = toy(dtype=torch.float64)
    texts = ["dog", "a b c d e", "cat", "dog", "f g h i j k", "owl", "hen", "a b c d e"]
    embeddings, truncated = encode_texts(backbone, texts)
    assert [tuple(ids.shape) for ids in backbone.texts] == [(4, 2), (2, 7)]
    assert truncated == [False] * len(texts)
    for embedding, text in zip(embeddings, texts, strict=True):
        torch.testing.assert_close(embedding, encode_texts(backbone, [text])[0][0])


@given(st.integers(1, 5000), st.integers(1, 77))
def test_a_gpu_is_given_few_shapes_and_little_more_than_there_is(count: int, length: int) -> None:
    assert texts_module._padded_shape(count, length, 77, torch.device("cpu")) == (count, length)
    padded, padded_length = texts_module._padded_shape(count, length, 77, torch.device("cuda"))
    assert count <= padded <= 1.125 * count
    assert length <= padded_length <= min(length + 7, 77)
    assert texts_module._padded_shape(padded, padded_length, 77, torch.device("cuda")) == (padded, padded_length)


def test_shapes_are_no_more_than_nine_to_an_octave() -> None:
    shapes = {texts_module._padded_shape(count, 5, 77, torch.device("cuda")) for count in range(512, 1024)}
    assert len(shapes) <= 9


@pytest.mark.parametrize("kind", ["open_clip", "siglip"])
def test_texts_that_fill_a_shape_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small(kind)
    texts = list(dict.fromkeys(CAPTIONS))
    parameters = [p for _, p in adapter.tower_parameters("text")]

    def embeddings_and_gradients() -> list[Tensor]:
        embeddings, truncated = encode_texts(adapter, texts)
        assert len(embeddings) == len(truncated) == len(texts)
        weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad((embeddings * weights).sum(), parameters, allow_unused=True)
        return [embeddings, *(gradient for gradient in found if gradient is not None)]

    expected = embeddings_and_gradients()
    monkeypatch.setattr(
        texts_module, "_padded_shape", lambda count, length, context, _: (count + 3, min(length + 5, context))
    )
    for ours, theirs in zip(embeddings_and_gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def kept_for_backward(ttd: TTD, images: Tensor) -> tuple[TTDOutput, int]:
    """A step's output, and the numbers that autograd holds when its backward pass begins."""
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = ttd(images, CAPTIONS)
    weights = {parameter.untyped_storage().data_ptr() for parameter in ttd.parameters()}
    return output, sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in weights)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("kind", ["open_clip", "siglip", "transformers_siglip", "transformers_clip"])
def test_texts_computed_twice_give_the_same_step_and_hold_less(kind: str, lora: int) -> None:
    adapter = small(kind)
    if lora:
        adapter.add_lora(lora)
    images = torch.randn(len(CAPTIONS), 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True, None):
        adapter.zero_grad()
        output, held = kept_for_backward(TTD(adapter, text_activation_checkpointing=recompute), images)
        output.loss.backward()
        gradients = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
        results.append((output.loss.detach(), torch.cat(gradients), held))
    (loss, gradient, held), *others = results
    for other, other_gradient, _ in others:
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    padded = adapter.description.text_needs_full_context
    assert results[1][2] < (0.8 if padded else 1) * held
    assert results[2][2] == results[1 if padded else 0][2]
    assert not any("forward" in vars(module) for module in adapter.model.modules())


def test_dropout_of_texts_computed_twice_is_drawn_once() -> None:
    adapter = small("siglip")
    adapter.add_lora(2, dropout=0.5)
    trained = [p for _, p in adapter.tower_parameters("text") if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1, generator=generator)
    adapter.train()
    texts = list(dict.fromkeys(CAPTIONS))
    weights = torch.randn(len(texts), adapter.description.embedding_width, generator=generator)

    def gradients_of(encode: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad((encode() * weights).sum(), trained))

    found = gradients_of(lambda: encode_texts(adapter, texts, activation_checkpointing=True)[0])
    expected = gradients_of(lambda: encode_texts(adapter, texts)[0])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def calls_of(blocks: list[torch.nn.Module], function: Callable[[], Tensor]) -> list[int]:
    """How often each block runs in the forward and the backward pass of a function, in training mode."""
    calls = [0] * len(blocks)

    def counted(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            calls[number] += 1
            return forward(*arguments, **options)

        return run

    own = [block.forward for block in blocks]
    for number, block in enumerate(blocks):
        block.forward = counted(number, block.forward)  # type: ignore[method-assign]
    try:
        function().sum().backward()
    finally:
        # Counting stands in the object, as other libraries' wrappers do, and must be there still.
        assert all("forward" in vars(block) for block in blocks)
        for block, forward in zip(blocks, own, strict=True):
            block.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_every_family_names_the_blocks_of_its_text_tower(kind: str) -> None:
    adapter = small(kind)
    adapter.train()
    blocks = adapter.tower_blocks("text")
    images = adapter.tower_blocks("image")
    own = {id(p) for _, p in adapter.tower_parameters("image")}
    assert bool(images) == (kind != "original_resnet") and all(
        id(p) in own for block in images for p in block.parameters()
    )
    if kind.startswith("original"):
        assert blocks == []
        return
    owned = {id(p) for _, p in adapter.tower_parameters("text")}
    assert blocks and all(id(p) in owned for block in blocks for p in block.parameters())
    texts = list(dict.fromkeys(CAPTIONS))
    once = calls_of(blocks, lambda: encode_texts(adapter, texts)[0])
    twice = calls_of(blocks, lambda: encode_texts(adapter, texts, activation_checkpointing=True)[0])
    assert sum(once) > 0 and twice == [2 * calls for calls in once]


@pytest.mark.parametrize("kind", ["siglip", "transformers_siglip", "transformers_clip"])
def test_blocks_that_are_checkpointed_already_run_no_third_time(kind: str) -> None:
    adapter = small(kind)
    adapter.train()
    adapter.set_grad_checkpointing()
    texts = list(dict.fromkeys(CAPTIONS))
    blocks = adapter.tower_blocks("text")
    calls = calls_of(blocks, lambda: encode_texts(adapter, texts, activation_checkpointing=True)[0])
    assert max(calls) == max(calls_of(blocks, lambda: encode_texts(adapter, texts)[0]))


@pytest.mark.parametrize("kind", ["siglip", "transformers_siglip"])
def test_checkpointing_of_the_image_tower_alone_leaves_texts_computed_twice(kind: str) -> None:
    adapter = small(kind)
    adapter.train()
    adapter.set_grad_checkpointing()
    for tower in (adapter.model.text.transformer if kind == "siglip" else adapter.model.text_model,):
        for module in tower.modules():
            for switch in ("grad_checkpointing", "gradient_checkpointing"):
                if getattr(module, switch, False):
                    setattr(module, switch, False)
    texts = list(dict.fromkeys(CAPTIONS))
    calls = calls_of(
        adapter.tower_blocks("text"), lambda: encode_texts(adapter, texts, activation_checkpointing=True)[0]
    )
    assert max(calls) == 2


def test_text_blocks_that_somebody_compiled_are_computed_twice_all_the_same() -> None:
    adapter = small("siglip")
    texts = list(dict.fromkeys(CAPTIONS))
    blocks = adapter.tower_blocks("text")
    since = compile_counted(blocks)
    compiled = [block._compiled_call_impl for block in blocks]
    encode_texts(adapter, texts)[0].sum().backward()
    once = since()
    encode_texts(adapter, texts, activation_checkpointing=True)[0].sum().backward()
    assert once > 0 and since() == 2 * once
    assert [block._compiled_call_impl for block in blocks] == compiled


@pytest.mark.parametrize("tag_weight", [0.0, 1.0])
def test_texts_come_first_where_they_are_computed_twice(tag_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small("siglip")
    asked: list[str] = []
    for name in ("encode_image", "encode_text"):
        own = getattr(adapter, name)
        monkeypatch.setattr(
            adapter, name, lambda *a, _own=own, _name=name, **o: (asked.append(_name), _own(*a, **o))[1]
        )
    images = torch.randn(len(CAPTIONS), 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    held = []
    for recompute in (False, True):
        asked.clear()
        ttd = TTD(adapter, text_activation_checkpointing=recompute, tag_weight=tag_weight)
        output, kept = kept_for_backward(ttd, images)
        assert output.loss.requires_grad
        held.append(kept)
        assert (asked[0], asked[-1]) == (
            ("encode_text", "encode_image") if recompute else ("encode_image", "encode_text")
        )
    assert held[1] < held[0]


def test_a_tensor_that_is_on_a_device_already_is_not_pinned() -> None:
    there = torch.zeros(2, device="meta")
    assert texts_module.on_device(there, torch.device("meta")) is there


def test_a_call_costs_a_gpu_fewer_tokens_the_larger_the_tower_is(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small("open_clip")
    assert texts_module._call_cost(adapter) == texts_module.CPU_CALL_COST
    monkeypatch.setattr(type(adapter), "device", torch.device("cuda"))
    weights = sum(p.numel() for block in adapter.tower_blocks("text") for p in block.parameters())
    assert texts_module._call_cost(adapter) == int(texts_module.GPU_CALL_WORK / weights)


def test_a_tower_without_blocks_cannot_be_computed_twice() -> None:
    assert toy().tower_blocks("text") == []
    with pytest.raises(UnsupportedModelError, match="=True needs the blocks of the text tower"):
        TTD(toy(), text_activation_checkpointing=True)


def test_a_failure_leaves_the_blocks_as_they_were() -> None:
    adapter = small("siglip")
    with pytest.raises(ZeroDivisionError), checkpointed_text_blocks(adapter):
        1 / sum("forward" not in vars(block) for block in adapter.tower_blocks("text"))
    assert not any("forward" in vars(block) for block in adapter.tower_blocks("text"))


def freeze_text(adapter: DenseAdapter) -> DenseAdapter:
    for _, parameter in adapter.tower_parameters("text"):
        parameter.requires_grad_(False)
    return adapter


def encoded(adapter: DenseAdapter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the text tower from now on."""
    rows: list[int] = []
    own = type(adapter).encode_text
    monkeypatch.setattr(
        type(adapter), "encode_text", lambda self, ids, *more: (rows.append(len(ids)), own(self, ids, *more))[1]
    )
    return rows


@pytest.mark.parametrize("kind", ["open_clip", "siglip", "transformers_clip"])
def test_a_frozen_text_tower_is_asked_once_for_each_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = freeze_text(small(kind))
    images = torch.randn(len(CAPTIONS), 3, *adapter.description.image_size, generator=torch.Generator().manual_seed(0))
    results = []
    for remembered in (0, 1000):
        ttd = TTD(adapter, text_cache_size=remembered)
        rows = encoded(adapter, monkeypatch)
        for order in (range(6), range(5, -1, -1)):
            adapter.zero_grad()
            output = ttd(images[list(order)], [CAPTIONS[number] for number in order])
            output.loss.backward()
        gradients = [p.grad.flatten() for _, p in adapter.tower_parameters("image") if p.grad is not None]
        results.append((output.loss.detach(), torch.cat(gradients), sum(rows)))
        monkeypatch.undo()
    (loss, gradient, asked), (kept_loss, kept_gradient, kept_asked) = results
    torch.testing.assert_close(kept_loss, loss, atol=1e-5, rtol=1e-5)
    assert (kept_gradient - gradient).norm() <= 1e-4 * gradient.norm()
    assert kept_asked * 2 == asked


def test_the_frozen_teacher_is_asked_once_for_each_text_and_a_moving_one_every_time() -> None:
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for teacher, times in (("frozen", 1), ("ema", 2)):
        backbone = toy(3)
        ttd = TTD(backbone, teacher=teacher, text_cache_size=1000)
        assert ttd.teacher is not None
        ttd.train()
        ttd.teacher.forget()
        outputs = []
        for _ in range(2):
            outputs.append(ttd(images, CAPTIONS).loss)
            with torch.no_grad():
                for parameter in backbone.parameters():
                    parameter.add_(0.01)
        asked = sum(len(ids) for ids in ttd.teacher.texts)
        assert asked == times * len({text for call in ttd.teacher.tokenized for text in call})
        plain = TTD(toy(3), teacher=teacher)
        torch.testing.assert_close(outputs[0], plain.train()(images, CAPTIONS).loss, atol=1e-6, rtol=1e-6)


def test_what_a_tower_said_is_forgotten_when_it_changes_and_when_there_is_no_room() -> None:
    adapter = freeze_text(small("open_clip"))
    memory = TextEmbeddingCache(4)

    def agrees() -> None:
        found, truncated = memory.encode(adapter, CAPTIONS)
        expected, expected_truncated = encode_texts(adapter, CAPTIONS)
        assert not found.requires_grad
        assert truncated == expected_truncated
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)

    agrees()
    assert len(memory) == 4
    with torch.no_grad():
        next(p for _, p in adapter.tower_parameters("text") if p.ndim > 1).mul_(1.5)
    agrees()
    adapter.double()
    agrees()
    with torch.inference_mode():
        memory.encode(adapter, CAPTIONS)
    assert len(memory) == 0
    next(p for _, p in adapter.tower_parameters("text")).requires_grad_(True)
    assert memory.encode(adapter, CAPTIONS)[0].requires_grad
    assert len(memory) == 0


def test_a_tag_is_tokenized_once_and_a_caption_every_time() -> None:
    backbone = toy()
    backbone.tokenizer = object()
    memory = TokenCache(limit=3, longest=9)
    plain = toy()

    def asked(texts: list[str]) -> list[str]:
        before = len(backbone.tokenized)
        found, expected = memory.tokenize(backbone, texts), plain.tokenize(texts)
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.lengths, expected.lengths)
        assert (found.ids.dtype, found.lengths.dtype) == (expected.ids.dtype, expected.lengths.dtype)
        assert found.truncated == expected.truncated
        return [text for call in backbone.tokenized[before:] for text in call]

    long, words = "a caption of some words", "a " * backbone.description.context_length
    assert asked(["dog", "wet grass", long]) == ["dog", "wet grass", long]
    assert asked([long, "wet grass", words, "dog"]) == [long, words]
    # The one that was not used for longest gives way.
    assert asked(["cat", "owl"]) == ["cat", "owl"] and len(memory) == 3
    assert asked(["dog", "wet grass"]) == ["wet grass"]
    backbone.tokenizer = object()
    assert asked(["dog"]) == ["dog"] and asked(["dog"]) == []
    del backbone.tokenizer
    assert asked(["dog"]) == ["dog"] and asked(["dog"]) == ["dog"]


def test_a_batch_of_many_tags_is_encoded_in_two_calls() -> None:
    backbone = small("open_clip")
    lengths = []
    own = backbone.encode_text
    backbone.encode_text = lambda ids: (lengths.append(tuple(ids.shape)), own(ids))[1]  # type: ignore[method-assign]
    tags = "red blue green dog cat horse bird sun moon car bus train".split() * 4
    captions = [" ".join(tags[i : i + 12]) for i in range(12)]
    TTD(backbone)(torch.zeros(12, 3, 32, 32), captions)
    assert lengths == [(12, 3), (12, 14)]


# Operations ----------------------------------------------------------------------------------------------------------


def operations(function: Any) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def deep(width: int = 64) -> DenseAdapter:
    """A model whose towers stand to each other about as those of ViT-B/16 do: many image tokens, few text tokens."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
    vision = {"width": width, "layers": 6, "image_size": 112, "head_width": 16}
    return wrap(tiny_clip(text=text, vision=vision), tokenizer=_simple_tokenizer())


def test_the_operations_of_a_step_are_about_those_of_a_contrastive_step() -> None:
    from ttd_plugins.benchmark.step_variants import Bench, BenchOptions

    bench = Bench(BenchOptions("open_clip:small", batch_size=4), adapter=deep())
    found = {name: bench.count(name) for name in ("contrastive", "contrastive_trimmed", "ttd", "unshared", "dense",
                                                  "encode_image")}  # fmt: skip
    assert found["ttd"] <= found["contrastive"]
    assert found["ttd"] <= 1.25 * found["contrastive_trimmed"]
    assert found["dense"] <= 1.02 * found["encode_image"]
    assert found["unshared"] >= 1.3 * found["ttd"]


@pytest.mark.parametrize("kind", ["open_clip", "eva02", "transformers_clip", "original_vit"])
def test_value_modes_leave_out_attention_among_patches(kind: str) -> None:
    adapter = small(kind)
    images = images_of(adapter)
    parts = operations(lambda: adapter.encode_image(images))
    if kind != "transformers_clip":
        masked = operations(lambda: watched(adapter).encode_image(images))
        assert parts < masked
    plain = small(kind, "plain")
    assert parts < operations(lambda: plain.encode_image(images))


def test_dense_features_of_siglip_share_the_head_with_the_pooled_embedding() -> None:
    adapter = small("siglip")
    images = images_of(adapter)
    both, dense = (operations(lambda p=p: adapter.encode_image(images, pooled=p)) for p in (True, False))
    apart = operations(lambda: watched(adapter).encode_image(images))
    assert dense < both < apart


def library_texts(adapter: DenseAdapter, ids: Tensor) -> Tensor:
    model: Any = adapter.model
    if not hasattr(model, "get_text_features"):
        return model.encode_text(ids)
    return model.get_text_features(input_ids=ids).pooler_output


def text_gradients(adapter: DenseAdapter, embeddings: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    return gradients(adapter, (embeddings * weights).sum())


# LoRA of ours on fused attention is read by the original package's forward too; peft's on separate projections as well.
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "kind", ["transformers_clip", "original_vit", "original_resnet", "transformers_siglip", "siglip"]
)
def test_the_last_text_block_at_one_position_is_exact(kind: str, lora: bool, checkpointing: bool) -> None:
    adapter = small(kind)
    adapter = with_lora(adapter) if lora else adapter
    adapter.set_grad_checkpointing(checkpointing)
    adapter.model.train()
    ids = adapter.tokenize(CAPTIONS).ids
    ours = adapter.encode_text(ids)
    expected = library_texts(adapter, ids)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    mine, theirs = text_gradients(adapter, ours), text_gradients(adapter, expected)
    assert mine.keys() == theirs.keys()
    difference = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine) ** 0.5
    assert difference <= 1e-4 * sum(float(value.square().sum()) for value in theirs.values()) ** 0.5


@pytest.mark.parametrize("kind", ["transformers_clip", "original_vit", "transformers_siglip", "siglip"])
def test_the_last_text_block_costs_keys_and_values_alone(kind: str) -> None:
    adapter = small(kind)
    ids = adapter.tokenize(CAPTIONS).ids
    ours = operations(lambda: adapter.encode_text(ids))
    whole = operations(lambda: library_texts(adapter, ids))
    # One of two blocks is left with two of the twelve products of a position, and next to no attention.
    assert ours < 0.65 * whole


# Nothing is waited for, and nothing is kept for nothing --------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses whatever asks a tensor for a number, or for a shape that depends on its values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.REFUSED), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["open_clip", "eva02", "siglip", "original_vit"])
def test_a_step_never_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = small(kind)
    ttd = TTD(adapter)
    images = images_of(adapter)
    own = type(adapter).tokenize

    def outside(self: DenseAdapter, texts: Any) -> Any:
        # Tokens are made on the CPU, whatever the device.
        with torch.utils._python_dispatch._disable_current_modes():
            return own(self, texts)

    monkeypatch.setattr(type(adapter), "tokenize", outside)
    ttd.forward(images, CAPTIONS)
    with NoWaiting():
        loss = ttd(images, CAPTIONS).loss
        loss.backward()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        int(images.max())


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_keeps_no_graph(frozen: str) -> None:
    adapter = small("open_clip")
    for _, parameter in adapter.tower_parameters(frozen):  # type: ignore[arg-type]
        parameter.requires_grad_(False)
    output = TTD(adapter, contrastive_weight=0.0)(images_of(adapter), CAPTIONS)
    assert output.alignment.patches.requires_grad == (frozen == "text")
    assert output.alignment.tags.requires_grad == (frozen == "image")
    assert output.loss.requires_grad


def test_autocast_to_bfloat16_agrees_with_float32() -> None:
    adapter = small("open_clip")
    images, ttd = images_of(adapter), TTD(adapter)
    exact = ttd(images, CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ttd(images, CAPTIONS)
    rough.loss.backward()
    assert rough.alignment.tag_maps.dtype == torch.float32
    torch.testing.assert_close(rough.losses["contrastive"], exact.losses["contrastive"], atol=0.1, rtol=0.1)
    torch.testing.assert_close(rough.alignment.caption_maps, exact.alignment.caption_maps, atol=0.05, rtol=0)
    assert all(bool(torch.isfinite(p.grad).all()) for p in adapter.parameters() if p.grad is not None)


def test_hooks_on_the_last_block_still_see_its_calls() -> None:
    adapter = small("open_clip")
    seen = []
    block: nn.Module = adapter.model.visual.transformer.resblocks[-1]  # type: ignore[union-attr,index,assignment]
    expected = adapter.encode_image(images_of(adapter)).patches
    block.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(adapter.encode_image(images_of(adapter)).patches, expected, atol=1e-5, rtol=1e-5)
    assert seen == [1]
