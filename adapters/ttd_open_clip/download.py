"""What stands between a name and its weights on disk: a hub that may be out of reach, and open_clip's logging."""

from __future__ import annotations

import json
import logging
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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


def hub_problem() -> str | None:
    """Why the model hub cannot be reached, or ``None`` if it might be.

    The hub's client repeats a look-up that cannot succeed for the better part of a minute, so its name is resolved
    first. Behind a proxy names are resolved elsewhere, and offline mode asks nobody.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"the model hub {constants.ENDPOINT} cannot be reached ({error.strerror or error})"
    return None


@contextmanager
def hub_offline(offline: bool) -> Iterator[None]:
    """Let the hub's client look into its cache only, as ``HF_HUB_OFFLINE=1`` does, where ``offline`` is set."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Keep open_clip's records off the root logger: what fails is raised, and random weights are asked for."""

    def not_from_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root = logging.getLogger()
    # Without a handler there, logging would configure the whole program for the first record.
    handler = logging.NullHandler()
    root.addFilter(not_from_open_clip)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(not_from_open_clip)
