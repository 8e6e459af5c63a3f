"""SigLIP in open_clip and in transformers: the same weights and texts give the same ids and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip", reason="needs the extra 'siglip'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'siglip'")

import torch
from helpers_full_size import open_clip_siglip_stand_in, siglip_stand_in
from helpers_siglip import (
    CONTEXT,
    VOCABULARY,
    config,
    pixels,
    siglip2_tokenizer,
    tiny_timm,
    tiny_transformers,
    tiny_trunk,
)
from torch import Tensor, nn

from ttd_plugins import wrap

TEXTS = ["a cat", "A Photo of 2 CATS.", "Cat, cat! (cat)", "", "  two   spaces ", "ÀÉÎ Straße", "cat " * 40, "it's"]


def gemma_tokenizer() -> Any:
    from tokenizers import normalizers

    tokenizer = siglip2_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


def inside_open_clip(tokenizer: Any, folder: Path, clean: str = "canonicalize") -> Any:
    """open_clip's own wrapper around a saved tokenizer, with the cleaning of its SigLIP configurations."""
    from open_clip.tokenizer import HFTokenizer

    tokenizer.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=CONTEXT, clean=clean)


def as_trained(tokenizer: Any, texts: list[str]) -> Tensor:
    """Ids of SigLIP 2's training: lower case, punctuation kept, padded at the right to the full context."""
    lowered = [text.lower() for text in texts]
    options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT, "padding_side": "right"}
    return tokenizer(lowered, return_tensors="pt", **options)["input_ids"]


def test_texts_of_siglip_2_are_cleaned_as_in_training_whatever_library_loads_the_tokenizer(tmp_path: Path) -> None:
    expected = as_trained(siglip2_tokenizer(), TEXTS)
    tokenizers = {
        "transformers": (tiny_transformers(), siglip2_tokenizer()),
        "Gemma in transformers": (tiny_transformers(), gemma_tokenizer()),
        "open_clip": (tiny_timm(), inside_open_clip(siglip2_tokenizer(), tmp_path / "a")),
        "open_clip, other cleaning": (tiny_timm(), inside_open_clip(siglip2_tokenizer(), tmp_path / "b", "whitespace")),
    }
    found = {name: wrap(model, tokenizer=tokenizer).tokenize(TEXTS) for name, (model, tokenizer) in tokenizers.items()}
    for name, tokens in found.items():
        assert torch.equal(tokens.ids, expected), name
        assert torch.equal(tokens.lengths, found["transformers"].lengths), name
        assert tokens.truncated == found["transformers"].truncated, name
    assert found["open_clip"].truncated[TEXTS.index("cat " * 40)]
    # open_clip alone would remove the punctuation.
    alone = inside_open_clip(siglip2_tokenizer(), tmp_path / "c")(TEXTS)
    assert not torch.equal(alone, expected)


def test_a_tokenizer_of_another_class_is_recognised_by_the_vocabulary_of_gemma() -> None:
    inner, outer = siglip_stand_in(256000), open_clip_siglip_stand_in(256000)
    model = tiny_transformers()
    model.text_model.embeddings.token_embedding = nn.Embedding(256000, 24)
    rows = [wrap(model, tokenizer=one).tokenize(["A Cat!", "a cat!", "a cat"]).ids for one in (inner, outer)]
    assert torch.equal(*rows)
    assert torch.equal(rows[0][0], rows[0][1]) and not torch.equal(rows[0][1], rows[0][2])
    first = open_clip_siglip_stand_in(32000)
    model.text_model.embeddings.token_embedding = nn.Embedding(32000, 24)
    ids = wrap(model, tokenizer=first).tokenize(["A Cat!", "a cat"]).ids
    # The first SigLIP was trained without punctuation, which open_clip's wrapper removes.
    assert torch.equal(ids[0], ids[1])


