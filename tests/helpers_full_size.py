"""Backbones at the size that people use, with random weights and built from configurations, and small ones built alike.

Tokenizers whose files are on a hub have stand-ins here, of the real vocabulary size and padding.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins import wrap
from ttd_plugins.adapter import DenseAdapter

CLIP_CONTEXT, CLIP_VOCABULARY, SIGLIP_CONTEXT = 77, 49408, 64
SIGLIP_IDS = {32000: {"pad": 1, "end": 1}, 256000: {"pad": 0, "end": 1}}
"""Padding and end token by vocabulary size: SigLIP pads with its end token, SigLIP 2 does not."""


# Tokenizers ----------------------------------------------------------------------------------------------------------


def siglip_stand_in(vocabulary: int) -> Any:
    """A transformers tokenizer of bytes, with the vocabulary size, padding and end token of SigLIP or SigLIP 2.

    Its 256 bytes are the last ids of the vocabulary, so that a word embedding that is too small would show.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = SIGLIP_IDS[vocabulary]
    special = {"</s>": ids["end"]} | ({} if ids["pad"] == ids["end"] else {"<pad>": ids["pad"]})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = special | {letter: vocabulary - len(letters) + index for index, letter in enumerate(letters)}
    taken = set(known.values())
    known |= {f"<unused{index}>": index for index in range(vocabulary) if index not in taken}
    inner = Tokenizer(models.BPE(vocab=known, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["end"])])
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert inner.get_vocab_size() == vocabulary
    pad = "</s>" if ids["pad"] == ids["end"] else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token=pad, model_max_length=SIGLIP_CONTEXT
    )


@cache
def open_clip_siglip_stand_in(vocabulary: int) -> Any:
    """The same inside open_clip's own ``HFTokenizer``, which cleans texts as SigLIP's configurations say."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        siglip_stand_in(vocabulary).save_pretrained(folder)
        return open_clip.tokenizer.HFTokenizer(folder, context_length=SIGLIP_CONTEXT, clean="canonicalize")


@cache
def clip_tokenizer() -> Any:
    """transformers' ``CLIPTokenizer`` over the vocabulary that open_clip is packaged with."""
    import open_clip
    from transformers import CLIPTokenizer

    packaged = open_clip.SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): index for token, index in packaged.encoder.items()}
    merges = [pair for pair, _ in sorted(packaged.bpe_ranks.items(), key=lambda item: item[1])]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_CONTEXT)


class OriginalTokenize:
    """What ``clip.tokenize`` does, over the vocabulary that open_clip brings: int32, and an error if it is too long."""

    def __init__(self) -> None:
        import open_clip

        self.packaged = open_clip.SimpleTokenizer()

    def __call__(self, texts: str | list[str], context_length: int = CLIP_CONTEXT, truncate: bool = False) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int)
        for row, text in zip(rows, texts, strict=True):
            ids = [CLIP_VOCABULARY - 2, *self.packaged.encode(text), CLIP_VOCABULARY - 1]
            if len(ids) > context_length:
                if not truncate:
                    raise RuntimeError(f"Input {text} is too long for context length {context_length}")
                ids = [*ids[: context_length - 1], CLIP_VOCABULARY - 1]
            row[: len(ids)] = torch.tensor(ids)
        return rows


# Models --------------------------------------------------------------------------------------------------------------


def open_clip_model(name: str, full: bool) -> nn.Module:
    """A model of open_clip by the name of its configuration, as ``@random`` loads it; or one of its kind, small."""
    import open_clip
    from helpers_eva_clip import KINDS, eva_clip
    from helpers_open_clip import tiny_clip
    from helpers_siglip import tiny_timm

    if full:
        torch.manual_seed(0)
        return open_clip.create_model(name, pretrained=None, load_weights=False).eval()
    config = open_clip.get_model_config(name)["text_cfg"]
    text = {"context_length": config["context_length"], "vocab_size": config["vocab_size"]}
    if "SigLIP" in name:
        return tiny_timm(text=text | {"act_kwargs": config.get("act_kwargs", {})})
    return eva_clip(KINDS["eva02_base"], text=text) if name.startswith("EVA02") else tiny_clip(text=text)


