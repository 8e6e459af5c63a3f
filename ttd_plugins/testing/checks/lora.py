"""Checks of LoRA and of the ways out of tuning: targets, effect, merge() and unload()."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor, nn

from ttd_plugins.adapter import TOWERS, DenseAdapter, Tower
from ttd_plugins.errors import MissingDependencyError
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.module_snapshot import ModuleSnapshot, same
from ttd_plugins.testing.probes import fill_zeros, perturb, reached, shown

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


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
            raise CheckFailed("every target once", f"{shown({n for n in names if names.count(n) > 1})} more than once")
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
    # A library may initialise the scale of a branch with zero, and then nothing depends on the branch yet.
    fill_zeros(session.adapter.model)
    features = session.encode(pixels)
    prefixes = tuple(f"{name}." for name in session.adapter.lora_targets("image"))
    weights = [(n, p) for n, p in session.adapter.tower_parameters("image") if p.ndim > 1 and n.startswith(prefixes)]
    for what, output in (("patches", features.patches), ("the pooled embedding", features.pooled)):
        assert output is not None
        cut = {name for name, _ in weights} - reached(output, weights) if weights else set()
        if cut:
            raise CheckFailed(f"{what} depends on the weights of every target", f"not on {shown(cut)}")


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


def _forgotten_siblings(session: CheckSession, tower: Tower, pixels: Tensor, ids: Tensor) -> list[str]:
    """Return layers that are no targets though they are of a target's name and class in another block, and are used."""
    model, names = session.adapter.model, session.adapter.lora_targets(tower)
    modules = dict(model.named_modules())
    kinds = {(_pattern(name), type(modules[name])) for name in names}
    others = [
        name
        for name, module in modules.items()
        # peft wraps no grouped convolution of every rank.
        if name not in names and (_pattern(name), type(module)) in kinds and getattr(module, "groups", 1) == 1
    ]
    if not others:
        return []
    model.requires_grad_(True)
    weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and n.rpartition(".")[0] in others]
    outputs = _outputs(session, tower, pixels, ids).values()
    used = set.intersection(*(reached(output, weights) for output in outputs))
    session.restore()
    return [name for name in others if any(weight.rpartition(".")[0] == name for weight in used)]


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


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
        siblings = _forgotten_siblings(session, tower, pixels, ids)
        # LoRA of the user's own may be on them.
        every = [*names, *siblings]
        vars(adapter)["lora_targets"] = lambda which, own=tower, every=every: (
            every if which == own else type(adapter).lora_targets(adapter, which)
        )
        fill_zeros(adapter.model)
        tuned: dict[str, Tensor] = {}
        with torch.no_grad():
            before = _outputs(session, tower, pixels, ids)
        parameters = _with_lora(session, [tower])
        labels = {id(p): name for name, p in adapter.model.named_parameters()}
        named = [(labels.get(id(p), f"LoRA parameter {i}"), p) for i, p in enumerate(parameters)]
        for what, output in _outputs(session, tower, pixels, ids).items():
            if same(output.detach(), before[what]):
                raise CheckFailed(f"{what} that LoRA changes", f"unchanged {what}")
            found = reached(output, named)
            # Part of a wrapped attention module may be unused, such as LoRA on the queries of value modes.
            cut = [target for target in every if not any(name.startswith(f"{target}.") for name in found)]
            if cut and set(cut) <= set(siblings):
                expected = (
                    f"LoRA on {shown(cut)}, which no target is but the same layer of other blocks, affects {what}"
                )
                raise CheckFailed(expected, "the layer is not called: its base weight is read")
            if cut:
                expected = f"a gradient of {what} for LoRA on each of {len(names)} modules"
                raise CheckFailed(expected, f"no gradient on {shown(cut)}")
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
    "unload() restores the model bitwise, and merge() leaves exactly the weights, flags and buffers of merged LoRA",
    "a LoRA layer of the family modifies the base weights in every forward pass",
    "the adapter stores a reference to a module that LoRA replaced",
    "running statistics of batch norms move while LoRA trains, and unload() does not restore them",
    "merge() or unload() is overridden and leaves requires_grad, or weights that are no targets, changed",
    needs=(BUILT, "lora_targets", "lora_reaches_features", "model_unchanged"),
)
def lora_unloads_and_merges(session: CheckSession) -> None:
    adapter, pixels = session.adapter, session.pixels(size=session.quick_size())
    ids = session.tokens(["a dog", "two cats on grass"]).ids
    towers = _towers(session)
    _alternate_flags(adapter.model)
    snapshot = ModuleSnapshot(adapter.model)
    with torch.no_grad():
        before = _all_outputs(session, towers, pixels, ids)
        _with_lora(session, towers)
        _step_in_training_mode(session, pixels, ids)
        adapter.unload()
        changes = snapshot.changes()
        if changes:
            raise CheckFailed("an unchanged model after training with LoRA and unload()", "; ".join(changes[:3]))
        after = _all_outputs(session, towers, pixels, ids)
        for what, value in before.items():
            session.expect_close(f"{what} after unload()", after[what], value)
        _with_lora(session, towers)
        DenseAdapter.merge(adapter)
        expected = {name: tensor.clone() for name, tensor in _tensors(adapter.model).items()}
        session.restore()
        _alternate_flags(adapter.model)
        _with_lora(session, towers)
        tuned = _all_outputs(session, towers, pixels, ids)
        try:
            adapter.merge()
        except Exception as error:
            raise CheckFailed("merge() merges LoRA into the weights", error_text(error)) from error
        _expect_merged(session, expected)
        merged = _all_outputs(session, towers, pixels, ids)
        for what, value in tuned.items():
            session.expect_close(f"{what} after merge()", merged[what], value, tolerance=5 * session.tolerance)


