"""Tiny open_clip models from configurations, and the last block written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

EMBED, WIDTH, PATCH, IMAGE, CONTEXT, VOCABULARY = 24, 32, 8, 32, 12, 64
END = VOCABULARY - 1
GRID = IMAGE // PATCH


def tiny_clip(
    *,
    custom_text: bool = False,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random CLIP of some 60,000 parameters in evaluation mode, no weight or bias at a special initial value."""
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    vision_cfg = {"layers": 3, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "image_size": IMAGE}
    text_cfg = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    model = kind(embed_dim=EMBED, vision_cfg=vision_cfg | (vision or {}), text_cfg=text_cfg | (text or {}), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pixels(count: int = 2, height: int = IMAGE, width: int = IMAGE, seed: int = 1) -> Tensor:
    """Random images ``[count, 3, height, width]``."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def token_rows(lengths: list[int], context: int = CONTEXT, seed: int = 2) -> Tensor:
    """Random token ids with the end token as the last of each row's ``lengths``, zeros behind."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.randint(1, END, (length - 1,), generator=generator)
        row[length - 1] = END
    return rows


class WordTokenizer:
    """Words to ids by hashing, with open_clip's calling convention: start 62, end 63, padding 0."""

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, one in zip(rows, texts, strict=True):
            words = [1 + sum(word.encode()) % (END - 2) for word in one.split()]
            ids = [END - 1, *words[: length - 2], END]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def tokens_before_last_block(model: Any, images: Tensor) -> Tensor:
    """Tokens ``[B, 1 + P, W]`` that enter the last block, through open_clip's own ``_embeds``."""
    x = model.visual._embeds(images)
    for block in list(model.visual.transformer.resblocks)[:-1]:
        x = block(x)
    return x


def reference_dense(model: Any, images: Tensor, attention: str, residual: bool, ffn: bool, std: float = 5.0) -> Tensor:
    """Dense features ``[B, H, W, D]`` by plain formulas, patch by patch and head by head; plain attention only."""
    block = model.visual.transformer.resblocks[-1]
    x = tokens_before_last_block(model, images)
    normed = block.ln_1(x)
    width, heads = x.shape[-1], block.attn.num_heads
    side = width // heads
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    q, k, v = (normed @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in range(3))
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    mixed = torch.zeros_like(v)
    for head in range(heads):
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
    branch = block.attn.out_proj(mixed)
    branch = block.ls_1(block.ln_attn(branch) if hasattr(block, "ln_attn") else branch)
    out = branch + x if residual else branch
    if ffn:
        out = out + block.ls_2(block.mlp(block.ln_2(out)))
    out = model.visual.ln_post(out[:, 1:])
    out = out if model.visual.proj is None else out @ model.visual.proj
    return out.reshape(len(images), rows, columns, -1)


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
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    """Compare a model with its snapshot, tensors bit for bit and keys in order."""
    after = snapshot(model)
    assert list(before["state"]) == list(after["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in ("ids", "modules", "flags", "hooks", "attributes"):
        assert before[part] == after[part], part


def cosine_gap(a: Tensor, b: Tensor) -> float:
    """One less the smallest cosine of matching vectors."""
    return float(1 - F.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2), dim=-1).min())


def write_tiny_folder(folder: Path, *, weights: bool = True) -> Path:
    """A folder as ``open_clip:tiny`` has one, with a random model and a byte-level tokenizer trained on a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from ttd_open_clip.tiny import build_tiny

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["a cat and a dog on the grass"] * 4, trainer)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "vision_cfg": {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH, "image_size": IMAGE},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": tokenizer.get_vocab_size(),
                "width": 16,
                "heads": 2,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "ttd.json").write_text(
        json.dumps({"dense_mode": "value_only", "calibration": {"scale": 8.0, "shift": -2.0}})
    )
    if weights:
        torch.manual_seed(5)
        state = {name: tensor.half().contiguous() for name, tensor in build_tiny(config).state_dict().items()}
        save_file(state, folder / "model.safetensors")
    return folder
