"""Checks of tokens and text embeddings."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ttd_plugins.adapter import Tokens
from ttd_plugins.packed_texts import pack_texts, packed_text_encoder, sorted_texts
from ttd_plugins.testing.check_session import BUILT, CheckSession, distance, error_text, text_mask
from ttd_plugins.testing.check_types import Check, CheckFailed, NotApplicable, collect
from ttd_plugins.testing.checks.image_features import compare_with_library
from ttd_plugins.testing.library_reference import library_text_embedding, stated_reference, takes_mask

CHECKS: list[Check] = []
check = partial(collect, CHECKS)

SHORT = ["a dog", "cat", "two birds"]
STRINGS = {
    "an empty text": "",
    "spaces": " \t\n ",
    "emoji": "🐶🏽‍🚀 👩‍👩‍👧 ☂️",
    "Chinese": "草地上的一只狗",
    "Arabic": "كلب على العشب",
    "Hindi": "घास पर कुत्ता",
    "combining marks": "e\u0301\u0323" * 5,
    "an unpaired surrogate": "a \ud83d dog",
    "a zero byte": "a\0dog",
    "markup": "<end> </s> [SEP] <|endoftext|>",
    "a long text": "the quick brown fox jumps over the lazy dog " * 120,
    "a long word": "x" * 3000,
}


@check(
    "tokenize returns int64 ids [N, context], int64 lengths on the CPU and truncation flags, for short texts",
    "the tokenizer pads to the longest text of the batch instead of the context length",
    "the tokenizer returns int32 ids, like the original clip package",
    "context_length is that of another model of the library",
    needs=(BUILT, "description"),
)
def tokens(session: CheckSession) -> None:
    found = session.tokens(SHORT)
    context = session.description.context_length
    if not bool(((found.lengths >= 1) & (found.lengths <= context)).all()):
        raise CheckFailed(f"lengths from 1 to {context}", str(found.lengths.tolist()))
    if len(found.truncated) != len(SHORT) or not all(isinstance(flag, bool) for flag in found.truncated):
        raise CheckFailed("one truncation flag, True or False, for each text", repr(found.truncated))
    alone = session.tokens(SHORT[:1])
    if not torch.equal(alone.ids[0], found.ids[0]) or alone.lengths[0] != found.lengths[0]:
        raise CheckFailed("a text has the same ids alone and in a batch", "other ids")


@check(
    "tokenize and encode_text accept any string",
    "the tokenizer raises an exception for an empty list of words, unpaired surrogates or a text that is too long",
    "a text without words has no end token, so that pooling finds none",
    needs=(BUILT, "tokens", "text_features"),
)
def any_string(session: CheckSession) -> None:
    for name, text in STRINGS.items():
        try:
            found = session.tokens([text])
        except CheckFailed:
            raise
        except Exception as error:
            raise CheckFailed(f"ids for {name}", error_text(error)) from error
        if not 1 <= int(found.lengths[0]) <= found.ids.shape[1]:
            raise CheckFailed(f"a length from 1 to {found.ids.shape[1]} for {name}", str(int(found.lengths[0])))
        with torch.no_grad():
            embedding = session.embed(found.ids)
        if not bool(torch.isfinite(embedding).all()):
            raise CheckFailed(f"a finite embedding for {name}", "values that are not finite")


@check(
    "lengths include the end token, and only padding follows it",
    "lengths count words instead of positions, or exclude the start or the end token",
    "the tokenizer pads on the left",
    "the end token is found by the wrong rule (largest id, last position, id of the end token)",
    needs=(BUILT, "tokens"),
)
def end_token(session: CheckSession) -> None:
    found = session.tokens([*SHORT, STRINGS["a long text"]])
    ends = [int(row[length - 1]) for row, length in zip(found.ids, found.lengths, strict=True)]
    padding = {int(i) for row, length in zip(found.ids, found.lengths, strict=True) for i in row[length:]}
    if len(padding) > 1:
        raise CheckFailed("one padding id after every text", f"the ids {sorted(padding)[:4]}")
    if len(set(ends[:-1])) > 1:
        if not session.description.text_needs_full_context:
            raise CheckFailed("the same end token at the last position of every text", f"the ids {ends[:-1]}")
        raise NotApplicable("texts have no common end token")
    if ends[-1] != ends[0]:
        raise CheckFailed(f"a text that is too long keeps its end token {ends[0]}", f"it ends with {ends[-1]}")


@check(
    "a text that is too long fills the context and is flagged as truncated; a text that fits is not flagged",
    "the flag compares the number of characters or words with the context length",
    "start and end token are not counted in the comparison with the context length",
    "the tokenizer truncates silently, and the adapter does not detect it",
    needs=(BUILT, "tokens", "end_token"),
)
def truncation(session: CheckSession) -> None:
    context = session.description.context_length
    texts = [" ".join(["dog"] * count) for count in range(1, context + 4)]
    found = session.tokens(texts)
    last = found.ids[-1]
    first_full = next(i for i in range(len(texts)) if torch.equal(found.ids[i], last))
    if first_full == len(texts) - 1:
        raise NotApplicable("repeated words do not fill the context")
    for index, (length, flag) in enumerate(zip(found.lengths.tolist(), found.truncated, strict=True)):
        what = f"{index + 1} words"
        if flag and length != context:
            raise CheckFailed(f"{what} fill the context of {context} if they are truncated", f"a length of {length}")
        if index < first_full and flag:
            raise CheckFailed(f"{what}, which fit, are not flagged as truncated", "a flag")
        # The first text that fills the context may fit exactly, which some tokenizers do not report.
        if index > first_full and not flag:
            raise CheckFailed(f"{what}, whose end is not in the ids, are flagged as truncated", "no flag")


@check(
    "encode_text returns finite embeddings [N, D] in the model's dtype and on its device",
    "embeddings are taken before the text projection",
    "the library returns a tuple or an output object instead of a tensor",
    needs=(BUILT, "tokens"),
)
def text_features(session: CheckSession) -> None:
    with torch.no_grad():
        found = session.embed(session.tokens(SHORT).ids)
    dtypes = {parameter.dtype for parameter in session.adapter.model.parameters()}
    if found.dtype not in dtypes:
        raise CheckFailed(f"embeddings in the model's dtype, {session.dtype}", str(found.dtype))
    if found.device != session.adapter.device:
        raise CheckFailed(f"embeddings on {session.adapter.device}", str(found.device))
    if not bool(torch.isfinite(found).all()):
        raise CheckFailed("finite embeddings", "values that are not finite")


@check(
    "a text has the same embedding alone, in a batch, and packed into a row with others",
    "sequence and batch axes are exchanged, so that attention runs across texts",
    "texts are padded to the longest text of the batch, and the tower attends to padding",
    "encode_packed_texts uses the causal mask, or positions of the row, instead of those of the packed texts",
    needs=(BUILT, "text_features", "deterministic"),
)
def texts_independent(session: CheckSession) -> None:
    texts = ["a dog", "two cats on the green grass", "sky"]
    with torch.no_grad():
        rows = session.embed(session.tokens(texts).ids)
        for text, row in zip(texts, rows, strict=True):
            alone = session.embed(session.tokens([text]).ids)[0]
            session.expect_close("a text embedding alone and in a batch", alone, row)
        _compare_packed(session, [*texts, "a dog on the grass"])


def _compare_packed(session: CheckSession, texts: list[str]) -> None:
    """Compare texts in a row, two of which have a start in common, with the same texts in rows of their own."""
    encoder = packed_text_encoder(session.adapter)
    ids = session.tokens(texts).ids
    positions = None if encoder is None else encoder.pooling_positions(ids)
    if encoder is None or positions is None:
        return
    packed = pack_texts(sorted_texts(ids.cpu(), positions.cpu()), few_shapes=False).to(session.adapter.device)
    found = encoder.encode_packed_texts(packed)
    session.expect_close("text embeddings packed into a row and alone", found, session.embed(ids))


@check(
    "unless text_needs_full_context is True, removing positions after the end token changes no embedding",
    "the tower is bidirectional, appends a class token or pools at the last position",
    "positions or the causal mask are sliced from the wrong end",
    "the end token is expected at a fixed position",
    needs=(BUILT, "text_features", "texts_independent", "end_token"),
)
def text_trimming(session: CheckSession) -> None:
    if session.description.text_needs_full_context:
        raise NotApplicable("the description has text_needs_full_context = True")
    found = session.tokens([*SHORT, "five green apples on a wooden table"])
    with torch.no_grad():
        full = session.embed(found.ids)
        for length in {int(found.lengths.max()), min(int(found.lengths.max()) + 1, found.ids.shape[1])}:
            session.expect_close(f"embeddings cut to {length} positions", session.embed(found.ids[:, :length]), full)
        for row, length in enumerate(found.lengths.tolist()):
            cut = session.embed(found.ids[row : row + 1, :length])[0]
            session.expect_close("an embedding cut after its end token", cut, full[row])


@check(
    "text embeddings equal the library's own",
    "the adapter pools another token than the library",
    "the causal mask, the final LayerNorm or the projection is missing",
    "the tower attends to padding, and the library's attention mask is not passed on; state both in library_reference",
    needs=(BUILT, "text_features", "texts_independent"),
)
def text_matches_library(session: CheckSession) -> None:
    tokens = session.tokens([*SHORT, STRINGS["a long text"]])
    with torch.no_grad():
        found = session.embed(tokens.ids)
        try:
            own = session.library_text(session.adapter, tokens.ids, text_mask(tokens))
            unmasked = _without_mask(session, tokens)
        except Exception as error:
            raise NotApplicable(f"the library's own embedding cannot be computed ({error_text(error)})") from error
    if own is None:
        raise NotApplicable("the model has neither encode_text nor get_text_features; override the reference")
    if unmasked is not None and distance(found, own) > 2 * session.tolerance >= distance(found, unmasked):
        # Some towers were trained with attention to padding, and their function takes a mask all the same.
        raise NotApplicable(
            "embeddings equal the library's without an attention mask, and differ from those with one; state in "
            "library_reference.text which call the model was trained with"
        )
    compare_with_library(session, "text embeddings", found, own)


def _without_mask(session: CheckSession, tokens: Tokens) -> Tensor | None:
    """Return the library's embeddings without a mask, if the kit alone decided to pass one."""
    adapter = session.adapter
    stated = stated_reference(adapter).text is not None
    if stated or session.text_reference is not library_text_embedding or not takes_mask(adapter):
        return None
    return library_text_embedding(adapter, tokens.ids.to(adapter.device))
