"""Checks of gradients, towers and LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import TOWERS, DenseAdapter, Tower
from ttd_plugins.errors import MissingDependencyError
from ttd_plugins.method.text_embeddings import checkpointed_text_blocks
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.module_snapshot import ModuleSnapshot, same

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


def _weighted(output: Tensor) -> Tensor:
    """Return a random weighted sum of the output, since a plain sum after a LayerNorm has no gradient."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum()


def _reached(output: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> set[str]:
    """Return the names of the parameters with a nonzero gradient."""
    named = list(named)
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(_weighted(output), [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name for (name, _), g in zip(named, found, strict=True) if g is not None and bool(g.abs().max() > 0)}


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@check(
    "tower_parameters uses the model's names, and the towers share no parameter",
    "names lack a prefix, or are those of a submodule",
    "a tower is selected by a prefix that the other tower has too",
    needs=(BUILT,),
)
def tower_parameters(session: CheckSession) -> None:
    known = dict(session.adapter.model.named_parameters())
    towers: list[dict[str, Any]] = []
    for tower in TOWERS:
        own = dict(session.adapter.tower_parameters(tower))
        if not own:
            raise CheckFailed(f"parameters of the {tower} tower", "none")
        wrong = [name for name, parameter in own.items() if known.get(name) is not parameter]
        if wrong:
            raise CheckFailed("names as in model.named_parameters()", f"{_shown(wrong)} of the {tower} tower")
        towers.append(own)
    for first, second in pairwise(towers):
        both = set(first) & set(second)
        if both:
            raise CheckFailed("towers without shared parameters", f"{_shown(both)} in both")


@check(
    "gradients of patches and of the pooled embedding reach the pixels",
    "encode_image runs under torch.no_grad() or torch.inference_mode()",
    "features are detached, or pass through NumPy or PIL",
    needs=(BUILT, "image_features"),
)
def gradients_to_pixels(session: CheckSession) -> None:
    pixels = session.pixels().requires_grad_(True)
    features = session.encode(pixels)
    for name, output in (("patches", features.patches), ("pooled", features.pooled)):
        assert output is not None
        if not output.requires_grad:
            raise CheckFailed(f"{name} with a gradient", f"{name} without a gradient")
        (found,) = torch.autograd.grad(_weighted(output), pixels, retain_graph=True, allow_unused=True)
        if found is None or not bool((found.abs().flatten(1).amax(1) > 0).all()):
            raise CheckFailed(f"a gradient of {name} with respect to the pixels", "none")
        if not bool(torch.isfinite(found).all()):
            raise CheckFailed(f"a finite gradient of {name}", "values that are not finite")


@check(
    "gradients of the pooled embedding and of patches reach the parameters of the image tower",
    "a part of encode_image runs under torch.no_grad(), or its result is detached",
    "weights are read through .data, which has no gradient",
    "the blocks before the last one run in inference mode, to save memory",
    needs=(BUILT, "image_features", "tower_parameters"),
)
def gradients_to_image_parameters(session: CheckSession) -> None:
    session.adapter.model.requires_grad_(True)
    named = list(session.adapter.tower_parameters("image"))
    pixels = session.pixels(1)
    features = session.encode(pixels)
    assert features.pooled is not None
    pooled = _reached(features.pooled, named)
    patches = _reached(features.patches, named)
    own = _library_reach(session, session.image_reference, pixels.to(session.dtype), named)
    _expect_reach("the pooled embedding", pooled, own, named)
    if 2 * len(patches) < len(pooled):
        raise CheckFailed(
            f"gradients of patches reach most of the {len(pooled)} parameters that those of the pooled embedding reach",
            f"{len(patches)}, and not {_shown(pooled - patches)}",
        )


def _library_reach(
    session: CheckSession, reference: Any, given: Tensor, named: list[tuple[str, nn.Parameter]]
) -> set[str] | None:
    """Return the parameters that gradients of the library's own embedding reach, or ``None`` without such embedding."""
    try:
        own = reference(session.adapter, given)
    except Exception:
        # The checks of the embeddings report it.
        return None
    return _reached(own, named) if isinstance(own, Tensor) else None


def _expect_reach(what: str, found: set[str], own: set[str] | None, named: list[tuple[str, nn.Parameter]]) -> None:
    if own is not None:
        if own - found:
            expected = f"gradients of {what} reach every parameter that those of the library's embedding reach"
            raise CheckFailed(expected, f"no gradient for {_shown(own - found)}")
    elif 2 * len(found) < len(named):
        missing = {name for name, _ in named} - found
        expected = f"gradients of {what} reach most of the {len(named)} parameters"
        raise CheckFailed(expected, f"{len(found)}, and not {_shown(missing)}")


@check(
    "gradients of text embeddings reach the text tower's parameters, and are equal with activation checkpointing",
    "encode_text runs under torch.no_grad() or torch.inference_mode(), as for a frozen text tower",
    "word embeddings are read through .data or cached",
    "tower_blocks returns modules of the other tower, or blocks that modify their own state in a forward pass",
    needs=(BUILT, "text_features", "tower_parameters"),
)
def gradients_to_text_parameters(session: CheckSession) -> None:
    session.adapter.model.requires_grad_(True)
    named = list(session.adapter.tower_parameters("text"))
    ids = session.tokens(["a dog", "two cats on the green grass"]).ids.to(session.adapter.device)
    found = _reached(session.embed(ids), named)
    _expect_reach("the embedding", found, _library_reach(session, session.text_reference, ids, named), named)
    _expect_blocks(session, ids, [parameter for _, parameter in named])


def _expect_blocks(session: CheckSession, ids: Tensor, parameters: list[nn.Parameter]) -> None:
    """Fail unless blocks belong to their tower, and text blocks support activation checkpointing."""
    names = {id(module): name for name, module in session.adapter.model.named_modules()}
    for tower in TOWERS:
        own = {id(parameter) for _, parameter in session.adapter.tower_parameters(tower)}
        for block in session.adapter.tower_blocks(tower):
            if id(block) not in names:
                raise CheckFailed("blocks that are modules of the model", f"another {type(block).__name__}")
            if any(id(parameter) not in own for parameter in block.parameters()):
                raise CheckFailed(
                    f"blocks of the {tower} tower", f"{names[id(block)]}, whose parameters belong elsewhere"
                )

    def gradient() -> Tensor:
        found = torch.autograd.grad(_weighted(session.embed(ids)), parameters, allow_unused=True)
        complete = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        return torch.cat([g.flatten().double() for g in complete])

    plain = gradient()
    with checkpointed_text_blocks(session.adapter):
        checkpointed = gradient()
    difference = float((checkpointed - plain).norm() / plain.norm())
    # In half precision sums are rounded, in an order that a GPU may choose.
    if not difference <= (1e-4 if session.dtype in (torch.float32, torch.float64) else 0.05):
        raise CheckFailed(
            "the same gradient with activation checkpointing in the text tower",
            f"a relative difference of {difference:.2g}",
        )


@check(
    "lora_targets lists modules of the tower, each once, on whose weights patches and pooled embedding depend",
    "names are those of parameters, or lack the prefix of the tower",
    "a module and one of its submodules are both listed",
    "queries, keys or the FFN of the last block are listed though value modes do not use them for patches",
    needs=(BUILT, "tower_parameters", "gradients_to_image_parameters"),
)
def lora_targets(session: CheckSession) -> None:
    modules = dict(session.adapter.model.named_modules())
    any_target = False
    for tower in TOWERS:
        names = list(session.adapter.lora_targets(tower))
        any_target = any_target or bool(names)
        own = {id(parameter) for _, parameter in session.adapter.tower_parameters(tower)}
        if len(set(names)) != len(names):
            raise CheckFailed("every target once", f"{_shown({n for n in names if names.count(n) > 1})} more than once")
        for name in names:
            if name not in modules:
                raise CheckFailed("names as in model.named_modules()", f"{name!r}, which is not a module")
            if any(id(parameter) not in own for parameter in modules[name].parameters()):
                raise CheckFailed(f"modules of the {tower} tower", f"{name}, whose parameters belong elsewhere")
            inside = [other for other in names if other.startswith(f"{name}.")]
            if inside:
                raise CheckFailed("no target inside another one", f"{inside[0]} inside {name}")
    if not any_target:
        raise NotApplicable("lora_targets is empty, so the adapter does not support LoRA")
    pixels = session.pixels(size=session.quick_size())
    session.adapter.model.requires_grad_(True)
    features = session.encode(pixels)
    prefixes = tuple(f"{name}." for name in session.adapter.lora_targets("image"))
    weights = [(n, p) for n, p in session.adapter.tower_parameters("image") if p.ndim > 1 and n.startswith(prefixes)]
    for what, output in (("patches", features.patches), ("the pooled embedding", features.pooled)):
        assert output is not None
        cut = {name for name, _ in weights} - _reached(output, weights) if weights else set()
        if cut:
            raise CheckFailed(f"{what} depends on the weights of every target", f"not on {_shown(cut)}")


def _towers(session: CheckSession) -> list[Tower]:
    towers: list[Tower] = [tower for tower in TOWERS if session.adapter.lora_targets(tower)]
    if not towers:
        raise NotApplicable("lora_targets is empty, so the adapter does not support LoRA")
    return towers


def _with_lora(session: CheckSession, towers: list[Tower]) -> list[nn.Parameter]:
    """Add LoRA with random values, so that it has an effect, and return its parameters."""
    try:
        session.adapter.add_lora(2, towers=towers)
    except MissingDependencyError as error:
        raise NotApplicable(str(error)) from error
    session.adapter.eval()
    parameters = session.adapter.lora_parameters()
    if not parameters:
        raise CheckFailed("trainable parameters after add_lora()", "none")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return parameters


@check(
    "LoRA on every target affects patches, pooled and text embeddings exactly as if merged into the weights",
    "dense features use base weights: in_proj_weight or weight is read around the LoRA layer",
    "a weight or a submodule was stored before LoRA was added",
    "the weights of an attention module are used directly instead of calling the module",
    needs=(BUILT, "lora_targets", "deterministic", "gradients_to_image_parameters", "gradients_to_text_parameters"),
)
def lora_reaches_features(session: CheckSession) -> None:
    adapter, pixels = session.adapter, session.pixels(size=session.quick_size())
    ids = session.tokens(["a dog", "two cats on grass"]).ids
    for tower in _towers(session):
        names = adapter.lora_targets(tower)
        tuned: dict[str, Tensor] = {}
        with torch.no_grad():
            before = _outputs(session, tower, pixels, ids)
        parameters = _with_lora(session, [tower])
        labels = {id(p): name for name, p in adapter.model.named_parameters()}
        named = [(labels.get(id(p), f"LoRA parameter {i}"), p) for i, p in enumerate(parameters)]
        for what, output in _outputs(session, tower, pixels, ids).items():
            if same(output.detach(), before[what]):
                raise CheckFailed(f"{what} that LoRA changes", f"unchanged {what}")
            reached = _reached(output, named)
            # Part of a wrapped attention module may be unused, such as LoRA on the queries of value modes.
            cut = [target for target in names if not any(name.startswith(f"{target}.") for name in reached)]
            if cut:
                expected = f"a gradient of {what} for LoRA on each of {len(names)} modules"
                raise CheckFailed(expected, f"no gradient on {_shown(cut)}")
            tuned[what] = output.detach()
        # The contract's own merge, since another check tests the adapter's.
        DenseAdapter.merge(adapter)
        with torch.no_grad():
            for what, output in _outputs(session, tower, pixels, ids).items():
                session.expect_close(
                    f"{what} with LoRA and with the same LoRA merged",
                    tuned[what],
                    output,
                    tolerance=5 * session.tolerance,
                )
        session.restore()


def _outputs(session: CheckSession, tower: Tower, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    if tower == "text":
        return {"text embeddings": session.embed(ids)}
    features = session.encode(pixels)
    assert features.pooled is not None
    return {"patches": features.patches, "pooled": features.pooled}


@check(
    "unload() restores the model bitwise, and merge() preserves the effect of LoRA",
    "a LoRA layer of the family modifies the base weights in every forward pass",
    "the adapter stores a reference to a module that LoRA replaced",
    needs=(BUILT, "lora_targets", "lora_reaches_features", "model_unchanged"),
)
def lora_unloads_and_merges(session: CheckSession) -> None:
    adapter, pixels = session.adapter, session.pixels(size=session.quick_size())
    ids = session.tokens(["a dog", "two cats on grass"]).ids
    towers = _towers(session)
    snapshot = ModuleSnapshot(adapter.model)
    with torch.no_grad():
        before = _all_outputs(session, towers, pixels, ids)
        _with_lora(session, towers)
        _all_outputs(session, towers, pixels, ids)
        adapter.unload()
        changes = snapshot.changes()
        if changes:
            raise CheckFailed("an unchanged model after unload()", "; ".join(changes[:3]))
        after = _all_outputs(session, towers, pixels, ids)
        for what, value in before.items():
            session.expect_close(f"{what} after unload()", after[what], value)
        _with_lora(session, towers)
        tuned = _all_outputs(session, towers, pixels, ids)
        try:
            adapter.merge()
        except Exception as error:
            raise CheckFailed("merge() merges LoRA into the weights", error_text(error)) from error
        merged = _all_outputs(session, towers, pixels, ids)
        for what, value in tuned.items():
            session.expect_close(f"{what} after merge()", merged[what], value, tolerance=5 * session.tolerance)
        if any(name for name, _ in adapter.model.named_parameters() if "lora_" in name):
            raise CheckFailed("no LoRA left in the model after merge()", "LoRA parameters")


def _all_outputs(session: CheckSession, towers: list[Tower], pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {name: value for tower in towers for name, value in _outputs(session, tower, pixels, ids).items()}
