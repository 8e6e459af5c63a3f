"""LoRA in open_clip models: exact, inside the dense features, and gone without a trace."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import peft
import pytest
import torch
from helpers_open_clip import (
    EMBED,
    WordTokenizer,
    assert_unchanged,
    cosine_gap,
    pixels,
    snapshot,
    tiny_clip,
    token_rows,
)
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from ttd_open_clip.adapter import OpenCLIPAdapter
from ttd_open_clip.attention_lora import LoRAOpenClipAttention

from ttd_plugins.errors import InputError, MissingDependencyError, TTDError, UnsupportedModelError
from ttd_plugins.lora import attach_lora
from ttd_plugins.toolkit.attention_lora import LoRAMultiheadAttention
from ttd_plugins.toolkit.dense_modes import PRESETS

BUILDS: dict[str, dict[str, Any]] = {
    "inlined": {},
    "custom_text": {"custom_text": True},
    "own_attention": {"vision": {"block_type": "custom"}, "text": {"block_type": "custom"}},
}


def with_lora(*, dense: str = "maskclip", rank: int = 3, build: str = "inlined", **options: Any) -> OpenCLIPAdapter:
    """An adapter whose LoRA is away from its initial zero."""
    adapter = OpenCLIPAdapter(tiny_clip(**BUILDS[build]), tokenizer=WordTokenizer(), dense=dense)
    adapter.add_lora(rank, **options)
    return shake(adapter)


def shake(adapter: OpenCLIPAdapter, seed: int = 3) -> OpenCLIPAdapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.lora_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def features(adapter: OpenCLIPAdapter) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        image = adapter.encode_image(pixels(2, 24, 40))
        return {
            "patches": image.patches,
            "pooled": image.pooled,
            "text": adapter.encode_text(token_rows([3, 6, 12])),
            "trimmed": adapter.encode_text(token_rows([3, 6])[:, :6]),
        }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, atol=atol, rtol=min(1e-5, atol), msg=lambda text, name=name: f"{name}: {text}"
        )


def attention() -> tuple[nn.MultiheadAttention, LoRAMultiheadAttention]:
    torch.manual_seed(0)
    base = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(base.in_proj_bias)
    nn.init.normal_(base.out_proj.bias)
    layer = LoRAMultiheadAttention(base, "default", r=2, lora_alpha=4, config=peft.LoraConfig(r=2, lora_alpha=4))
    return base, layer


def lora_of(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def matrix(layer: nn.Module, letter: str, name: str) -> nn.Parameter:
    return getattr(layer, f"lora_{letter}_{name}")["default"].weight


# The layer -----------------------------------------------------------------------------------------------------------

MASKS = {
    "none": lambda n, heads, length: None,
    "causal": lambda n, heads, length: torch.full((length, length), float("-inf")).triu(1),
    "boolean": lambda n, heads, length: torch.ones(length, length).triu(1).bool(),
    "three_dimensional": lambda n, heads, length: torch.randn(n * heads, length, length),
    "three_dimensional_boolean": lambda n, heads, length: torch.eye(length).bool().expand(n * heads, length, length),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_before_training_the_layer_is_multihead_attention(mask: str, batch_first: bool) -> None:
    base, layer = attention()
    base.batch_first = batch_first
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    attn_mask = MASKS[mask](3, 4, 5)
    expected = base(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
    out, weights = layer(x, x, x, need_weights=False, attn_mask=attn_mask)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert weights is None


def test_each_projection_has_matrices_of_its_own() -> None:
    base, layer = attention()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in lora_of(layer):
            nn.init.normal_(parameter)
        for i, name in enumerate("qkv"):
            delta = matrix(layer, "B", name) @ matrix(layer, "A", name) * 2
            expected.in_proj_weight[16 * i : 16 * (i + 1)] += delta
        expected.out_proj.weight += matrix(layer, "B", "out") @ matrix(layer, "A", "out") * 2
        x = torch.randn(2, 5, 16)
        mask = torch.full((5, 5), float("-inf")).triu(1)
        out = layer(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(out, expected(x, x, x, need_weights=False, attn_mask=mask)[0], atol=1e-4, rtol=1e-4)


def test_merging_and_unmerging_by_pefts_verbs() -> None:
    base, layer = attention()
    for parameter in lora_of(layer):
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 16)
    original = base.in_proj_weight.detach().clone()
    storage = base.in_proj_weight.data_ptr()
    with torch.no_grad():
        before = layer(x, x, x, need_weights=False)[0]
        layer.merge(safe_merge=True)
        assert layer.merged
        assert base.in_proj_weight.data_ptr() == storage
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], before, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(base(x, x, x, need_weights=False)[0], before, atol=1e-5, rtol=1e-5)
        layer.unmerge()
        torch.testing.assert_close(base.in_proj_weight, original, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], before, atol=1e-5, rtol=1e-5)
        layer.enable_adapters(False)
        off = layer(x, x, x, need_weights=False)[0]
        assert not torch.allclose(off, before, atol=1e-3)
        torch.testing.assert_close(off, base(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)


def test_an_unsound_merge_is_refused_and_changes_nothing() -> None:
    base, layer = attention()
    original = base.in_proj_weight.detach().clone()
    matrix(layer, "A", "k").data[0, 0] = float("nan")
    matrix(layer, "B", "k").data.fill_(1)
    with pytest.raises(TTDError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.in_proj_weight, original)
    assert not layer.merged


def test_dropout_works_while_training_only() -> None:
    base = nn.MultiheadAttention(16, 4, batch_first=True)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5)
    layer = LoRAMultiheadAttention(base, "default", r=4, lora_alpha=8, config=config)
    for parameter in lora_of(layer):
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        layer.train()
        assert not torch.allclose(layer(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])
        layer.eval()
        assert torch.equal(layer(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"need_weights": True}, "need_weights=False"),
        ({"key": torch.zeros(2, 5, 16)}, "self-attention"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, "key_padding_mask"),
        ({"is_causal": True}, "is_causal"),
    ],
)
def test_what_the_layer_does_not_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, layer = attention()
    x = torch.zeros(2, 5, 16)
    given = {"query": x, "key": x, "value": x, "need_weights": False} | arguments
    with pytest.raises(UnsupportedModelError, match=message):
        layer(**given)


def test_the_layer_takes_batches_only() -> None:
    _, layer = attention()
    x = torch.zeros(5, 16)
    with pytest.raises(UnsupportedModelError, match="must have shape"):
        layer(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    "base",
    [
        nn.MultiheadAttention(16, 4, kdim=8, vdim=8),
        nn.MultiheadAttention(16, 4, add_bias_kv=True),
        nn.MultiheadAttention(16, 4, add_zero_attn=True),
        nn.Linear(4, 4),
    ],
)
def test_other_attention_is_refused(base: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="LoRA cannot wrap"):
        LoRAMultiheadAttention(base, "default", r=2, lora_alpha=4, config=peft.LoraConfig(r=2))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "gaussian"}])
def test_other_kinds_of_lora_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        LoRAMultiheadAttention(nn.MultiheadAttention(16, 4), "d", r=2, lora_alpha=4, config=peft.LoraConfig(**options))


# Through the adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDS)
def test_before_training_lora_changes_nothing(build: str) -> None:
    adapter = OpenCLIPAdapter(tiny_clip(**BUILDS[build]))
    expected = features(adapter)
    adapter.add_lora(3)
    assert_same(expected, features(adapter), atol=2e-6)


@pytest.mark.parametrize("dense", PRESETS)
@pytest.mark.parametrize("build", BUILDS)
def test_features_include_lora_and_merging_folds_all_of_it_in(build: str, dense: str) -> None:
    adapter = with_lora(build=build, dense=dense)
    untuned = features(OpenCLIPAdapter(tiny_clip(**BUILDS[build]), dense=dense))
    tuned = features(adapter)
    for name, tensor in untuned.items():
        assert cosine_gap(tensor, tuned[name]) > 1e-3, name
    model = adapter.merge()
    assert not adapter.has_lora
    # These weights are far larger than trained ones; the next test shows that nothing but rounding is between them.
    assert_same(tuned, features(adapter), atol=2e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels()), adapter.encode_image(pixels()).pooled)
    assert "lora" not in "".join(model.state_dict())


@pytest.mark.parametrize("dense", PRESETS)
@pytest.mark.parametrize("build", BUILDS)
def test_merging_is_exact_in_double_precision(build: str, dense: str) -> None:
    adapter = OpenCLIPAdapter(tiny_clip(**BUILDS[build]).double(), dense=dense).add_lora(3)
    tuned = features(shake(adapter))
    adapter.merge()
    assert tuned["patches"].dtype == torch.float64
    assert_same(tuned, features(adapter), atol=1e-11)


@pytest.mark.parametrize("dense", ["maskclip", "clearclip"])
def test_the_lora_part_of_each_projection_of_the_last_block_is_in_the_dense_features(dense: str) -> None:
    adapter = OpenCLIPAdapter(tiny_clip(), dense=dense)
    adapter.add_lora(2)
    layer = adapter.model.visual.transformer.resblocks[-1].attn
    expected = features(adapter)["patches"]
    seen = {}
    for name in ("q", "k", "v", "out"):
        with torch.no_grad():
            nn.init.normal_(matrix(layer, "B", name))
            seen[name] = cosine_gap(features(adapter)["patches"], expected) > 1e-3
            nn.init.zeros_(matrix(layer, "B", name))
    assert seen == {"q": dense == "clearclip", "k": False, "v": True, "out": True}


def test_the_librarys_own_forward_includes_lora_too() -> None:
    adapter = with_lora()
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.model.encode_image(pixels()), adapter.encode_image(pixels()).pooled, atol=2e-6, rtol=1e-5
        )
        rows = token_rows([4, 9])
        torch.testing.assert_close(adapter.model.encode_text(rows), adapter.encode_text(rows), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
def test_unloading_gives_back_the_very_same_model(build: str) -> None:
    model = tiny_clip(**BUILDS[build])
    model.visual.conv1.requires_grad_(False)
    model.visual.ln_post.train()
    before = snapshot(model)
    adapter = OpenCLIPAdapter(model)
    adapter.add_lora(3, dropout=0.1)
    shake(adapter)
    model.train()
    optimizer = torch.optim.AdamW(adapter.lora_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        image = adapter.encode_image(pixels())
        (image.patches.square().mean() + adapter.encode_text(token_rows([3])).square().mean()).backward()
        optimizer.step()
    model.eval()
    model.visual.ln_post.train()
    assert adapter.unload() is model
    assert_unchanged(before, model)
    assert adapter.lora_parameters() == []
    adapter.add_lora(2)
    adapter.unload()
    assert_unchanged(before, model)


def test_merging_gives_back_the_callers_flags_and_parameter_objects() -> None:
    model = tiny_clip()
    model.visual.conv1.requires_grad_(False)
    before = snapshot(model)
    adapter = shake(OpenCLIPAdapter(model).add_lora(2))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    adapter.merge()
    after = snapshot(model)
    for part in ("ids", "modules", "flags", "hooks", "attributes"):
        assert before[part] == after[part], part
    assert list(before["state"]) == list(after["state"])
    changed = {name for name, tensor in after["state"].items() if not torch.equal(tensor, before["state"][name])}
    assert changed == {
        f"{prefix}transformer.resblocks.{i}.{name}"
        for prefix, depth in (("visual.", 3), ("", 2))
        for i in range(depth)
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }


def test_base_weights_are_bitwise_equal_after_a_thousand_forwards() -> None:
    model = tiny_clip(vision={"layers": 2}, text={"layers": 1}).train()
    adapter = shake(OpenCLIPAdapter(model).add_lora(3, dropout=0.1))
    original = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    assert any(name.endswith("base_layer.in_proj_weight") for name in original)
    images, rows = pixels(1, 8, 8), token_rows([3])[:, :3]
    for _ in range(1000):
        adapter.encode_image(images)
        adapter.encode_text(rows)
    now = dict(model.named_parameters())
    for name, tensor in original.items():
        assert torch.equal(now[name], tensor), name


def test_gradients_reach_every_lora_parameter_and_nothing_else() -> None:
    adapter = with_lora()
    image = adapter.encode_image(pixels())
    loss = image.patches.square().sum() + image.pooled.square().sum()
    (loss + adapter.encode_text(token_rows([3, 6])).square().sum()).backward()
    names = dict(adapter.model.named_parameters())
    for name, parameter in names.items():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            assert float(parameter.grad.abs().max()) > 0, name
    assert len(adapter.lora_parameters()) == (3 + 2) * (8 + 2 + 2)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        adapter = with_lora(dense="sclip")
        adapter.model.train()
        adapter.model.set_grad_checkpointing(checkpointing)
        image = adapter.encode_image(pixels())
        texts = adapter.encode_text(token_rows([3, 6])[:, :6])
        (image.patches.square().sum() + image.pooled.square().sum() + texts.square().sum()).backward()
        grads.append([parameter.grad for parameter in adapter.lora_parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tower", "prefix"), [("image", "visual."), ("text", "transformer.")])
def test_one_tower_alone(tower: Any, prefix: str) -> None:
    """The text tower's names end the image tower's, so a match by endings would wrap both."""
    adapter = OpenCLIPAdapter(tiny_clip()).add_lora(2, towers=[tower])
    lora = {name for name, _ in adapter.model.named_parameters() if "lora_" in name}
    assert lora
    assert all(name.startswith(prefix) for name in lora)


def test_targets_take_part_in_dense_and_pooled_features_alike() -> None:
    """A last MLP that the dense mode leaves out is no target; every target's LoRA moves both kinds of features."""
    for dense in ("maskclip", "value_only", "clearclip"):
        adapter = OpenCLIPAdapter(tiny_clip(), dense=dense)
        targets = adapter.lora_targets("image")
        assert ("visual.transformer.resblocks.2.mlp.c_fc" in targets) == (dense == "maskclip")
        adapter.add_lora(2, towers=["image"])
        plain = features(adapter)
        for target in targets:
            layer = adapter.model.get_submodule(target)
            with torch.no_grad():
                ups = [parameter for name, parameter in layer.named_parameters() if "lora_B" in name]
                for parameter in ups:
                    nn.init.normal_(parameter)
                tuned = features(adapter)
                for parameter in ups:
                    nn.init.zeros_(parameter)
            for name in ("patches", "pooled"):
                assert cosine_gap(plain[name], tuned[name]) > 1e-4, (dense, target, name)


