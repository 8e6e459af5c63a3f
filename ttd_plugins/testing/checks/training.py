"""Gradients, towers and LoRA."""

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
from ttd_plugins.testing.check_session import BUILT, Session, said
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.module_snapshot import ModuleSnapshot, same

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


def _weighted(output: Tensor) -> Tensor:
    """A scalar that depends on all of the output, weighted at random: sums behind a LayerNorm have no gradient."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum()


def _reached(output: Tensor, named: Iterable[tuple[str, nn.Parameter]]) -> set[str]:
    """Names of the parameters that a gradient other than zero reaches."""
    named = list(named)
    if not output.requires_grad:
        return set()
    found = torch.autograd.grad(_weighted(output), [p for _, p in named], retain_graph=True, allow_unused=True)
    return {name for (name, _), g in zip(named, found, strict=True) if g is not None and bool(g.abs().max() > 0)}


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@check(
    "the parameters of both towers are named as in the model, and no parameter is in both",
    "names lack a prefix, or are those of a part of the model",
    "a tower is told by a prefix that the other one has too",
    needs=(BUILT,),
)
def tower_parameters(session: Session) -> None:
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
            raise CheckFailed("towers that share no parameter", f"{_shown(both)} in both")


@check(
    "gradients of patches and of the pooled embedding reach the pixels",
    "encode_image runs under torch.no_grad() or torch.inference_mode()",
    "features are detached, or go through numpy or PIL",
    needs=(BUILT, "image_features"),
)
def gradients_to_pixels(session: Session) -> None:
    pixels = session.pixels().requires_grad_(True)
    features = session.encode(pixels)
    for name, output in (("patches", features.patches), ("pooled", features.pooled)):
        assert output is not None
        if not output.requires_grad:
            raise CheckFailed(f"{name} with a gradient", f"{name} without one")
        (found,) = torch.autograd.grad(_weighted(output), pixels, retain_graph=True, allow_unused=True)
        if found is None or not bool((found.abs().flatten(1).amax(1) > 0).all()):
            raise CheckFailed(f"a gradient of {name} with respect to the pixels", "none")
        if not bool(torch.isfinite(found).all()):
            raise CheckFailed(f"a finite gradient of {name}", "values that are not finite")


@check(
    "gradients reach the parameters of the image tower, from the pooled embedding and from patches",
    "a part of encode_image runs under torch.no_grad(), or its result is detached",
    "weights are read through .data, which cuts the gradient",
    "the blocks before the last one run in inference mode, to save memory",
    needs=(BUILT, "image_features", "tower_parameters"),
)
def gradients_to_image_parameters(session: Session) -> None:
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
            f"patches reach most of the {len(pooled)} parameters that the pooled embedding reaches",
            f"{len(patches)}, and not {_shown(pooled - patches)}",
        )


def _library_reach(
    session: Session, reference: Any, given: Tensor, named: list[tuple[str, nn.Parameter]]
) -> set[str] | None:
    """Parameters that the library's own embedding reaches; ``None`` where it cannot be had."""
    try:
        own = reference(session.adapter, given)
    except Exception:
        # The checks of the embeddings themselves say so.
        return None
    return _reached(own, named) if isinstance(own, Tensor) else None


def _expect_reach(what: str, found: set[str], own: set[str] | None, named: list[tuple[str, nn.Parameter]]) -> None:
    if own is not None:
        if own - found:
            expected = f"{what} reaches every parameter that the library's reaches"
            raise CheckFailed(expected, f"not {_shown(own - found)}")
    elif 2 * len(found) < len(named):
        missing = {name for name, _ in named} - found
        raise CheckFailed(f"{what} reaches most of the {len(named)} parameters", f"{len(found)}, not {_shown(missing)}")