def twins() -> tuple[Any, Any]:
    """The same weights as transformers' ``SiglipModel`` and as open_clip's ``CustomTextCLIP``."""
    own = tiny_transformers()
    mlp = {"mlp_ratio": 32 / 24, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    trunk = tiny_trunk(mlp_ratio=48 / 32, act_layer="gelu_tanh")
    other = tiny_timm(trunk=trunk, text=mlp)
    state = own.state_dict()

    def pair(module: Any, name: str) -> None:
        module.weight.copy_(state[f"{name}.weight"])
        module.bias.copy_(state[f"{name}.bias"])

    def fused(name: str, part: str) -> Tensor:
        return torch.cat([state[f"{name}.self_attn.{one}_proj.{part}"] for one in "qkv"])

    with torch.no_grad():
        text, vision = other.text, "vision_model"
        text.token_embedding.weight.copy_(state["text_model.embeddings.token_embedding.weight"])
        text.positional_embedding.copy_(state["text_model.embeddings.position_embedding.weight"])
        for index, block in enumerate(text.transformer.resblocks):
            name = f"text_model.encoder.layers.{index}"
            block.attn.in_proj_weight.copy_(fused(name, "weight"))
            block.attn.in_proj_bias.copy_(fused(name, "bias"))
            pair(block.attn.out_proj, f"{name}.self_attn.out_proj")
            for module, part in ((block.ln_1, "layer_norm1"), (block.ln_2, "layer_norm2"), (block.mlp.c_fc, "mlp.fc1"),
                                 (block.mlp.c_proj, "mlp.fc2")):  # fmt: skip
                pair(module, f"{name}.{part}")
        pair(text.ln_final, "text_model.final_layer_norm")
        pair(text.text_projection, "text_model.head")
        pair(trunk.patch_embed.proj, f"{vision}.embeddings.patch_embedding")
        trunk.pos_embed.copy_(state[f"{vision}.embeddings.position_embedding.weight"][None])
        for index, block in enumerate(trunk.blocks):
            name = f"{vision}.encoder.layers.{index}"
            block.attn.qkv.weight.copy_(fused(name, "weight"))
            block.attn.qkv.bias.copy_(fused(name, "bias"))
            pair(block.attn.proj, f"{name}.self_attn.out_proj")
            for module, part in ((block.norm1, "layer_norm1"), (block.norm2, "layer_norm2"), (block.mlp.fc1, "mlp.fc1"),
                                 (block.mlp.fc2, "mlp.fc2")):  # fmt: skip
                pair(module, f"{name}.{part}")
        pair(trunk.norm, f"{vision}.post_layernorm")
        pool, head = trunk.attn_pool, f"{vision}.head"
        width = config()["vision_config"]["hidden_size"]
        pool.latent.copy_(state[f"{head}.probe"])
        for part in ("weight", "bias"):
            all_three = state[f"{head}.attention.in_proj_{part}"]
            getattr(pool.q, part).copy_(all_three[:width])
            getattr(pool.kv, part).copy_(all_three[width:])
        for module, name in ((pool.proj, "attention.out_proj"), (pool.norm, "layernorm"), (pool.mlp.fc1, "mlp.fc1"),
                             (pool.mlp.fc2, "mlp.fc2")):  # fmt: skip
            pair(module, f"{head}.{name}")
        other.logit_scale.copy_(own.logit_scale.reshape(()))
        other.logit_bias.copy_(own.logit_bias.reshape(()))
    return own, other


def test_the_same_weights_give_the_same_embeddings_in_both_libraries(tmp_path: Path) -> None:
    own, other = twins()
    assert own.config.text_config.vocab_size == VOCABULARY
    first = wrap(own, tokenizer=siglip2_tokenizer())
    second = wrap(other, tokenizer=inside_open_clip(siglip2_tokenizer(), tmp_path))
    with torch.no_grad():
        a, b = (adapter.encode_text(adapter.tokenize(TEXTS).ids) for adapter in (first, second))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for positions, side in (("library", 32), ("dino", 56), ("bicubic", 24)):
            first.positions = second.positions = positions
            images = pixels(2, side, 40 if positions != "library" else side)
            x, y = first.encode_image(images), second.encode_image(images)
            torch.testing.assert_close(x.pooled, y.pooled, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(x.patches, y.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.logit_scale(), second.logit_scale())
    torch.testing.assert_close(first.logit_bias(), second.logit_bias())


def test_naflex_is_refused_in_one_sentence_that_says_why(tmp_path: Path) -> None:
    from ttd_plugins import load
    from ttd_plugins.errors import UnsupportedModelError

    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(UnsupportedModelError, match="list of patches with a mask and not pixels") as caught:
        load(f"siglip:{tmp_path}")
    assert "\n" not in str(caught.value)
