"""More towers, small and at the size that people use: attention-pooled ones of open_clip, multilingual text towers, and
transformers' relatives of CLIP. Weights are random, and tokenizers stand in for those of a hub."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers_full_size import CLIP_CONTEXT, Backbone
from torch import Tensor, nn

from ttd_plugins.toolkit.tokenizing import valid_unicode

SMALL_CONTEXT, SMALL_VOCABULARY, EMBED = 12, 64, 24
TEXT = {"context_length": SMALL_CONTEXT, "vocab_size": SMALL_VOCABULARY, "width": 16, "heads": 2, "layers": 2}
VISION = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
CLIP_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
BERT = {
    "vocab_size": SMALL_VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": SMALL_CONTEXT + 2, "pad_token_id": 0,
}  # fmt: skip


class Words:
    """Words to ids by hashing between a start and an end token, with the calling convention of open_clip."""

    def __init__(self, start: int, end: int, pad: int, *, context: int, vocabulary: int) -> None:
        self.start, self.end, self.pad_token_id = start, end, pad
        self.context_length, self.vocabulary = context, vocabulary

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        rows = torch.full((len(texts), length), self.pad_token_id)
        for row, text in zip(rows, texts, strict=True):
            words = [4 + zlib.crc32(word.encode()) % (self.vocabulary - 6) for word in valid_unicode(text).split()]
            ids = [self.start, *words[: length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def shaken(model: Any) -> Any:
    """The model in evaluation mode, no parameter at a special initial value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def settled(model: Any, calibrate: Callable[[], Any]) -> Any:
    """The model in evaluation mode, its running statistics those of its own activations, as after training."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            calibrate()
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


# open_clip -----------------------------------------------------------------------------------------------------------


def resnet(full: bool) -> nn.Module:
    """open_clip's ``RN50``, or a small modified ResNet."""
    import open_clip

    torch.manual_seed(0)
    if full:
        model = open_clip.create_model("RN50", pretrained=None, load_weights=False)
    else:
        vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "head_width": 32}
        model = shaken(open_clip.CLIP(embed_dim=EMBED, vision_cfg=vision, text_cfg=TEXT))
    # open_clip starts the last norm of each bottleneck at zero, so that its branch would have no effect.
    with torch.no_grad():
        for name, parameter in model.visual.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.fill_(0.5)
    return settled(model, lambda: model.encode_image(_images(2 if full else 8, 224 if full else 64)))


def coca(full: bool, **vision: Any) -> nn.Module:
    """open_clip's ``coca_ViT-B-32``, or a small CoCa; ``vision`` changes its image tower."""
    import open_clip

    torch.manual_seed(0)
    if full:
        return open_clip.create_model("coca_ViT-B-32", pretrained=None, load_weights=False).eval()
    pooler = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 6, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True, "context_length": SMALL_CONTEXT - 1}
    decoder = TEXT | {"context_length": SMALL_CONTEXT - 1, "layers": 1}
    return shaken(open_clip.CoCa(EMBED, multimodal_cfg=decoder, text_cfg=text, vision_cfg=VISION | pooler | vision))