@check(
    "gradients of text embeddings reach the parameters of the text tower, and are the same where its blocks run twice",
    "encode_text runs under torch.no_grad() or torch.inference_mode(), as for a frozen text tower",
    "word embeddings are looked up through .data or cached",
    "tower_blocks gives modules of the other tower, or blocks that change a state of their own whenever they run",
    needs=(BUILT, "text_features", "tower_parameters"),
)
def gradients_to_text_parameters(session: Session) -> None:
    session.adapter.model.requires_grad_(True)
    named = list(session.adapter.tower_parameters("text"))
    ids = session.tokens(["a dog", "two cats on the green grass"]).ids.to(session.adapter.device)
    found = _reached(session.embed(ids), named)
    _expect_reach("the embedding", found, _library_reach(session, session.text_reference, ids, named), named)
    _expect_blocks(session, ids, [parameter for _, parameter in named])


def _expect_blocks(session: Session, ids: Tensor, parameters: list[nn.Parameter]) -> None:
    """Blocks are those of their own tower, and those of texts can run again in the backward pass."""
    names = {id(module): name for name, module in session.adapter.model.named_modules()}
    for tower in TOWERS:
        own = {id(parameter) for _, parameter in session.adapter.tower_parameters(tower)}
        for block in session.adapter.tower_blocks(tower):
            if id(block) not in names:
                raise CheckFailed("blocks that are modules of the model", f"a {type(block).__name__} that is none")
            if any(id(parameter) not in own for parameter in block.parameters()):
                raise CheckFailed(
                    f"blocks of the {tower} tower", f"{names[id(block)]}, whose parameters belong elsewhere"
                )

    def gradient() -> Tensor:
        found = torch.autograd.grad(_weighted(session.embed(ids)), parameters, allow_unused=True)
        whole = [torch.zeros_like(p) if one is None else one for p, one in zip(parameters, found, strict=True)]
        return torch.cat([one.flatten().double() for one in whole])

    once = gradient()
    with checkpointed_text_blocks(session.adapter):
        twice = gradient()
    off = float((twice - once).norm() / once.norm())
    # Half precision rounds what it adds up, in an order that a GPU is free to choose.
    if not off <= (1e-4 if session.dtype in (torch.float32, torch.float64) else 0.05):
        raise CheckFailed(
            "the same gradient where the blocks of the text tower run twice", f"one that is {off:.2g} off"
        )


@check(
    "lora_targets names modules of its own tower, each once, whose weights take part in patches and pooled alike",
    "names are those of parameters, or lack the prefix of the tower",
    "a module and one inside it are both named",
    "queries and keys of the last block are named though value modes do not use them for patches, or its FFN is",
    needs=(BUILT, "tower_parameters", "gradients_to_image_parameters"),
)
def lora_targets(session: Session) -> None:
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
                raise CheckFailed("names as in model.named_modules()", f"{name!r}, which is none")
            if any(id(parameter) not in own for parameter in modules[name].parameters()):
                raise CheckFailed(f"modules of the {tower} tower", f"{name}, whose parameters belong elsewhere")
            inside = [other for other in names if other.startswith(f"{name}.")]
            if inside:
                raise CheckFailed("no target inside another one", f"{inside[0]} inside {name}")
    if not any_target:
        raise NotApplicable("lora_targets names nothing, so the adapter takes no LoRA")
    pixels = session.pixels(size=session.quick_size())
    session.adapter.model.requires_grad_(True)
    features = session.encode(pixels)
    prefixes = tuple(f"{name}." for name in session.adapter.lora_targets("image"))
    weights = [(n, p) for n, p in session.adapter.tower_parameters("image") if p.ndim > 1 and n.startswith(prefixes)]
    for what, output in (("patches", features.patches), ("the pooled embedding", features.pooled)):
        assert output is not None
        cut = {name for name, _ in weights} - _reached(output, weights) if weights else set()
        if cut:
            raise CheckFailed(f"the weights of every target take part in {what}", f"not {_shown(cut)}")


