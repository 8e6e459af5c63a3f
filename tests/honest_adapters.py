"""Correct adapters of small random models, written from the documentation, on which the kit must not fail.

They cover what the shipped families do not: text towers that need an attention mask, convolutional towers with many
BatchNorms and receptive fields larger than the image, and towers that pool by attention. :data:`HONEST` maps a name to
a function of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hashed_words import HashedWords
from torch import Tensor, nn

from ttd_plugins.adapter import BackboneDescription, DenseAdapter, ImageFeatures, ImageTransform, Tokens, Tower
from ttd_plugins.toolkit.lora_targets import linear_layers_of_blocks
from ttd_plugins.toolkit.transforms import OPENAI_NORMALISATION, DenseTransform, NativeTransform

CONTEXT, VOCABULARY = 12, 99


def words(start: int, end: int, pad: int) -> HashedWords:
    """The tokenizer of these adapters."""
    return HashedWords(start, end, pad, context=CONTEXT, vocabulary=VOCABULARY)


class HonestAdapter(DenseAdapter):
    """What the adapters below share."""

    model: Any
    family: ClassVar[str]
    image_prefixes: ClassVar[tuple[str, ...]]
    text_prefixes: ClassVar[tuple[str, ...]]
    patch: ClassVar[int]
    side: ClassVar[int]
    mode: ClassVar[str] = "plain"

    def __init__(self, model: nn.Module, tokenizer: HashedWords | None = None) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer or words(start=1, end=2, pad=0)

    @property
    def width(self) -> int:
        return 24

    @property
    def description(self) -> BackboneDescription:
        return BackboneDescription(
            family=self.family,
            model="small",
            weights="random",
            embedding_width=self.width,
            patch_size=(self.patch, self.patch),
            image_size=(self.side, self.side),
            mean=OPENAI_NORMALISATION.mean,
            std=OPENAI_NORMALISATION.std,
            interpolation=OPENAI_NORMALISATION.interpolation,
            context_length=CONTEXT,
            text_needs_full_context=False,
            logits="softmax",
            dense_mode=self.mode,
            dense_modes=(self.mode,),
        )

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        return self.tokenizer(texts)

    def native_transform(self) -> ImageTransform:
        return NativeTransform(DenseTransform((self.side, self.side), OPENAI_NORMALISATION))

    def tower_parameters(self, tower: Tower) -> Iterable[tuple[str, nn.Parameter]]:
        prefixes = self.image_prefixes if tower == "image" else self.text_prefixes
        return [(name, p) for name, p in self.model.named_parameters() if name.startswith(prefixes)]


# Towers of transformers ----------------------------------------------------------------------------------------------


class BertTextAdapter(HonestAdapter):
    """A bidirectional text tower that pools its first token: padding must be masked."""

    def encode_text(self, ids: Tensor) -> Tensor:
        mask = (ids != self.tokenizer.pad).long()
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


class AlignAdapter(BertTextAdapter):
    """transformers' ``AlignModel``: an EfficientNet that is averaged, without a projection."""

    family, patch, side = "align", 32, 96
    image_prefixes, text_prefixes = ("vision_model.",), ("text_model.", "text_projection.")

    @property
    def width(self) -> int:
        return int(self.model.text_projection.out_features)

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.pixel_grid(pixels)
        found = self.model.vision_model(pixels.to(next(self.model.vision_model.parameters()).dtype))
        patches = found.last_hidden_state.permute(0, 2, 3, 1)
        return ImageFeatures(patches, found.pooler_output if pooled else None)

    def logit_scale(self) -> Tensor:
        return (1 / self.model.temperature).reshape(())

    def lora_targets(self, tower: Tower) -> list[str]:
        if tower == "text":
            return linear_layers_of_blocks(self.model.text_model, "text_model")
        # Pointwise convolutions; depthwise ones have no low-rank update.
        return [
            name
            for name, module in self.model.named_modules()
            if name.startswith("vision_model.") and isinstance(module, nn.Conv2d) and "project_conv" in name
        ]


def align(seed: int = 0) -> DenseAdapter:
    from transformers import AlignConfig, AlignModel, AlignTextConfig, AlignVisionConfig

    text = bert_sizes(AlignTextConfig)
    vision = AlignVisionConfig(
        image_size=96, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=80, depthwise_padding=[]
    )
    torch.manual_seed(seed)
    config = AlignConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=vision.hidden_dim)
    model = AlignModel(config)
    return AlignAdapter(settled(model, lambda: model.vision_model(torch.randn(8, 3, 96, 96))))


def bert_sizes(config: Any, **more: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": CONTEXT + 4,
        "pad_token_id": 0,
    }
    return config(**(sizes | more))