def multilingual(kind: str, full: bool) -> nn.Module:
    """A ViT of open_clip beside a text tower of transformers: XLM-RoBERTa, NLLB's encoder, or mT5's encoder.

    Sizes of the full towers are those of the configurations ``xlm-roberta-base-ViT-B-32``, ``nllb-clip-base`` and
    ``mt5-base-ViT-B-32``.
    """
    import open_clip
    import transformers

    torch.manual_seed(0)
    if kind == "xlm_roberta":
        name, pool = "xlm-roberta-base-ViT-B-32", "mean_pooler"
        sizes = {"vocab_size": 250002, "max_position_embeddings": 514} if full else BERT
        config: Any = transformers.XLMRobertaConfig(**sizes | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2})
    elif kind == "nllb":
        name, pool = "nllb-clip-base", "cls_pooler"
        heads = {"encoder_attention_heads": 16, "decoder_attention_heads": 16} if full else {
            "encoder_attention_heads": 2, "decoder_attention_heads": 2
        }  # fmt: skip
        sizes = {"vocab_size": 256206, "d_model": 1024} if full else {
            "vocab_size": SMALL_VOCABULARY, "d_model": 16, "encoder_layers": 2, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "max_position_embeddings": SMALL_CONTEXT + 2,
        }  # fmt: skip
        # open_clip takes the encoder and drops the decoder.
        config = transformers.M2M100Config(**sizes | heads | {"decoder_layers": 1, "pad_token_id": 1})
    else:
        name, pool = "mt5-base-ViT-B-32", "mean_pooler"
        sizes = {"vocab_size": SMALL_VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        if full:
            sizes = {"vocab_size": 250112, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
        config = transformers.MT5Config(**sizes | {"num_decoder_layers": 1, "pad_token_id": 0})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict()))
        text = {
            "hf_model_name": folder, "hf_model_pretrained": False, "hf_pooler_type": pool, "hf_proj_type": "linear"
        }  # fmt: skip
        vision = open_clip.get_model_config(name)["vision_cfg"] if full else VISION
        model = open_clip.CustomTextCLIP(512 if full else EMBED, vision_cfg=vision, text_cfg=text)
    return model.eval() if full else shaken(model)


# transformers --------------------------------------------------------------------------------------------------------


def relative(kind: str, full: bool) -> nn.Module:
    """A relative of ``CLIPModel`` in transformers, of the default sizes of its configuration, or a small one."""
    import transformers

    torch.manual_seed(0)
    if kind == "metaclip_2":
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        if full:
            config: Any = transformers.MetaClip2Config(vision_config={"patch_size": 16}, text_config=ids)
            return transformers.MetaClip2Model(config).eval()
        text = CLIP_VISION | {"num_hidden_layers": 2, "vocab_size": SMALL_VOCABULARY}
        text = {name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
        text |= ids | {"max_position_embeddings": SMALL_CONTEXT}
        config = transformers.MetaClip2Config(vision_config=CLIP_VISION, text_config=text, projection_dim=EMBED)
        return shaken(transformers.MetaClip2Model(config))
    if kind == "chinese_clip":
        sizes = {"vision_config": {"patch_size": 16}} if full else {
            "vision_config": CLIP_VISION, "text_config": BERT, "projection_dim": EMBED
        }  # fmt: skip
        model: Any = transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**sizes))
    elif kind == "altclip":
        sizes = {"vision_config": {"patch_size": 14}} if full else {
            "vision_config": CLIP_VISION, "text_config": BERT | {"pad_token_id": 1, "project_dim": 20},
            "projection_dim": EMBED,
        }  # fmt: skip
        model = transformers.AltCLIPModel(transformers.AltCLIPConfig(**sizes))
    else:
        vision = {"image_size": 160, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 80}
        # With some weights a random map of few positions does not follow a moving object.
        torch.manual_seed(1)
        # The widths of the map and of the text embeddings are equal in the published model too.
        sizes = {} if full else {"vision_config": vision, "text_config": BERT, "projection_dim": 80}
        model = transformers.AlignModel(transformers.AlignConfig(**sizes))
        side = 288 if full else 160
        return settled(model, lambda: model.get_image_features(_images(2 if full else 8, side)))
    return model.eval() if full else shaken(model)


# Dense features by plain formulas ------------------------------------------------------------------------------------


def resnet_formula(model: Any, images: Tensor) -> Tensor:
    """Value and output projection of each cell ``[B, H, W, D]``, the trunk by open_clip's own parts."""
    visual, pool = model.visual, model.visual.attnpool
    cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))).permute(0, 2, 3, 1)
    return (cells @ pool.v_proj.weight.T + pool.v_proj.bias) @ pool.c_proj.weight.T + pool.c_proj.bias


