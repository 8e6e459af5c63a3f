"""Export of models of transformers as a ``save_pretrained`` folder. The module ``transformers`` is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttd_plugins.adapter import DenseAdapter, ExportedModel
from ttd_plugins.errors import TTDError, UnsupportedModelError, one_sentence
from ttd_plugins.toolkit.exporting import ALTERNATIVES, exportable_state_dict, require_same_embeddings, save_tokenizer


def export_transformers(
    adapter: DenseAdapter,
    folder: Path,
    *,
    transformers: Any,
    tokenizer: Any,
    processor: Any,
    notes: tuple[str, ...] = (),
) -> ExportedModel:
    """Write model, tokenizer and image processor, then load the model again and check that its embeddings are the same.

    Args:
        adapter: adapter of a model of transformers without LoRA.
        folder: an empty folder.
        transformers: the module.
        tokenizer: saved if it has a ``save_pretrained``; otherwise a note says that it is absent.
        processor: an image processor of transformers.
        notes: further notes for the result.

    Raises:
        UnsupportedModelError: transformers has no such class, or the model that it loads differs.
        OSError, safetensors.SafetensorError: the folder cannot be written.
    """
    model: Any = adapter.model
    name, kind = adapter.description.name, type(model).__name__
    own_class = getattr(transformers, kind, None)
    if own_class is None or not isinstance(model, own_class):
        raise UnsupportedModelError(
            f"{name} cannot be exported for transformers: it is a {type(model).__module__}.{kind}, which transformers "
            f"does not have; {ALTERNATIVES}"
        )
    try:
        with _quiet(transformers):
            model.save_pretrained(str(folder), state_dict=exportable_state_dict(model))
            rebuilt, report = own_class.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except TTDError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) is not None or type(error).__name__ == "SafetensorError":
            raise
        raise UnsupportedModelError(
            f"{name} cannot be exported: transformers cannot save and load it ({one_sentence(error)}); {ALTERNATIVES}"
        ) from error
    absent = sorted(map(str, report["missing_keys"]))
    if absent:
        raise UnsupportedModelError(
            f"{name} cannot be exported: transformers omits {len(absent)} tensors when it loads the model again, such "
            f"as {absent[0]}; {ALTERNATIVES}"
        )
    require_same_embeddings(adapter, rebuilt.to(next(model.parameters()).dtype), "transformers")
    processor.save_pretrained(str(folder))
    more = ['processor = transformers.AutoImageProcessor.from_pretrained("PATH")']
    missing = save_tokenizer(tokenizer, folder, "use the one that the model was trained with")
    more += [] if missing else ['tokenizer = transformers.AutoTokenizer.from_pretrained("PATH")']
    load = f'model = transformers.{kind}.from_pretrained("PATH")'
    own_name = f"{adapter.description.family}:PATH"
    return ExportedModel("transformers", load, tuple(more), own_name, (*([missing] if missing else []), *notes))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and warnings of transformers."""
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
