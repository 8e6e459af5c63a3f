"""Small models of OpenAI's CLIP in its containers, and the dense value path written out by hand.

The classes of the original package are written here from the architecture, with its attribute names and its forward:
sequence first, masks in the blocks, LayerNorms that compute in float32, a ResNet with an attention pool.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED, WIDTH, HEADS, PATCH, IMAGE, CONTEXT, VOCABULARY = 24, 32, 4, 8, 32, 12, 64
END = VOCABULARY - 1
GRID = IMAGE // PATCH
RESNET_IMAGE, RESNET_WIDTH = 64, 4


# transformers --------------------------------------------------------------------------------------------------------


def transformers_config(*, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    """Configuration of a small ``CLIPModel``."""
    import transformers

    tower = {"num_hidden_layers": 3, "num_attention_heads": HEADS, "projection_dim": EMBED}
    vision_config = tower | {"hidden_size": WIDTH, "intermediate_size": 64, "image_size": IMAGE, "patch_size": PATCH}
    text_config = tower | {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": END - 1,
        "eos_token_id": END,
        "pad_token_id": 0,
    }
    return transformers.CLIPConfig(
        vision_config=vision_config | (vision or {}), text_config=text_config | (text or {}), projection_dim=EMBED
    )


def transformers_clip(seed: int = 0, **config: Any) -> Any:
    """A random ``CLIPModel`` in evaluation mode, no weight or bias at a special initial value."""
    import transformers

    torch.manual_seed(seed)
    return shaken(transformers.CLIPModel(transformers_config(**config)))


def shaken(model: Any) -> Any:
    """``model`` in evaluation mode with its parameters moved away from their initial values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's vocabulary and merges, which open_clip packs, with the special tokens as transformers calls them."""
    import open_clip

    packed = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {names.get(token, token): id_ for token, id_ in packed.encoder.items()}, list(packed.bpe_ranks)


def clip_tokenizer(**options: Any) -> Any:
    """transformers' CLIPTokenizer with OpenAI's own vocabulary, built without a network."""
    import transformers

    vocabulary, merges = clip_vocabulary()
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, **options)


TRUE_VOCABULARY = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
"""Keys of ``text_config`` that fit :func:`clip_tokenizer`."""


def write_folder(folder: Any, *, seed: int = 0, text: dict[str, Any] | None = None) -> Any:
    """Save a small model, OpenAI's tokenizer and an image processor as transformers does; gives the model."""
    import transformers

    model = transformers_clip(seed, text=TRUE_VOCABULARY | (text or {}))
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
    model.save_pretrained(folder)
    transformers.CLIPProcessor(processor, clip_tokenizer(model_max_length=CONTEXT)).save_pretrained(folder)
    return model