def coca_formula(model: Any, images: Tensor) -> Tensor:
    """The value of each patch in the pooler, then output projection, norm and projection; last block as trained."""
    visual = model.visual
    x = visual._embeds(images)
    for block in visual.transformer.resblocks:
        x = block(x)
    pool = visual.attn_pool
    width = pool.attn.embed_dim
    weight = pool.attn.in_proj_weight[2 * width :] if pool.attn.v_proj_weight is None else pool.attn.v_proj_weight
    value = pool.ln_k(x[:, 1:]) @ weight.T + pool.attn.in_proj_bias[2 * width :]
    out = value @ pool.attn.out_proj.weight.T + pool.attn.out_proj.bias
    side = visual.conv1.kernel_size[0]
    return (visual.ln_post(out) @ visual.proj).unflatten(1, (images.shape[2] // side, images.shape[3] // side))


def align_formula(model: Any, images: Tensor) -> Tensor:
    """The last feature map of the library."""
    return model.vision_model(images).last_hidden_state.permute(0, 2, 3, 1)


# All of them ---------------------------------------------------------------------------------------------------------


def _tower(
    family: str,
    title: str,
    build: Callable[[bool], nn.Module],
    ids: tuple[int, int, int],
    full: tuple[int, int],
    formula: Callable[[Any, Tensor], Tensor] | None = None,
    small: int = SMALL_CONTEXT,
    noise: float = 0.02,
) -> Backbone:
    """A backbone whose tokenizer has start, end and padding ids, and (context, vocabulary) at full size."""

    def tokenizer(at_full_size: bool) -> Words:
        context, vocabulary = full if at_full_size else (small, SMALL_VOCABULARY)
        # The end token of OpenAI's vocabulary, and of models like it, is the largest id.
        start, end, pad = (vocabulary + one if one < 0 else one for one in ids)
        return Words(start, end, pad, context=context, vocabulary=vocabulary)

    return Backbone(family, title, build, tokenizer, "stand-in of hashed words", formula=formula, noise=noise)


CLIP_IDS, XLM_IDS, BERT_IDS = (-2, -1, 0), (0, 2, 1), (2, 3, 0)
TOWERS: dict[str, Backbone] = {
    "resnet": _tower(
        "open_clip", "open_clip `RN50`", resnet, CLIP_IDS, (CLIP_CONTEXT, 49408), resnet_formula, noise=0.0
    ),
    "coca": _tower(
        "open_clip", "open_clip `coca_ViT-B-32`", coca, CLIP_IDS, (76, 49408), coca_formula, SMALL_CONTEXT - 1
    ),
    "xlm_roberta": _tower(
        "open_clip",
        "open_clip `xlm-roberta-base-ViT-B-32`",
        lambda full: multilingual("xlm_roberta", full),
        XLM_IDS,
        (CLIP_CONTEXT, 250002),
    ),
    "nllb": _tower(
        "open_clip",
        "open_clip `nllb-clip-base`",
        lambda full: multilingual("nllb", full),
        XLM_IDS,
        (CLIP_CONTEXT, 256206),
    ),
    "mt5": _tower(
        "open_clip",
        "open_clip `mt5-base-ViT-B-32`",
        lambda full: multilingual("mt5", full),
        (3, 1, 0),
        (CLIP_CONTEXT, 250112),
    ),
    "metaclip_2": _tower(
        "openai_clip",
        "transformers `MetaClip2Model`, base",
        lambda full: relative("metaclip_2", full),
        XLM_IDS,
        (CLIP_CONTEXT, 49408),
    ),
    "chinese_clip": _tower(
        "openai_clip",
        "transformers `ChineseCLIPModel`, base",
        lambda full: relative("chinese_clip", full),
        BERT_IDS,
        (52, 30522),
    ),
    "altclip": _tower(
        "openai_clip",
        "transformers `AltCLIPModel`",
        lambda full: relative("altclip", full),
        XLM_IDS,
        (77, 250002),
    ),
    "align": _tower(
        "openai_clip",
        "transformers `AlignModel`",
        lambda full: relative("align", full),
        BERT_IDS,
        (64, 30522),
        align_formula,
        noise=0.0,
    ),
}
"""Backbones by name, beside those of ``helpers_full_size``."""
