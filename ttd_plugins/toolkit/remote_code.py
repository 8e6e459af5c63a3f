"""Loading through transformers' Auto classes, without ever running Python code of a model folder.

Every ``Auto*.from_pretrained`` of the project is called here. Without ``trust_remote_code=False`` transformers asks on
the terminal whether it should run the code, and runs it after ``y``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttd_plugins.errors import UnsupportedModelError
from ttd_plugins.toolkit.hub import cached_file

TRUST = "trust_remote_code"
ADVICE = "such code is never run; use a model whose classes the library has itself"
OWN_CODE = f"Python code from its own folder (auto_map); {ADVICE}"
_CLASSES = (
    ("tokenizer_config.json", "AutoTokenizer", "tokenizer_class"),
    ("preprocessor_config.json", "AutoImageProcessor", "image_processor_type"),
)


def refuse_code(config: Any, where: str) -> None:
    """Raise if the content of a configuration file asks for Python code from a model folder or from a hub.

    Args:
        config: the content of a JSON file.
        where: the model, and its file where that is known, for the message.

    Raises:
        UnsupportedModelError: it sets ``trust_remote_code``, or names an attention implementation on the hub.
    """
    for key, value in _entries(config):
        if key == TRUST and value not in (False, None):
            raise UnsupportedModelError(f"{where} sets {TRUST}, which runs Python code from its folder; {ADVICE}")
        # transformers downloads a kernel of this name, and runs it.
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UnsupportedModelError(f"{where} names {value!r} as its {key}, which is code on a hub; {ADVICE}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys with their values in nested JSON, without recursion, so that depth is no problem."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield str(key), inner
                waiting.append(inner)
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def load_auto(auto_class: Any, where: str, what: str, *, cache_dir: str | None = None, **options: Any) -> Any:
    """Return ``auto_class.from_pretrained(where, ...)``, without running code of the folder and without a question.

    Args:
        auto_class: a class of transformers such as ``AutoTokenizer``, or a function that calls one with the keyword
            arguments that it gets.
        where: path of the folder, or a name on the hub.
        what: the part of a backbone that is loaded, for the message.
        cache_dir: folder for downloads; the hub client's own by default.
        options: further keyword arguments.

    Raises:
        UnsupportedModelError: the folder needs Python code of its own. Other exceptions are those of transformers.
    """
    refuse_own_classes(where, what, cache_dir)
    from_pretrained = getattr(auto_class, "from_pretrained", auto_class)
    try:
        return from_pretrained(where, cache_dir=cache_dir, **{**options, TRUST: False})
    except Exception as error:  # ValueError in most versions
        if not needs_code(error):
            raise
        raise UnsupportedModelError(f"{what} needs {OWN_CODE}") from error


def refuse_own_classes(where: str, what: str, cache_dir: str | None = None) -> None:
    """Raise if a tokenizer or image processor is of a class that only Python code of its folder defines.

    transformers replaces such a class by its own one for the kind of model, which may return other results.

    Args:
        where: path of the folder, or a name on the hub whose files are in the download cache.
        what: the part of a backbone that is loaded, for the message.
        cache_dir: folder for downloads; the hub client's own by default.

    Raises:
        UnsupportedModelError: there is such a class, or a file sets ``trust_remote_code``.
    """
    # Its import is the adapter's part.
    transformers = sys.modules.get("transformers")
    for file, auto, key in _CLASSES:
        content = _read(where, file, cache_dir)
        refuse_code(content, f"{what} ({file})")
        auto_map = content.get("auto_map")
        own = content.get(key)
        named = auto_map is not None and auto in str(auto_map)
        if named and not (isinstance(own, str) and hasattr(transformers, own)):
            raise UnsupportedModelError(f"{what} is of the class {own} in {file}, which needs {OWN_CODE}")


def _read(where: str, file: str, cache_dir: str | None) -> dict[str, Any]:
    """The JSON object in a file; empty without one. The library reports a damaged file."""
    try:
        path = Path(where) / file if Path(where).is_dir() else cached_file(where, file, cache_dir=cache_dir)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def needs_code(error: BaseException) -> bool:
    """Whether an exception of transformers says that a folder needs Python code of its own."""
    return TRUST in str(error)
