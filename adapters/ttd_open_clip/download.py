"""What an open_clip model says of itself before its weights are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB, FOLDER = "hf-hub:", "local-dir:"


def own_config(open_clip: Any, model: str, cache_dir: str | None) -> dict[str, Any]:
    """The ``model_cfg`` of a hub model or a local folder; whatever open_clip raises comes through."""
    if model.startswith(HUB):
        from open_clip.pretrained import download_pretrained_from_hf

        path = download_pretrained_from_hf(
            model.removeprefix(HUB), filename="open_clip_config.json", cache_dir=cache_dir
        )
        config = json.loads(Path(path).read_text(encoding="utf-8")).get("model_cfg")
    else:
        config = open_clip.get_model_config(model)
    if not isinstance(config, dict) or not isinstance(config.get("vision_cfg"), dict):
        raise ValueError("open_clip_config.json has no model_cfg with a vision_cfg")
    return config


def uses_hub(config: Mapping[str, Any]) -> bool:
    """Whether an architecture takes its tokenizer or the shape of its text tower from the hub, whatever its weights."""
    text = config.get("text_cfg", {})
    return bool(text.get("hf_tokenizer_name") or text.get("hf_model_name"))
