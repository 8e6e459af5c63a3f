"""Models of transformers, written as the folder that ``save_pretrained`` makes; the module itself is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttd_plugins.adapter import DenseAdapter, ExportedModel
from ttd_plugins.errors import TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.toolkit.exporting import WAY_OUT, require_same, save_tokenizer, state_of


def export_transformers(
    adapter: DenseAdapter,
    folder: Path,
    *,
    transformers: Any,
    tokenizer: Any,
    processor: Any,
    notes: tuple[str, ...] = (),
) -> ExportedModel:
    """Write model, tokenizer and image processor, and load the model again to see that the embeddings are the same.

    Args:
        adapter: its model is one of transformers, with no LoRA in it.
        folder: an empty folder.
        transformers: the module.
        tokenizer: one with a ``save_pretrained``; any other is left out, and a note says so.
        processor: an image processor of transformers.
        notes: further notes for the result.

    Raises:
        UnsupportedModelError: the model is of no class of transformers, or what is loaded again differs.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    model: Any = adapter.model
    name, kind = adapter.description.name, type(model).__name__
    own_class = getattr(transformers, kind, None)
    if own_class is None or not isinstance(model, own_class):
        raise UnsupportedModelError(
            f"{name} cannot be exported for transformers: it is a {type(model).__module__}.{kind}, which transformers "
            f"does not have; {WAY_OUT}"
        )
    try:
        with _quiet(transformers):
            model.save_pretrained(str(folder), state_dict=state_of(model))
            rebuilt, report = own_class.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except TTDError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None or type(error).__name__ == "SafetensorError":
            raise
        raise UnsupportedModelError(
            f"{name} cannot be exported: transformers does not save and load it ({one_sentence(error)}); {WAY_OUT}"
        ) from error
    absent = sorted(map(str, report["missing_keys"]))
    if absent:
        raise UnsupportedModelError(
            f"{name} cannot be exported: transformers leaves out {len(absent)} tensors when it loads it again, such as "
            f"{absent[0]}; {WAY_OUT}"
        )
    require_same(adapter, rebuilt.to(next(model.parameters()).dtype), "transformers")
    processor.save_pretrained(str(folder))
    more = ['processor = transformers.AutoImageProcessor.from_pretrained("PATH")']
    missing = save_tokenizer(tokenizer, folder, "take the one that the model was trained with")
    more += [] if missing else ['tokenizer = transformers.AutoTokenizer.from_pretrained("PATH")']
    load = f'model = transformers.{kind}.from_pretrained("PATH")'
    back = f"{adapter.description.family}:PATH"
    return ExportedModel("transformers", load, tuple(more), back, (*([missing] if missing else []), *notes))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Neither progress bars nor warnings of transformers, as long as the context lasts."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