def _towers(session: Session) -> list[Tower]:
    towers: list[Tower] = [tower for tower in TOWERS if session.adapter.lora_targets(tower)]
    if not towers:
        raise NotApplicable("lora_targets names nothing, so the adapter takes no LoRA")
    return towers


def _with_lora(session: Session, towers: list[Tower]) -> list[nn.Parameter]:
    """Put LoRA in and give all of it random values, so that it does something."""
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
    "LoRA on every target takes part in patches, pooled and text embeddings, as it would in the weights",
    "dense features are made from the base weights: in_proj_weight or weight is read past the wrapper",
    "a weight or a part of the model was kept before LoRA was added",
    "an attention module is called for its weights in place of being run",
    needs=(BUILT, "lora_targets", "deterministic", "gradients_to_image_parameters", "gradients_to_text_parameters"),
)
def lora_reaches_features(session: Session) -> None:
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
                raise CheckFailed(f"{what} that LoRA changes", f"the very same {what}")
            reached = _reached(output, named)
            # Of a wrapped attention module some may be without use, such as LoRA on the queries of value modes.
            cut = [target for target in names if not any(name.startswith(f"{target}.") for name in reached)]
            if cut:
                expected = f"a gradient of {what} for LoRA on each of {len(names)} modules"
                raise CheckFailed(expected, f"none on {_shown(cut)}")
            tuned[what] = output.detach()
        # The contract's own merge, since the adapter's is looked at elsewhere.
        DenseAdapter.merge(adapter)
        with torch.no_grad():
            for what, output in _outputs(session, tower, pixels, ids).items():
                session.expect_close(
                    f"{what} with LoRA beside the weights and with the same LoRA in them",
                    tuned[what],
                    output,
                    tolerance=5 * session.tolerance,
                )
        session.start_again()


def _outputs(session: Session, tower: Tower, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    if tower == "text":
        return {"text embeddings": session.embed(ids)}
    features = session.encode(pixels)
    assert features.pooled is not None
    return {"patches": features.patches, "pooled": features.pooled}


@check(
    "LoRA comes out again: unload() gives the model back bitwise, and merge() keeps what LoRA did",
    "a LoRA layer of the family's own writes into the base weights at every forward",
    "the adapter keeps a reference to a module that LoRA replaced",
    needs=(BUILT, "lora_targets", "lora_reaches_features", "model_unchanged"),
)
def lora_comes_out(session: Session) -> None:
    adapter, pixels = session.adapter, session.pixels(size=session.quick_size())
    ids = session.tokens(["a dog", "two cats on grass"]).ids
    towers = _towers(session)
    keeper = ModuleSnapshot(adapter.model)
    with torch.no_grad():
        before = _all_outputs(session, towers, pixels, ids)
        _with_lora(session, towers)
        _all_outputs(session, towers, pixels, ids)
        adapter.unload()
        changes = keeper.changes()
        if changes:
            raise CheckFailed("the model as it was, after unload()", "; ".join(changes[:3]))
        after = _all_outputs(session, towers, pixels, ids)
        for what, value in before.items():
            session.expect_close(f"{what} after unload()", after[what], value)
        _with_lora(session, towers)
        tuned = _all_outputs(session, towers, pixels, ids)
        try:
            adapter.merge()
        except Exception as error:
            raise CheckFailed("merge() folds LoRA into the weights", said(error)) from error
        merged = _all_outputs(session, towers, pixels, ids)
        for what, value in tuned.items():
            session.expect_close(f"{what} after merge()", merged[what], value, tolerance=5 * session.tolerance)
        if any(name for name, _ in adapter.model.named_parameters() if "lora_" in name):
            raise CheckFailed("no LoRA left in the model after merge()", "LoRA parameters")


def _all_outputs(session: Session, towers: list[Tower], pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {name: value for tower in towers for name, value in _outputs(session, tower, pixels, ids).items()}
