"""Architectures of the SigLIP models on transformers' hub, so that they can be built with fresh weights offline.

The numbers are from the checkpoints' published configurations: base, large and so400m are SigLIP (arXiv 2303.15343) and
SigLIP 2 (2502.14786), giant-opt is SigLIP 2 only. Pretrained weights are loaded with the model's own ``config.json``,
never with this table.
"""

from __future__ import annotations

from typing import Any

_Part = dict[str, Any]


def _tower(width: int, mlp: int, layers: int, heads: int) -> _Part:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


BASE = _tower(768, 3072, 12, 12)
LARGE = _tower(1024, 4096, 24, 16)
SO400M = _tower(1152, 4304, 27, 16)
GIANT = _tower(1536, 6144, 40, 16)
TOWERS = {"base": (BASE, BASE), "large": (LARGE, LARGE), "so400m": (SO400M, SO400M), "giant-opt": (GIANT, SO400M)}

# Size, patch side and image side of each checkpoint.
_FIRST = (
    ("base", 16, 224), ("base", 16, 256), ("base", 16, 384), ("base", 16, 512),
    ("large", 16, 256), ("large", 16, 384),
    ("so400m", 14, 224), ("so400m", 14, 384),
)  # fmt: skip
_SECOND = (
    ("base", 32, 256), ("base", 16, 224), ("base", 16, 256), ("base", 16, 384), ("base", 16, 512),
    ("large", 16, 256), ("large", 16, 384), ("large", 16, 512),
    ("so400m", 14, 224), ("so400m", 14, 384), ("so400m", 16, 256), ("so400m", 16, 384), ("so400m", 16, 512),
    ("giant-opt", 16, 256), ("giant-opt", 16, 384),
)  # fmt: skip


def _config(size: str, patch: int, image: int, text: _Part) -> _Part:
    vision, text_tower = TOWERS[size]
    return {
        "vision_config": {**vision, "patch_size": patch, "image_size": image},
        "text_config": {**text_tower, **text, "projection_size": vision["hidden_size"]},
    }


def _known() -> dict[str, _Part]:
    first = {"vocab_size": 32000, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": None}
    second = {"vocab_size": 256000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    known = {}
    for size, patch, image in _FIRST:
        # The first so400m checkpoint was trained on 16 text positions.
        context = 16 if (size, image) == ("so400m", 224) else 64
        text = {**first, "max_position_embeddings": context}
        known[f"google/siglip-{size}-patch{patch}-{image}"] = _config(size, patch, image, text)
    multilingual = {**first, "vocab_size": 250000, "max_position_embeddings": 64}
    known["google/siglip-base-patch16-256-multilingual"] = _config("base", 16, 256, multilingual)
    for size, patch, image in _SECOND:
        text = {**second, "max_position_embeddings": 64}
        known[f"google/siglip2-{size}-patch{patch}-{image}"] = _config(size, patch, image, text)
    return known


KNOWN = _known()
"""Keyword arguments of ``SiglipConfig`` by the name of the checkpoint."""