def _expect_merged(session: CheckSession, expected: dict[str, Tensor]) -> None:
    """Fail unless the model has exactly the expected tensors, and the flags of :func:`_alternate_flags`."""
    found = _tensors(session.adapter.model)
    if any("lora_" in name for name in found):
        raise CheckFailed("no LoRA left in the model after merge()", "LoRA parameters")
    other = sorted(set(found) ^ set(expected))
    other += [n for n, tensor in expected.items() if n in found and not same(found[n], tensor)]
    if other and session.adapter.device.type == "cpu":
        raise CheckFailed(
            "base weights plus LoRA after merge(), and every other tensor unchanged", f"other {shown(other)}"
        )
    flags = [parameter.requires_grad for parameter in session.adapter.model.parameters()]
    if flags != [index % 3 != 1 for index in range(len(flags))]:
        raise CheckFailed("requires_grad of every parameter after merge() as before add_lora()", "other flags")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _alternate_flags(model: nn.Module) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 1 and parameter.is_floating_point())


def _step_in_training_mode(session: CheckSession, pixels: Tensor, ids: Tensor) -> None:
    """Run both towers in training mode, as a training step does, and return to evaluation mode."""
    adapter = session.adapter
    adapter.train()
    session.encode(pixels)
    session.embed(ids)
    adapter.eval()


def _all_outputs(session: CheckSession, towers: list[Tower], pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    return {name: value for tower in towers for name, value in _outputs(session, tower, pixels, ids).items()}


@check(
    "after snapshot_weights() and full fine-tuning, unload() restores weights, buffers and flags bitwise",
    "snapshot_weights() or unload() is overridden and does not call the contract's own",
    "running statistics of batch norms move in training, and are not part of the snapshot",
    needs=(BUILT, "image_features", "text_features", "model_unchanged"),
)
def tuning_unloads(session: CheckSession) -> None:
    adapter, pixels = session.adapter, session.pixels(size=session.quick_size())
    snapshot = ModuleSnapshot(adapter.model)
    adapter.snapshot_weights()
    with torch.no_grad():
        perturb(adapter.model)
        _step_in_training_mode(session, pixels, session.tokens(["a dog", "two cats on grass"]).ids)
    adapter.unload()
    changes = snapshot.changes()
    if changes:
        raise CheckFailed("an unchanged model after full fine-tuning and unload()", "; ".join(changes[:3]))