class OldLayer(nn.Module):
    """A layer as transformers 4 has it: a causal mask by position, and a tuple as its result."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name in ("self_attn", "layer_norm1", "mlp", "layer_norm2"):
            setattr(self, name, getattr(layer, name))

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, causal_attention_mask: Any, output_attentions: bool = False
    ) -> tuple[Tensor]:
        mask = attention_mask if causal_attention_mask is None else causal_attention_mask
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), mask)[0]
        return (x + self.mlp(self.layer_norm2(x)),)


class OldModel(nn.Module):
    """transformers 4 around the modules of a newer model: embeddings come as tensors, the encoder checkpoints."""

    def __init__(self, new: Any) -> None:
        super().__init__()
        self.vision_model, self.text_model = nn.Module(), nn.Module()
        for name in ("embeddings", "pre_layrnorm", "post_layernorm"):
            setattr(self.vision_model, name, getattr(new.vision_model, name))
        for name in ("embeddings", "final_layer_norm"):
            setattr(self.text_model, name, getattr(new.text_model, name))
        for ours, theirs in ((self.vision_model, new.vision_model), (self.text_model, new.text_model)):
            ours.encoder = nn.Module()
            ours.encoder.layers = nn.ModuleList(OldLayer(layer) for layer in theirs.encoder.layers)
            ours.encoder.gradient_checkpointing = False
        self.text_model.eos_token_id = new.text_model.eos_token_id
        self.visual_projection, self.text_projection = new.visual_projection, new.text_projection
        self.logit_scale = new.logit_scale

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        x = self.text_model.embeddings(input_ids)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        for layer in self.text_model.encoder.layers:
            x = layer(x, None, mask)[0]
        x = self.text_model.final_layer_norm(x)
        end = (input_ids == self.text_model.eos_token_id).int().argmax(-1)
        return self.text_projection(x[torch.arange(len(x)), end])


# The original package ------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """Computes in float32 and gives back the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(torch.float32)).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = LayerNorm(width)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:
        self.attn_mask = None if self.attn_mask is None else self.attn_mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = image, output_dim
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn((image // patch) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inplanes != planes * 4:
            convolution = nn.Conv2d(inplanes, planes * 4, 1, stride=1, bias=False)
            steps = [("-1", nn.AvgPool2d(stride)), ("0", convolution), ("1", nn.BatchNorm2d(planes * 4))]
            self.downsample = nn.Sequential(OrderedDict(steps))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu3(out)


class AttentionPool2d(nn.Module):
    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(start_dim=2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        x = x + self.positional_embedding[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training, need_weights=False,
        )  # fmt: skip
        return x.squeeze(0)


class ModifiedResNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], output_dim: int, heads: int, image: int, width: int) -> None:
        super().__init__()
        self.output_dim, self.input_resolution = output_dim, image
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self._inplanes = width
        self.layer1 = self._make_layer(width, layers[0])
        self.layer2 = self._make_layer(width * 2, layers[1], stride=2)
        self.layer3 = self._make_layer(width * 4, layers[2], stride=2)
        self.layer4 = self._make_layer(width * 8, layers[3], stride=2)
        self.attnpool = AttentionPool2d(image // 32, width * 32, heads, output_dim)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        layers = [Bottleneck(self._inplanes, planes, stride)]
        self._inplanes = planes * 4
        layers += [Bottleneck(self._inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def trunk(self, x: Tensor) -> Tensor:
        x = x.type(self.conv1.weight.dtype)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu3(self.bn3(self.conv3(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.attnpool(self.trunk(x))


class CLIP(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.context_length, self.vocab_size = CONTEXT, VOCABULARY
        self.visual = visual
        self.transformer = Transformer(16, 2, 2, attn_mask=self.build_attention_mask())
        self.token_embedding = nn.Embedding(VOCABULARY, 16)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, 16))
        self.ln_final = LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, EMBED) / 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def build_attention_mask(self) -> Tensor:
        return torch.full((self.context_length, self.context_length), float("-inf")).triu_(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.type(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text).type(self.dtype) + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """What the original package does on a GPU: convolutions, linear layers and projections in half precision alone."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = module.weight.data.to(dtype)
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
        if isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "in_proj_bias"):
                getattr(module, name).data = getattr(module, name).data.to(dtype)
        for name in ("text_projection", "proj"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                getattr(module, name).data = getattr(module, name).data.to(dtype)
    return model


def original_vit(image: int = IMAGE, seed: int = 0) -> Any:
    """A random model of the original package around a vision transformer, in evaluation mode."""
    torch.manual_seed(seed)
    return shaken(CLIP(VisionTransformer(image, PATCH, WIDTH, 3, HEADS, EMBED)))


def original_resnet(image: int = RESNET_IMAGE, seed: int = 0) -> Any:
    """A random model of the original package around a ResNet, in evaluation mode."""
    torch.manual_seed(seed)
    return shaken(CLIP(ModifiedResNet((1, 2, 1, 1), EMBED, 4, image, RESNET_WIDTH)))


BUILDS = {"transformers": transformers_clip, "original_vit": original_vit, "original_resnet": original_resnet}
VITS = ("transformers", "original_vit")


# What all have in common ---------------------------------------------------------------------------------------------


def unit(build: str) -> int:
    """Pixels of a patch side."""
    return 32 if build == "original_resnet" else PATCH


def library_image(model: Any, images: Tensor) -> Tensor:
    """Pooled image embeddings by the library's own function."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(images).pooler_output
    return model.encode_image(images)


def library_text(model: Any, ids: Tensor) -> Tensor:
    """Text embeddings by the library's own function."""
    if hasattr(model, "vision_model"):
        out = model.get_text_features(input_ids=ids)
        return out if isinstance(out, Tensor) else out.pooler_output
    return model.encode_text(ids)


def pixels(count: int = 2, height: int = IMAGE, width: int = IMAGE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def pixels_of(build: str, count: int = 2, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Random images of the size that a model was built for, or of a grid."""
    side = unit(build)
    native = RESNET_IMAGE if build == "original_resnet" else IMAGE
    return pixels(count, native if rows is None else rows * side, native if columns is None else columns * side)


def token_rows(lengths: list[int], context: int = CONTEXT, seed: int = 2) -> Tensor:
    """Random token ids with the end token as the last of each row's ``lengths``, zeros behind."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        row[length - 1] = END
    return rows


class Words:
    """Words to ids, with the signature and the habits of ``clip.tokenize``: int32, and an error if too long."""

    def __call__(self, texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int)
        for row, one in zip(rows, texts, strict=True):
            ids = [END - 1, *(1 + sum(word.encode()) % (END - 2) for word in one.split()), END]
            if len(ids) > context_length:
                if not truncate:
                    raise RuntimeError(f"Input {one} is too long for context length {context_length}")
                ids = [*ids[: context_length - 1], END]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def parts(model: Any) -> dict[str, Any]:
    """The parts of a vision transformer under one set of names, with queries, keys and values as functions."""
    if hasattr(model, "vision_model"):
        vision = model.vision_model
        last, attn = vision.encoder.layers[-1], vision.encoder.layers[-1].self_attn
        e = vision.embeddings
        return {
            "conv": e.patch_embedding, "class": e.class_embedding, "positions": e.position_embedding.weight,
            "pre": vision.pre_layrnorm, "post": vision.post_layernorm, "project": model.visual_projection.weight.T,
            "earlier": [lambda x, one=one: one(x, None) for one in vision.encoder.layers[:-1]],
            "norm1": last.layer_norm1, "norm2": last.layer_norm2, "mlp": last.mlp, "out": attn.out_proj,
            "weights": [(p.weight, p.bias) for p in (attn.q_proj, attn.k_proj, attn.v_proj)],
        }  # fmt: skip
    visual = model.visual
    last = visual.transformer.resblocks[-1]
    w, b = last.attn.in_proj_weight, last.attn.in_proj_bias
    return {
        "conv": visual.conv1, "class": visual.class_embedding, "positions": visual.positional_embedding,
        "pre": visual.ln_pre, "post": visual.ln_post, "project": visual.proj,
        "earlier": [lambda x, o=o: o(x.transpose(0, 1)).transpose(0, 1) for o in visual.transformer.resblocks[:-1]],
        "norm1": last.ln_1, "norm2": last.ln_2, "mlp": last.mlp, "out": last.attn.out_proj,
        "weights": [(w[i * WIDTH : (i + 1) * WIDTH], b[i * WIDTH : (i + 1) * WIDTH]) for i in range(3)],
    }  # fmt: skip


def resampled(table: Tensor, source: int, grid: tuple[int, int], a: float) -> Tensor:
    """A position table ``[1 + source**2, W]`` at another grid."""
    if grid == (source, source):
        return table
    picture = bicubic(table[1:].unflatten(0, (source, source)), grid, a)
    return torch.cat([table[:1], picture.flatten(0, 1)])


def bicubic(picture: Tensor, size: tuple[int, int], a: float) -> Tensor:
    """A picture ``[H, W, C]`` resampled by the cubic convolution kernel (Keys 1981), written out tap by tap.

    ``a`` is -0.75 in torch's plain resampling, where taps beyond the border repeat the border. It is -0.5 in its
    antialiased one, where such taps are left out of the average and the kernel is widened where a picture shrinks.
    """

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def matrix(source: int, target: int) -> Tensor:
        weights = torch.zeros(target, source, dtype=torch.float64)
        ratio = source / target
        antialias = a == -0.5
        widening = max(ratio, 1.0) if antialias else 1.0
        for row in range(target):
            centre = (row + 0.5) * ratio
            for tap in range(-4 * source, 5 * source):
                value = kernel((tap + 0.5 - centre) / widening)
                if 0 <= tap < source or not antialias:
                    weights[row, min(max(tap, 0), source - 1)] += value
        return weights / weights.sum(1, keepdim=True)

    rows, columns = matrix(picture.shape[0], size[0]), matrix(picture.shape[1], size[1])
    return torch.einsum("ph,qw,hwc->pqc", rows, columns, picture.double()).to(picture.dtype)


def reference_dense(
    model: Any, images: Tensor, attention: str = "value", residual: bool = True, ffn: bool = True, std: float = 5.0
) -> Tensor:
    """Dense features ``[B, H, W, D]`` of a vision transformer by plain formulas, head by head."""
    p = parts(model)
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    x = p["conv"](images).flatten(2).transpose(1, 2)
    a = -0.75 if hasattr(model, "vision_model") else -0.5
    x = torch.cat([p["class"].expand(len(x), 1, -1), x], dim=1) + resampled(p["positions"], GRID, (rows, columns), a)
    x = p["pre"](x)
    for block in p["earlier"]:
        x = block(x)
    normed = p["norm1"](x)
    q, k, v = (normed @ weight.T + bias for weight, bias in p["weights"])
    side = WIDTH // HEADS
    mixed = torch.zeros_like(v)
    for head in range(HEADS):
        part = slice(head * side, (head + 1) * side)
        qh, kh, vh = q[..., part], k[..., part], v[..., part]
        similar = {"qq": [qh @ qh.mT], "kk": [kh @ kh.mT], "plain": [qh @ kh.mT], "qq+kk": [qh @ qh.mT, kh @ kh.mT]}
        if attention == "value":
            mixed[..., part] = vh
        elif attention == "kk+window":
            scores = kh @ kh.mT / side**0.5
            for a in range(rows * columns):
                for b in range(rows * columns):
                    squared = (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2
                    scores[:, 1 + a, 1 + b] += torch.exp(torch.tensor(-squared / (2 * std**2)))
            mixed[..., part] = scores.softmax(-1) @ vh
        else:
            mixed[..., part] = sum((s / side**0.5).softmax(-1) @ vh for s in similar[attention])
    branch = mixed @ p["out"].weight.T + p["out"].bias
    out = branch + x if residual else branch
    if ffn:
        out = out + p["mlp"](p["norm2"](out))
    return (p["post"](out[:, 1:]) @ p["project"]).reshape(len(images), rows, columns, -1)


def reference_cells(model: Any, images: Tensor) -> Tensor:
    """Dense features ``[B, H, W, D]`` of a ResNet: value and output projection of each cell."""
    cells = model.visual.trunk(images).permute(0, 2, 3, 1)
    pool = model.visual.attnpool
    return (cells @ pool.v_proj.weight.T + pool.v_proj.bias) @ pool.c_proj.weight.T + pool.c_proj.bias


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must not change behind the caller's back."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": sum(
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "masks": [id(block.attn_mask) for block in model.modules() if hasattr(block, "attn_mask")],
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """Compare a model with its snapshot, tensors bit for bit and keys in order."""
    after = snapshot(model)
    assert list(before["state"]) == list(after["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in ("ids", "modules", "flags", "hooks", "attributes", "masks"):
        assert before[part] == after[part], part


def cosine_gap(a: Tensor, b: Tensor) -> float:
    """One less the smallest cosine of matching vectors."""
    a, b = (t.detach().flatten(0, -2).float() for t in (a, b))
    return float(1 - F.cosine_similarity(a, b, dim=-1).min())
