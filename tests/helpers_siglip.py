"""Tiny SigLIP models of both libraries, tokenizers with real padding rules, and the pooling head written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, PATCH, IMAGE, CONTEXT, VOCABULARY = 32, 4, 8, 32, 10, 64
GRID = IMAGE // PATCH
CONTAINERS = ("transformers", "timm")
WORDS = "a cat and dog on the grass photo of two red , .".split()


def config(**vision: Any) -> dict[str, Any]:
    """Keyword arguments of ``SiglipConfig``; the text tower is narrower than the joint space."""
    return {
        "vision_config": {
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS,
            "image_size": IMAGE, "patch_size": PATCH, **vision,
        },
        "text_config": {
            "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "projection_size": WIDTH,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
        },
    }  # fmt: skip


def shaken(model: Any, seed: int) -> Any:
    """The model in evaluation mode, no weight or bias at a special initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_transformers(seed: int = 0, **vision: Any) -> Any:
    """A random ``SiglipModel`` of some 60,000 parameters."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.SiglipModel(transformers.SiglipConfig(**config(**vision)))
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
        model.logit_bias.fill_(-12.0)
    return shaken(model, seed)


def tiny_trunk(**options: Any) -> Any:
    """A timm SigLIP vision transformer."""
    import timm

    shape = {"img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": HEADS}
    return timm.create_model(
        "vit_base_patch16_siglip_224", **{**shape, "num_classes": 0, "global_pool": "map", **options}
    )


def tiny_timm(seed: int = 0, *, trunk: Any = None, text: dict[str, Any] | None = None, **options: Any) -> Any:
    """A random ``CustomTextCLIP`` around a timm trunk, as open_clip builds its SigLIP models."""
    import open_clip

    torch.manual_seed(seed)
    text_cfg = {
        "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 2, "layers": 2,
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last", **(text or {}),
    }  # fmt: skip
    vision_cfg = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    logits = {"init_logit_scale": 4.0, "init_logit_bias": -12.0} | options
    model = open_clip.CustomTextCLIP(embed_dim=WIDTH, vision_cfg=vision_cfg, text_cfg=text_cfg, **logits)
    model.visual.trunk = tiny_trunk() if trunk is None else trunk
    model.visual.image_size = model.visual.trunk.patch_embed.img_size if hasattr(trunk, "patch_embed") else (32, 32)
    return shaken(model, seed)


def tiny(container: str, **options: Any) -> Any:
    """A tiny model of either library."""
    return tiny_transformers(**options) if container == "transformers" else tiny_timm(**options)


def library_image(model: Any, images: Tensor) -> Tensor:
    """The library's own image embedding."""
    if hasattr(model, "vision_model"):
        return model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    return model.encode_image(images, normalize=False)


def library_text(model: Any, ids: Tensor) -> Tensor:
    """The library's own text embedding."""
    if hasattr(model, "vision_model"):
        return model.get_text_features(input_ids=ids).pooler_output
    return model.encode_text(ids, normalize=False)


def pixels(count: int = 2, height: int = IMAGE, width: int = IMAGE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 3, seed: int = 2) -> Tensor:
    """Random token ids of the full context, padded with 0."""
    ids = torch.randint(3, VOCABULARY, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))
    for row in range(count):
        ids[row, 2 + 2 * row :] = 0
        ids[row, 2 + 2 * row] = 1
    return ids


# References, by plain formulas on the parameters ---------------------------------------------------------------------


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def reference_tokens(model: Any, images: Tensor, last_block: str) -> Tensor:
    """Tokens ``[B, P, W]`` after the final norm, the last block as trained or by its value path."""
    if hasattr(model, "vision_model"):
        vision = model.vision_model
        x = vision.embeddings(images, interpolate_pos_encoding=True)
        *blocks, last = vision.encoder.layers
        for block in blocks:
            x = block(x, None)
        if last_block == "plain":
            x = last(x, None)
        else:
            attention = last.self_attn
            value = _normed(x, last.layer_norm1) @ attention.v_proj.weight.T + attention.v_proj.bias
            x = x + value @ attention.out_proj.weight.T + attention.out_proj.bias
            x = x + last.mlp(_normed(x, last.layer_norm2))
        return _normed(x, vision.post_layernorm)
    trunk = model.visual.trunk
    x = trunk._pos_embed(trunk.patch_embed(images))
    *blocks, last = trunk.blocks
    for block in blocks:
        x = block(x)
    if last_block == "plain":
        x = last(x)
    else:
        width = x.shape[-1]
        value = _normed(x, last.norm1) @ last.attn.qkv.weight[2 * width :].T + last.attn.qkv.bias[2 * width :]
        x = x + value @ last.attn.proj.weight.T + last.attn.proj.bias
        x = x + last.mlp(_normed(x, last.norm2))
    return _normed(x, trunk.norm)


def reference_dense(model: Any, images: Tensor, head: str, last_block: str) -> Tensor:
    """Dense features ``[B, P, D]``, head by head and patch by patch."""
    x = reference_tokens(model, images, last_block)
    width = x.shape[-1]
    if hasattr(model, "vision_model"):
        pool = model.vision_model.head
        weight, bias = pool.attention.in_proj_weight, pool.attention.in_proj_bias
        out_projection, norm = pool.attention.out_proj, pool.layernorm
    else:
        pool = model.visual.trunk.attn_pool
        weight = torch.cat([pool.q.weight, pool.kv.weight])
        bias = torch.cat([pool.q.bias, pool.kv.bias])
        out_projection, norm = pool.proj, pool.norm
    q, k, v = (x @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in range(3))
    side = width // HEADS
    mixed = torch.zeros_like(v)
    for start in range(0, width, side):
        part = slice(start, start + side)
        for patch in range(x.shape[1]):
            if head == "value":
                mixed[:, patch, part] = v[:, patch, part]
                continue
            keys = k if head == "token_probe" else q
            scores = (q[:, patch : patch + 1, part] * keys[..., part]).sum(-1) / side**0.5
            mixed[:, patch, part] = (scores.softmax(-1)[..., None] * v[..., part]).sum(1)
    out = mixed @ out_projection.weight.T + out_projection.bias
    return out + pool.mlp(_normed(out, norm))


# Tokenizers ----------------------------------------------------------------------------------------------------------


def siglip_like_tokenizer() -> Any:
    """A transformers tokenizer with SigLIP's rules: words, then an end token, padded with the end token itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 1, "<unk>": 2} | {word: 3 + index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=CONTEXT
    )


def siglip2_tokenizer() -> Any:
    """transformers' own ``Siglip2Tokenizer`` over a few letters; it lower-cases and, left alone, pads at the left."""
    from transformers import Siglip2Tokenizer

    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz", "ca", "cat"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    return Siglip2Tokenizer(vocab=vocabulary, merges=[("c", "a"), ("ca", "t")])


def write_folder(folder: Path, *, tokenizer: bool = True, processor: bool = True, seed: int = 5) -> Any:
    """Save a tiny ``SiglipModel`` as transformers does, and return it."""
    model = tiny_transformers(seed)
    model.save_pretrained(folder)
    if tokenizer:
        siglip_like_tokenizer().save_pretrained(folder)
    if processor:
        from transformers import SiglipImageProcessor

        SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE}, image_mean=[0.4] * 3, resample=2).save_pretrained(
            folder
        )
    return model
