"""The check of export: files hold the model as it is now."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import MissingDependencyError, TTDError
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.probes import perturb

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

READABLE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@check(
    "export() writes the weights that the model has at the time of the call",
    "a state dict is copied when the adapter is created",
    "nothing is written, or only a part of the model",
    needs=(BUILT, "image_features"),
)
def export_holds_model(session: CheckSession) -> None:
    adapter = session.adapter
    if type(adapter).export is DenseAdapter.export:
        raise NotApplicable("the family does not implement export")
    with tempfile.TemporaryDirectory() as folder:
        before = _export(session, Path(folder) / "before")
        perturb(adapter.model)
        after = _export(session, Path(folder) / "after")
    sizes = sum(parameter.numel() for parameter in adapter.model.parameters())
    if isinstance(before, dict) and isinstance(after, dict) and (before or after):
        written = sum(tensor.numel() for tensor in after.values())
        if written < 0.9 * sizes:
            raise CheckFailed(f"files with the {sizes} weights of the model", f"files with {written}")
        fixed = [buffer.flatten() for buffer in adapter.model.buffers() if buffer.is_floating_point()]
        stale = [name for name, tensor in after.items() if name in before and _is_stale(tensor, before[name], fixed)]
        if stale:
            raise CheckFailed(
                "files with other weights after the weights changed",
                f"{stale[0]} and {len(stale) - 1} more are as before",
            )


def _is_stale(tensor: Tensor, before: Tensor, fixed: list[Tensor]) -> bool:
    """Return whether a weight is as before; buffers (``fixed``) and constants may be."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.shape != before.shape:
        return False
    if not torch.equal(tensor, before) or float(tensor.float().std()) == 0:
        return False
    flat = tensor.flatten()
    return not any(len(one) == len(flat) and torch.equal(one.to(flat), flat) for one in fixed)


def _export(session: CheckSession, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the files that export() writes, by file and name.

    Raises:
        NotApplicable: the family or its library cannot export this model, or the files are of an unknown format.
        CheckFailed: export() raises something else, or writes no file.
    """
    folder.mkdir()
    try:
        session.adapter.export(folder)
    except (TTDError, MissingDependencyError) as error:
        raise NotApplicable(f"export is not possible here: {error_text(error)}") from error
    except Exception as error:
        raise CheckFailed("export() writes the model, or raises UnsupportedModelError", error_text(error)) from error
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not files:
        raise CheckFailed("files with the weights of the model", "no file")
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix in READABLE:
            found.update({f"{file.relative_to(folder)}: {name}": t for name, t in _read(file).items()})
    if not found and sum(file.stat().st_size for file in files) < sum(
        p.numel() for p in session.adapter.model.parameters()
    ):
        raise CheckFailed("files with the weights of the model", f"{len(files)} files that are too small for them")
    if not found:
        raise NotApplicable(f"the kit cannot read {', '.join(file.name for file in files[:3])}")
    return found


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights; nothing if it is another file."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(file))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return {}
    while isinstance(content, dict) and len(content) < 8 and any(isinstance(v, dict) for v in content.values()):
        content = next(value for value in content.values() if isinstance(value, dict))
    if not isinstance(content, dict):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