def eva01_giant(full: bool) -> nn.Module:
    """EVA01-g-14 with two blocks of the forty of its image tower, the text tower whole; or a small one of its kind."""
    import open_clip
    import timm
    from helpers_eva_clip import KINDS, eva_clip

    text = {"context_length": CLIP_CONTEXT, "vocab_size": CLIP_VOCABULARY}
    if not full:
        return eva_clip(KINDS["eva01_giant"], text=text)
    config = open_clip.get_model_config("EVA01-g-14")
    torch.manual_seed(0)
    # open_clip passes no depth on to timm, so that the trunk is put into its place.
    placeholder = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}
    model: Any = open_clip.CustomTextCLIP(config["embed_dim"], vision_cfg=placeholder, text_cfg=config["text_cfg"])
    model.visual.trunk = timm.create_model(
        config["vision_cfg"]["timm_model_name"], depth=2, num_classes=config["embed_dim"], global_pool="token"
    )
    model.visual.image_size = (224, 224)
    return model.eval()


def transformers_clip_model(full: bool) -> nn.Module:
    """transformers' ``CLIPModel`` as of ``openai/clip-vit-base-patch16``, or a small one with its vocabulary."""
    import transformers
    from helpers_openai_clip import shaken, transformers_config

    text = {"vocab_size": CLIP_VOCABULARY, "max_position_embeddings": CLIP_CONTEXT}
    text |= {"bos_token_id": CLIP_VOCABULARY - 2, "eos_token_id": CLIP_VOCABULARY - 1, "pad_token_id": 1}
    torch.manual_seed(0)
    if not full:
        return shaken(transformers.CLIPModel(transformers_config(text=text)))
    # The defaults of the two configurations are the base size, but for the patch side.
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config={"patch_size": 16}, text_config=text)).eval()


def transformers_siglip_model(full: bool) -> nn.Module:
    """transformers' ``SiglipModel`` as of ``google/siglip-base-patch16-224``, or a small one with its vocabulary."""
    import transformers
    from helpers_siglip import config, shaken

    text = {"vocab_size": 32000, "max_position_embeddings": SIGLIP_CONTEXT}
    text |= {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": None}
    small = config()
    torch.manual_seed(0)
    if full:
        parts = {"vision_config": {"patch_size": 16, "image_size": 224}, "text_config": text}
    else:
        parts = {"vision_config": small["vision_config"], "text_config": small["text_config"] | text}
    model = transformers.SiglipModel(transformers.SiglipConfig(**parts))
    with torch.no_grad():
        # A fresh model of transformers has zeros there; SigLIP's training starts here.
        model.logit_scale.fill_(torch.tensor(10.0).log())
        model.logit_bias.fill_(-10.0)
    return model.eval() if full else shaken(model, 0)


def original_model(kind: str, full: bool) -> nn.Module:
    """A model of the original package's class: its ViT-B/16 or its RN50, or a small one of the same kind."""
    import helpers_openai_clip as parts

    torch.manual_seed(0)
    if kind == "vit":
        embed = 512 if full else parts.EMBED
        sizes = (224, 16, 768, 12, 12) if full else (parts.IMAGE, parts.PATCH, parts.WIDTH, 3, parts.HEADS)
        visual: nn.Module = parts.VisionTransformer(*sizes, embed)
    else:
        embed = 1024 if full else parts.EMBED
        visual = (
            parts.ModifiedResNet((3, 4, 6, 3), embed, 32, 224, 64)
            if full
            else parts.ModifiedResNet((1, 2, 1, 1), embed, 4, parts.RESNET_IMAGE, parts.RESNET_WIDTH)
        )
    model: Any = parts.CLIP(visual)
    width, layers, heads = (512, 12, 8) if full else (16, 2, 2)
    # The small class of the tests has a vocabulary and a context of its own.
    model.context_length, model.vocab_size = CLIP_CONTEXT, CLIP_VOCABULARY
    model.transformer = parts.Transformer(width, layers, heads, attn_mask=model.build_attention_mask())
    model.token_embedding = nn.Embedding(CLIP_VOCABULARY, width)
    model.positional_embedding = nn.Parameter(torch.randn(CLIP_CONTEXT, width))
    model.ln_final = parts.LayerNorm(width)
    model.text_projection = nn.Parameter(torch.randn(width, embed) / width**0.5)
    if not full:
        return parts.shaken(model)
    with torch.no_grad():
        model.token_embedding.weight.normal_(std=0.02)
        model.positional_embedding.normal_(std=0.01)
    return model.eval()


# All of them ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone:
    """One backbone of the table.

    Attributes:
        family: the family that serves it.
        title: what it is, for the table.
        build: gives the model, at full size or small.
        tokenizer: gives a tokenizer, made for every adapter anew; it may take whether the model has its full size.
        tokens: what the tokenizer is, for the table.
        name: what ``load`` takes for the same, where its tokenizer is packaged.
        noise: what is added to the parameters of a model at full size; running statistics would no longer fit.
        formula: dense features ``[B, H, W, D]`` of a model and images by plain formulas, where the family has no other.
    """

    family: str
    title: str
    build: Callable[[bool], nn.Module]
    tokenizer: Callable[..., Any]
    tokens: str
    name: str | None = None
    formula: Callable[[Any, Tensor], Tensor] | None = None
    noise: float = 0.02

    def adapter(self, full: bool) -> DenseAdapter:
        """The model, wrapped as users wrap theirs; no parameter is at a special initial value, such as biases of 0."""
        model = self.build(full)
        if full:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name not in ("logit_scale", "logit_bias", "temperature"):
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=self.noise)
        sized = bool(inspect.signature(self.tokenizer).parameters)
        return wrap(model, tokenizer=self.tokenizer(full) if sized else self.tokenizer())