class VisionTransformerAdapter(BertTextAdapter):
    """A CLIP vision tower of transformers; the value path of its last layer (MaskCLIP) is patch features."""

    patch, side, mode = 8, 32, "maskclip"
    image_prefixes = ("vision_model.", "visual_projection.")
    text_prefixes = ("text_model.", "text_projection.")

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        grid, vision = self.pixel_grid(pixels), self.model.vision_model
        x = vision.embeddings(pixels.to(vision.embeddings.patch_embedding.weight.dtype), interpolate_pos_encoding=True)
        x = vision.pre_layrnorm(x)
        for layer in vision.encoder.layers[:-1]:
            x = self.call(layer, x)
        last = vision.encoder.layers[-1]
        normed = last.layer_norm1(x)
        dense = x + last.self_attn.out_proj(last.self_attn.v_proj(normed))
        dense = dense + last.mlp(last.layer_norm2(dense))
        patches = self.project(dense[:, 1:]).unflatten(1, grid)
        return ImageFeatures(patches, self.project(self.call(last, x)[:, 0]) if pooled else None)

    def call(self, layer: Any, x: Tensor) -> Tensor:
        found = layer(x, None)
        return found[0] if isinstance(found, tuple) else found

    def project(self, x: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model.post_layernorm(x))

    def lora_targets(self, tower: Tower) -> list[str]:
        names = linear_layers_of_blocks(
            self.model.get_submodule(f"{tower_name(tower)}_model"), f"{tower_name(tower)}_model"
        )
        last = f".layers.{len(self.model.vision_model.encoder.layers) - 1}.self_attn."
        unused = tuple(f"{last}{name}" for name in ("q_proj", "k_proj"))
        return [name for name in names if tower == "text" or not name.endswith(unused)]


def tower_name(tower: Tower) -> str:
    return "vision" if tower == "image" else "text"


VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


class ChineseCLIPAdapter(VisionTransformerAdapter):
    """transformers' ``ChineseCLIPModel``."""

    family = "chinese_clip"


def chinese_clip(seed: int = 0) -> DenseAdapter:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel, ChineseCLIPTextConfig, ChineseCLIPVisionConfig

    text, vision = bert_sizes(ChineseCLIPTextConfig), ChineseCLIPVisionConfig(**VISION)
    torch.manual_seed(seed)
    config = ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return ChineseCLIPAdapter(settled(ChineseCLIPModel(config)))


class AltCLIPAdapter(VisionTransformerAdapter):
    """transformers' ``AltCLIPModel``: an XLM-R text tower, whose positions depend on the padding."""

    family = "alt_clip"


def alt_clip(seed: int = 0) -> DenseAdapter:
    from transformers import AltCLIPConfig, AltCLIPModel, AltCLIPTextConfig, AltCLIPVisionConfig

    text = bert_sizes(AltCLIPTextConfig, pad_token_id=1, bos_token_id=0, eos_token_id=2, project_dim=32)
    vision = AltCLIPVisionConfig(**VISION)
    torch.manual_seed(seed)
    config = AltCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return AltCLIPAdapter(settled(AltCLIPModel(config)), words(start=0, end=2, pad=1))


# Towers of timm ------------------------------------------------------------------------------------------------------


class TimmCLIP(nn.Module):
    """A trunk of timm with a linear head, and a causal text tower; the "library" of the adapters below."""

    def __init__(self, trunk: nn.Module, features: int, width: int = 24) -> None:
        super().__init__()
        self.trunk = trunk
        self.to_joint = nn.Linear(features, width, bias=False)
        self.words = nn.Embedding(VOCABULARY, 32)
        self.word_places = nn.Parameter(0.3 * torch.randn(CONTEXT, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.word_blocks = nn.ModuleList([layer])
        self.word_norm, self.word_to_joint = nn.LayerNorm(32), nn.Linear(32, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.to_joint(self.trunk(pixels.to(self.to_joint.weight.dtype)))

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.word_places[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in self.word_blocks:
            x = block(x, src_mask=mask)
        end = (ids == 2).int().argmax(1)
        return self.word_to_joint(self.word_norm(x[torch.arange(len(ids), device=ids.device), end]))


class TimmAdapter(HonestAdapter):
    """What adapters of :class:`TimmCLIP` share."""

    image_prefixes = ("trunk.", "to_joint.")
    text_prefixes = ("words.", "word_")

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class ConvolutionalAdapter(TimmAdapter):
    """A convolutional trunk: each position of its map passes the head as if the map were that position alone."""

    family, patch, side = "timm_conv", 32, 128

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        grid = self.pixel_grid(pixels)
        found = self.model.trunk.forward_features(pixels.to(self.model.to_joint.weight.dtype))
        alone = found.permute(0, 2, 3, 1).reshape(-1, found.shape[1], 1, 1)
        patches = self.head(alone).unflatten(0, (len(pixels), *grid))
        return ImageFeatures(patches, self.head(found) if pooled else None)

    def head(self, found: Tensor) -> Tensor:
        return self.model.to_joint(self.model.trunk.forward_head(found))

    def lora_targets(self, tower: Tower) -> list[str]:
        if tower == "text":
            return ["word_to_joint"]
        return [
            name
            for name, module in self.model.named_modules()
            if name.startswith("trunk.")
            and isinstance(module, nn.Conv2d | nn.Linear)
            and getattr(module, "kernel_size", (1, 1)) == (1, 1)
            and getattr(module, "groups", 1) == 1
            and any(part.isdigit() for part in name.split("."))
        ]


def convolutional(name: str, side: int = 128) -> Callable[[int], DenseAdapter]:
    def make(seed: int = 0) -> DenseAdapter:
        import timm

        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"layers": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128)} if "fastvit" in name else {}
        if "convnext" in name:
            sizes = {"depths": (1, 1, 2, 1), "dims": (24, 32, 48, 64), "ls_init_value": 1.0}
        trunk: Any = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, 3, side, side)).shape[-1]
        model = TimmCLIP(trunk, features)
        return ConvolutionalAdapter(settled(model, lambda: trunk(torch.randn(8, 3, side, side))))

    return make


