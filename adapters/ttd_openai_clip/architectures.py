"""The published architectures of OpenAI's vision transformers, as configurations of transformers' ``CLIPModel``.

With them ``@random`` needs no network. The numbers are from table 20 of the CLIP paper (arXiv 2103.00020).
"""

from __future__ import annotations

from typing import Any

SHORT_NAMES = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}
"""Names of the architectures in the paper (``/`` may replace the hyphens), and on the model hub."""


def _configuration(
    *, patch: int, image: int, width: int, layers: int, text_width: int, embedding: int
) -> dict[str, Any]:
    def tower(width: int, layers: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "projection_dim": embedding,
            "hidden_act": "quick_gelu",
        }

    return {
        "projection_dim": embedding,
        "vision_config": tower(width, layers) | {"patch_size": patch, "image_size": image},
        "text_config": tower(text_width, 12)
        | {
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
    }


_BASE: dict[str, Any] = {"image": 224, "width": 768, "layers": 12, "text_width": 512, "embedding": 512}
_LARGE: dict[str, Any] = {"patch": 14, "width": 1024, "layers": 24, "text_width": 768, "embedding": 768}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-base-patch32": _configuration(patch=32, **_BASE),
    "openai/clip-vit-base-patch16": _configuration(patch=16, **_BASE),
    "openai/clip-vit-large-patch14": _configuration(image=224, **_LARGE),
    "openai/clip-vit-large-patch14-336": _configuration(image=336, **_LARGE),
}
"""Keyword arguments of ``CLIPConfig`` by hub name."""


def hub_name(model: str) -> str:
    """The hub name of a short name; any other name unchanged."""
    return SHORT_NAMES.get(model.replace("/", "-"), model)