def _simple_tokenizer() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


OWN, PACKAGED = "its own", "open_clip's packaged vocabulary"


def _open_clip(name: str) -> Callable[[bool], nn.Module]:
    return lambda full: open_clip_model(name, full)


def _stand_in(vocabulary: int) -> str:
    return f"stand-in of {vocabulary} ids"


BACKBONES: dict[str, Backbone] = {
    "open_clip": Backbone(
        "open_clip",
        "open_clip `ViT-B-16`",
        _open_clip("ViT-B-16"),
        _simple_tokenizer,
        OWN,
        "open_clip:ViT-B-16@random",
    ),
    "eva02": Backbone(
        "eva_clip",
        "open_clip `EVA02-B-16`",
        _open_clip("EVA02-B-16"),
        _simple_tokenizer,
        OWN,
        "eva_clip:EVA02-B-16@random",
    ),
    "eva01": Backbone("eva_clip", "open_clip `EVA01-g-14`, 2 of 40 blocks", eva01_giant, _simple_tokenizer, OWN),
    "siglip": Backbone(
        "siglip",
        "open_clip `ViT-B-16-SigLIP`",
        _open_clip("ViT-B-16-SigLIP"),
        lambda: open_clip_siglip_stand_in(32000),
        _stand_in(32000),
    ),
    "siglip2": Backbone(
        "siglip",
        "open_clip `ViT-B-16-SigLIP2`",
        _open_clip("ViT-B-16-SigLIP2"),
        lambda: open_clip_siglip_stand_in(256000),
        _stand_in(256000),
    ),
    "transformers_siglip": Backbone(
        "siglip",
        "transformers `SiglipModel`, base",
        transformers_siglip_model,
        lambda: siglip_stand_in(32000),
        _stand_in(32000),
    ),
    "transformers_clip": Backbone(
        "openai_clip", "transformers `CLIPModel`, base", transformers_clip_model, clip_tokenizer, PACKAGED
    ),
    "original_vit": Backbone(
        "openai_clip", "original `clip`, ViT-B/16", lambda full: original_model("vit", full), OriginalTokenize, PACKAGED
    ),
    "original_resnet": Backbone(
        "openai_clip", "original `clip`, RN50", lambda full: original_model("resnet", full), OriginalTokenize, PACKAGED
    ),
}