def test_attention_with_extras_is_wrapped_at_its_output() -> None:
    model = tiny_clip(vision={"qk_norm": True})
    before = snapshot(model)
    adapter = OpenCLIPAdapter(model)
    assert "visual.transformer.resblocks.0.attn.out_proj" in adapter.lora_targets("image")
    shake(adapter.add_lora(2))
    tuned = features(adapter)
    merged = copy.deepcopy(adapter)
    merged.merge()
    assert_same(tuned, features(merged))
    adapter.unload()
    assert_unchanged(before, model)


def test_custom_blocks_get_our_layer_too() -> None:
    adapter = with_lora(build="own_attention")
    layer = adapter.model.visual.transformer.resblocks[0].attn
    assert isinstance(layer, LoRAOpenClipAttention)
    x = torch.randn(2, 3, 32)
    with pytest.raises(UnsupportedModelError, match="self-attention"):
        layer(x, k_x=torch.randn(2, 3, 32))
    with pytest.raises(UnsupportedModelError, match="additive mask"):
        layer(x, attn_mask=torch.ones(3, 3, dtype=torch.bool))


def test_half_precision_models_get_lora_in_float32() -> None:
    model = tiny_clip().to(torch.bfloat16)
    before = snapshot(model)
    adapter = OpenCLIPAdapter(model)
    adapter.add_lora(2)
    shake(adapter)
    assert {parameter.dtype for parameter in adapter.lora_parameters()} == {torch.float32}
    image = adapter.encode_image(pixels())
    assert image.patches.dtype == torch.bfloat16
    exact = features(with_lora(rank=2))
    assert cosine_gap(features(adapter)["patches"].float(), exact["patches"]) < 0.05
    for _ in range(20):
        adapter.encode_image(pixels())
    image.patches.float().square().sum().backward()
    adapter.unload()
    assert_unchanged(before, model)


