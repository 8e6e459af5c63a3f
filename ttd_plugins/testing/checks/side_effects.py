"""Checks of side effects, and of copying, pickling, half precision and the meta device."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.errors import one_sentence
from ttd_plugins.testing.check_session import BUILT, CheckSession, error_text
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.module_snapshot import ModuleSnapshot
from ttd_plugins.testing.probes import forward_calls

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

HALF_COSINE = 0.97
"""Smallest mean cosine between features in bfloat16 and in the model's own precision."""


@check(
    "using an adapter changes nothing in its model: weights, buffers, hooks, masks, modes, requires_grad, attributes",
    "encode_image registers a hook and does not remove it",
    "the position embedding or an image size of the model is overwritten for another input size",
    "the model is set to evaluation mode, or its parameters are frozen, and not restored",
    "an attention mask is stored in a block instead of being passed to it",
    needs=(BUILT, "image_features", "text_features", "other_sizes"),
)
def model_unchanged(session: CheckSession) -> None:
    adapter = session.adapter
    for index, parameter in enumerate(adapter.model.parameters()):
        if parameter.is_floating_point():
            parameter.requires_grad_(index % 2 == 0)
    for training in (False, True):
        adapter.model.train(training)
        snapshot = ModuleSnapshot(adapter.model)
        use(session)
        changes = snapshot.changes(buffers=not training)
        if changes:
            mode = "training" if training else "evaluation"
            raise CheckFailed(f"an unchanged model after use in {mode} mode", "; ".join(changes[:3]))


def use(session: CheckSession) -> None:
    """Call everything that the engine calls."""
    adapter = session.adapter
    image = Image.new("RGB", (50, 40))
    native = session.description.image_size
    for size in [native, *session.sizes()[:2]]:
        for pooled in (True, False):
            adapter.encode_image(session.pixels(1 if size == native else 2, size), pooled=pooled)
    adapter.encode_text(adapter.tokenize(["a dog", "cat"]).ids.to(adapter.device))
    adapter.dense_transform()(image)
    adapter.native_transform()(image)
    adapter.logit_scale()
    adapter.logit_bias()
    for tower in ("image", "text"):
        adapter.lora_targets(tower)  # type: ignore[arg-type]
        list(adapter.tower_parameters(tower))  # type: ignore[arg-type]


def _expect_same(session: CheckSession, what: str, other: DenseAdapter) -> None:
    ids, mine = session.tokens(["a dog", "cat"]).ids, session.native_features()
    with torch.no_grad():
        theirs = session.encode(session.pixels(), adapter=other)
        assert mine.pooled is not None
        assert theirs.pooled is not None
        session.expect_close(f"patches of {what}", theirs.patches, mine.patches)
        session.expect_close(f"pooled of {what}", theirs.pooled, mine.pooled)
        session.expect_close(f"text embeddings of {what}", session.embed(ids, adapter=other), session.embed(ids))


@check(
    "a deep copy returns the same features and shares no parameter with the original",
    "the adapter stores a part of the model in a closure, a partial or a global",
    "a part of the model cannot be copied, such as a generator or a tensor with gradient history",
    needs=(BUILT, "image_features", "text_features", "deterministic"),
)
def deep_copy(session: CheckSession) -> None:
    size = session.quick_size()
    try:
        other = copy.deepcopy(session.adapter)
    except Exception as error:
        raise CheckFailed("copy.deepcopy(adapter) returns an adapter", error_text(error)) from error
    own = {id(parameter) for parameter in session.adapter.model.parameters()}
    if any(id(parameter) in own for parameter in other.model.parameters()):
        raise CheckFailed("a copy with its own parameters", "shared parameters")
    _expect_same(session, "a copy", other)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
        emptied = session.encode(session.pixels(size=size), adapter=other)
    if not bool((emptied.patches == emptied.patches[:1, :1, :1]).all()):
        raise CheckFailed("a copy whose features depend on its own weights", "features that do not depend on them")


@check(
    "an adapter can be pickled and returns the same features afterwards",
    "the tokenizer or the preprocessing is a lambda",
    "a class of the adapter is defined inside a function",
    needs=(BUILT, "image_features", "text_features", "deterministic"),
)
def pickling(session: CheckSession) -> None:
    try:
        other = pickle.loads(pickle.dumps(session.adapter))
    except Exception as error:
        raise CheckFailed("pickle.loads(pickle.dumps(adapter)) returns an adapter", error_text(error)) from error
    _expect_same(session, "an unpickled adapter", other)


