"""Checks that an adapter leaves the process as it is: global modes, random states, and memory."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttd_plugins.testing.check_session import BUILT, SEED, CheckSession
from ttd_plugins.testing.check_types import Check, CheckFailed, collect
from ttd_plugins.testing.checks.side_effects import use
from ttd_plugins.testing.process_state import ProcessState
from ttd_plugins.utils.rng import seed_everything

CHECKS: list[Check] = []
check = partial(collect, CHECKS)


@check(
    "using an adapter changes nothing in the process: default dtype, modes, random states, hooks, environment",
    "torch.manual_seed() or another seed is set in a method, which repeats the random numbers of the training loop",
    "torch.set_default_dtype(), set_grad_enabled() or autocast is switched on and not restored; use it as a context",
    "a hook of all modules, an environment variable or a flag of torch.backends is set and not restored",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "native_transform", "dense_transform"),
)
def process_unchanged(session: CheckSession) -> None:
    # The first call may import a library, which sets environment variables.
    warm = ProcessState()
    use(session)
    warm.restore()
    # A seed that the adapter sets is seen only from another state.
    seed_everything(SEED + 1)
    before = ProcessState()
    use(session)
    changes = before.changes()
    before.restore()
    if changes:
        raise CheckFailed("an unchanged process after use in evaluation mode", "; ".join(changes[:3]))
    for name, found in session.process_changes.items():
        if name in session.checks and session.checks[name].name != "process_unchanged":
            raise CheckFailed(f"an unchanged process after the check {name}", "; ".join(found[:3]))
        if name == "make_adapter":
            raise CheckFailed("torch's modes as they were before the adapter was built", "; ".join(found[:3]))


@check(
    "features and activations of earlier calls are freed",
    "outputs are appended to a list or cached without a limit, for visualisation or debugging",
    "a hook stores the output of a block in the adapter",
    needs=(BUILT, "image_features", "text_features"),
)
def memory_freed(session: CheckSession) -> None:
    size = session.quick_size()
    ids = [session.tokens([text]).ids for text in ("a dog", "two cats", "the sky", "a red kite")]
    for grad in (False, True):
        calls = []
        with torch.set_grad_enabled(grad):
            for seed in range(4):
                calls.append(_outputs_of_call(session, size, seed, ids[seed]))
        # The last call may be cached.
        early = [pair for call in calls[:2] for pair in call]
        if any(reference() is not None for _, reference in early):
            # Circles of references are freed late; collecting them takes longer than all other checks of small models.
            gc.collect()
        alive = [name for name, reference in early if reference() is not None]
        if alive:
            raise CheckFailed(
                "activations of the first two of four calls are freed", f"{len(alive)} live on, such as {alive[0]}"
            )


def _outputs_of_call(
    session: CheckSession, size: tuple[int, int], seed: int, ids: Tensor
) -> list[tuple[str, weakref.ref[Tensor]]]:
    """Return weak references to the outputs of all modules and of the adapter in one call."""
    found: list[tuple[str, weakref.ref[Tensor]]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not isinstance(output, nn.Parameter):
            found.append((f"an output of {type(module).__name__}", weakref.ref(output)))

    handle = nn.modules.module.register_module_forward_hook(record)
    try:
        features = session.adapter.encode_image(session.pixels(1, size, seed=seed))
        texts = session.adapter.encode_text(ids.to(session.adapter.device))
    finally:
        handle.remove()
    for name, tensor in (("patches", features.patches), ("pooled", features.pooled), ("text embeddings", texts)):
        assert tensor is not None
        found.append((name, weakref.ref(tensor)))
    return found