def test_autocast() -> None:
    adapter = with_lora()
    exact = features(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = features(adapter)
    for name, tensor in exact.items():
        assert cosine_gap(seen[name].float(), tensor) < 0.03, name


def test_copies_and_pickles_carry_lora_of_their_own() -> None:
    adapter = with_lora()
    tuned = features(adapter)
    untuned = features(OpenCLIPAdapter(tiny_clip()))
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert_same(tuned, features(twin), atol=0)
        twin.unload()
        assert_same(untuned, features(twin), atol=0)
        assert_same(tuned, features(adapter), atol=0)


def test_pefts_state_dict_helpers() -> None:
    adapter = with_lora()
    state = get_peft_model_state_dict(adapter.model)
    assert len(state) == len(adapter.lora_parameters())
    assert "visual.transformer.resblocks.0.attn.lora_A_q.weight" in state
    assert "visual.transformer.resblocks.0.mlp.c_fc.lora_B.weight" in state
    other = OpenCLIPAdapter(tiny_clip()).add_lora(3)
    result = set_peft_model_state_dict(other.model, state)
    assert not result.unexpected_keys
    assert_same(features(adapter), features(other), atol=0)
    assert adapter.model.peft_config["default"].to_dict()["r"] == 3


def test_alpha_is_twice_the_rank_by_default() -> None:
    handle = attach_lora(OpenCLIPAdapter(tiny_clip()), rank=4)
    assert handle.config.lora_alpha == 8
    handle.remove()
    handle = attach_lora(OpenCLIPAdapter(tiny_clip()), rank=4, alpha=2)
    assert handle._wrapped[0].layer.scaling == {"default": 0.5}


def test_the_layers_are_in_the_mode_of_what_they_wrap() -> None:
    adapter = OpenCLIPAdapter(tiny_clip())
    adapter.add_lora(2, dropout=0.5)
    assert not any(module.training for module in adapter.model.modules())
    assert_same(features(shake(adapter)), features(adapter), atol=0)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_lora_twice_is_refused() -> None:
    model = tiny_clip()
    adapter = OpenCLIPAdapter(model).add_lora(2)
    with pytest.raises(TTDError, match=r"has LoRA already; merge\(\) or unload\(\) it first"):
        adapter.add_lora(2)
    with pytest.raises(TTDError, match="is a peft layer that this adapter did not add"):
        OpenCLIPAdapter(model).add_lora(2)


def test_a_spent_handle_says_so() -> None:
    handle = attach_lora(OpenCLIPAdapter(tiny_clip()), rank=2)
    handle.remove()
    for verb in (handle.remove, handle.merge):
        with pytest.raises(TTDError, match="not attached to the model any more"):
            verb()


def test_lora_that_is_not_finite_is_not_merged() -> None:
    model = tiny_clip()
    before = snapshot(model)
    adapter = OpenCLIPAdapter(model).add_lora(2)
    with torch.no_grad():
        adapter.lora_parameters()[-1].fill_(float("inf"))
    with pytest.raises(TTDError, match="not finite"):
        adapter.merge()
    adapter.unload()
    assert_unchanged(before, model)


def test_removal_after_pefts_own_merge_is_refused() -> None:
    adapter = with_lora()
    tuned = features(adapter)
    adapter.model.visual.transformer.resblocks[0].attn.merge()
    with pytest.raises(TTDError, match="cannot be undone bitwise"):
        adapter.unload()
    adapter.merge()
    assert_same(tuned, features(adapter))


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}, {"towers": []}, {"towers": ["audio"]}],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    model = tiny_clip()
    before = snapshot(model)
    with pytest.raises(InputError):
        OpenCLIPAdapter(model).add_lora(**options)
    assert_unchanged(before, model)