@check(
    "a model in bfloat16 returns finite bfloat16 features close to the original ones, also from float32 pixels",
    "pixels are not cast to the model's dtype",
    "a mask, position embedding or window in float32 promotes the result to float32",
    "-inf or a large negative number in a mask is out of the range of the dtype",
    needs=(BUILT, "image_features", "text_features", "other_sizes", "deep_copy"),
)
def half_precision(session: CheckSession) -> None:
    if session.dtype == torch.bfloat16:
        raise NotApplicable("the model is in bfloat16 already")
    # Some CPUs multiply bfloat16 a hundred times slower, so only one image has the preferred size.
    pixels, ids = session.pixels(size=session.quick_size()), session.tokens(["a dog", "two cats on grass"]).ids
    with torch.no_grad():
        # What it caches must follow the model.
        session.encode(pixels)
        session.embed(ids)
    half = copy.deepcopy(session.adapter).to(torch.bfloat16)
    with torch.no_grad():
        try:
            features, texts = session.encode(pixels, adapter=half), session.embed(ids, adapter=half)
            session.encode(session.pixels(1), adapter=half)
        except (NotImplementedError, RuntimeError) as error:
            if "not implemented for" in str(error):
                raise NotApplicable(f"torch does not support it here: {one_sentence(error)}") from error
            problem = _library_in_half(session, half, session.pixels(1), ids)
            if problem is not None:
                raise NotApplicable(f"the model itself does not support bfloat16: {problem}") from error
            raise
        original, own_texts = session.encode(pixels), session.embed(ids)
    for name, found, own in (
        ("patches", features.patches, original.patches),
        ("pooled", features.pooled, original.pooled),
        ("text embeddings", texts, own_texts),
    ):
        assert isinstance(found, Tensor)
        assert isinstance(own, Tensor)
        if found.dtype != torch.bfloat16:
            raise CheckFailed(f"{name} in bfloat16", str(found.dtype))
        cosine = float(F.cosine_similarity(found.double(), own.double(), dim=-1).mean())
        if not cosine > HALF_COSINE:
            raise CheckFailed(f"{name} with a cosine above {HALF_COSINE} to those in {session.dtype}", f"{cosine:.3f}")


def _library_in_half(session: CheckSession, half: DenseAdapter, pixels: Tensor, ids: Tensor) -> str | None:
    """Return why the library's own functions fail with a model in bfloat16, or ``None`` if they succeed."""
    try:
        session.image_reference(half, pixels.to(torch.bfloat16))
        session.library_text(half, ids)
    except Exception as error:
        return one_sentence(error)
    return None


@check(
    "the description needs no forward pass, and works on the meta device",
    "a dummy image is encoded to determine a width or a grid",
    "a value is read from a weight with item()",
    needs=(BUILT, "description", "deep_copy"),
)
def description_is_cheap(session: CheckSession) -> None:
    with forward_calls() as calls:
        own = session.description
    if calls:
        raise CheckFailed("a description without running the model", f"{calls[0]} ran")
    try:
        found = session.on_meta().description
    except Exception as error:
        raise CheckFailed("a description of a model on the meta device", error_text(error)) from error
    if found != own:
        raise CheckFailed("the same description on the meta device", "another one")


def _impossible(error: Exception) -> bool:
    """Return whether an error means that the computation needs data, rather than a tensor on the wrong device."""
    text = str(error).lower()
    without_data = ("item()", "cannot copy out of meta", "data-dependent", "nonzero", "is_nonzero")
    return isinstance(error, NotImplementedError) or any(part in text for part in without_data)


@check(
    "encode_image returns the correct shapes on the meta device",
    "a mask, position embedding or index is created on the CPU instead of the device of the features",
    needs=(BUILT, "image_features", "deep_copy"),
)
def meta_images(session: CheckSession) -> None:
    adapter = session.on_meta()
    try:
        features = session.encode(session.pixels().to("meta"), adapter=adapter)
    except CheckFailed:
        raise
    except Exception as error:
        if _impossible(error):
            raise NotApplicable(f"the computation needs data: {one_sentence(error)}") from error
        raise CheckFailed("features on the meta device", error_text(error)) from error
    if features.patches.device.type != "meta":
        raise CheckFailed("features on the meta device", f"features on {features.patches.device}")


@check(
    "encode_text returns the correct shapes on the meta device",
    "positions, a mask or an index is created on the CPU instead of the device of the ids",
    "tokenize moves lengths to the model's device",
    needs=(BUILT, "text_features", "deep_copy"),
)
def meta_texts(session: CheckSession) -> None:
    adapter = session.on_meta()
    ids = session.tokens(["a dog", "cat"]).ids
    lengths = adapter.tokenize(["a dog", "cat"]).lengths
    if lengths.device.type != "cpu":
        raise CheckFailed("lengths on the CPU wherever the model is", f"lengths on {lengths.device}")
    try:
        found = session.embed(ids, adapter=adapter)
    except CheckFailed:
        raise
    except Exception as error:
        if _impossible(error):
            raise NotApplicable(f"the computation needs data: {one_sentence(error)}") from error
        raise CheckFailed("text embeddings on the meta device", error_text(error)) from error
    if found.device.type != "meta":
        raise CheckFailed("text embeddings on the meta device", f"text embeddings on {found.device}")