class AttentionPooledAdapter(TimmAdapter):
    """A vision transformer of timm that pools by attention from a learned query: a patch is the pool's own value."""

    family, patch, side, mode = "timm_map", 8, 32, "value"

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        grid = self.pixel_grid(pixels)
        trunk = self.model.trunk
        x = trunk.forward_features(pixels.to(self.model.to_joint.weight.dtype))
        pool = trunk.attn_pool
        value = pool.kv(x).unflatten(-1, (2, -1))[..., 1, :]
        out = pool.proj(value)
        out = out + pool.mlp(pool.norm(out))
        patches = self.model.to_joint(out).unflatten(1, grid)
        return ImageFeatures(patches, self.model.to_joint(trunk.forward_head(x)) if pooled else None)

    def lora_targets(self, tower: Tower) -> list[str]:
        return (
            ["word_to_joint"] if tower == "text" else linear_layers_of_blocks(self.model.trunk.blocks, "trunk.blocks")
        )


def attention_pooled(seed: int = 0) -> DenseAdapter:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    trunk = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, global_pool="map",
        class_token=False, dynamic_img_size=True, dynamic_img_pad=False, drop_path_rate=0.1,
    )  # fmt: skip
    return AttentionPooledAdapter(settled(TimmCLIP(trunk, 32)))


class ResNetPooledAdapter(TimmAdapter):
    """A ResNet that pools by attention over its map, as OpenAI's RN50 does: a patch is its own value in the pool."""

    family, patch, side, mode = "timm_resnet_clip", 32, 128, "value"

    def encode_image(self, pixels: Tensor, *, pooled: bool = True) -> ImageFeatures:
        self.pixel_grid(pixels)
        trunk = self.model.trunk
        found = trunk.forward_features(pixels.to(self.model.to_joint.weight.dtype))
        tokens = found.flatten(2).transpose(1, 2)
        pool = self.model.pool
        patches = self.model.to_joint(pool.out(pool.value(tokens))).unflatten(1, found.shape[-2:])
        return ImageFeatures(patches, self.model.encode_image(pixels) if pooled else None)

    def lora_targets(self, tower: Tower) -> list[str]:
        return ["word_to_joint"] if tower == "text" else ["pool.value", "pool.out"]


class MeanQueryPool(nn.Module):
    """Attention whose query is the mean of the map, with four heads."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x.mean(1, keepdim=True)), self.key(x), self.value(x)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0])


class ResNetCLIP(TimmCLIP):
    def __init__(self, trunk: nn.Module, features: int) -> None:
        super().__init__(trunk, features)
        self.pool = MeanQueryPool(features)

    def encode_image(self, pixels: Tensor) -> Tensor:
        found: Any = self.trunk.forward_features(pixels.to(self.to_joint.weight.dtype))  # type: ignore[operator]
        return self.to_joint(self.pool(found.flatten(2).transpose(1, 2)))


ResNetPooledAdapter.image_prefixes = ("trunk.", "to_joint.", "pool.")


def resnet_pooled(seed: int = 0) -> DenseAdapter:
    import timm

    torch.manual_seed(seed)
    trunk: Any = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    model = ResNetCLIP(trunk, trunk.num_features)
    return ResNetPooledAdapter(settled(model, lambda: trunk(torch.randn(8, 3, 128, 128))))


def settled(model: nn.Module, calibrate: Callable[[], Any] | None = None) -> nn.Module:
    """The model in evaluation mode, its running statistics those of its own activations, as after training."""
    if calibrate is not None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = None
        model.train()
        with torch.no_grad():
            for _ in range(2):
                calibrate()
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


HONEST: dict[str, Callable[[int], DenseAdapter]] = {
    "align": align,
    "chinese_clip": chinese_clip,
    "alt_clip": alt_clip,
    "fastvit": convolutional("fastvit_mci0", 256),
    "convnext": convolutional("test_convnext"),
    "resnet": convolutional("test_resnet"),
    "efficientnet": convolutional("test_efficientnet"),
    "byobnet": convolutional("test_byobnet"),
    "attention_pooled": attention_pooled,
    "resnet_pooled": resnet_pooled,
}
"""Name of an honest adapter to the function that builds it from a seed."""