class Odd(OpenCLIPAdapter):
    """An adapter whose targets are set from outside."""

    targets: tuple[str, ...] = ()

    def lora_targets(self, tower: Any) -> list[str]:
        return list(self.targets)

    def lora_layers(self) -> Any:
        return {}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((), "image tower of open_clip:CLIP has no module that LoRA can wrap"),
        (("visual.transformer.resblocks.0.attn",), "rewrites the base weights"),
        (("visual.transformer.resblocks.0.mlp.c_fc", "visual.ln_post"), "peft cannot add LoRA to"),
    ],
)
def test_targets_that_cannot_be_wrapped_leave_the_model_alone(targets: tuple[str, ...], message: str) -> None:
    model = tiny_clip()
    model.visual.conv1.requires_grad_(False)
    before = snapshot(model)
    adapter = Odd(model)
    adapter.targets = targets
    with pytest.raises(TTDError, match=message):
        adapter.add_lora(2, towers=["image"])
    assert not adapter.has_lora
    assert_unchanged(before, model)


def test_pefts_own_wrapper_is_refused_where_its_lora_would_be_lost() -> None:
    model = tiny_clip()
    adapter = OpenCLIPAdapter(model, dense="clearclip")
    config = peft.LoraConfig(r=2, target_modules=["visual.transformer.resblocks.2.attn"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    with pytest.raises(UnsupportedModelError, match=r"dense mode 'clearclip' cannot be used.*MultiheadAttention"):
        adapter.encode_image(pixels())
    with pytest.raises(UnsupportedModelError):
        OpenCLIPAdapter(model, dense="sclip")
    value = OpenCLIPAdapter(model)
    assert value.description.dense_modes == ("maskclip", "value_only", "plain")
    with torch.no_grad():
        tuned = value.encode_image(pixels()).patches
        untuned = OpenCLIPAdapter(tiny_clip()).encode_image(pixels()).patches
    assert tuned.shape[-1] == EMBED
    assert cosine_gap(tuned, untuned) > 1e-4


@pytest.mark.parametrize(
    "failure", [ImportError("No module named 'peft'"), RuntimeError("operator nms does not exist")]
)
def test_missing_or_broken_peft(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.partition(".")[0] == "peft":
                raise failure

    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"pip install 'ttd-plugins\[lora\]'"):
        OpenCLIPAdapter(tiny_clip()).add_lora(2)
