"""Calibration: fit the map from cosine to probability of a backbone to a few hundred unlabelled image-text pairs.

Cosines of different families have different ranges, so the probability that a tag is in an image needs a scale and a
shift per backbone. The fit needs no labels: a caption's own words are positives, and words sampled from other captions
are negatives. Both are noisy, but good enough to fit two parameters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttd_plugins.adapter import Calibration, DenseAdapter, Size, image_features
from ttd_plugins.engine import evaluation_mode
from ttd_plugins.engine_checks import require_adapter
from ttd_plugins.errors import InputError, TagExtractionError, TTDError
from ttd_plugins.method import selection, similarity
from ttd_plugins.method.text_embeddings import encode_texts
from ttd_plugins.tags import fold
from ttd_plugins.utils.configuration import check_seed
from ttd_plugins.utils.numbers import number, whole_number

if TYPE_CHECKING:
    from ttd_plugins.tags import TagExtractor

MIN_IMAGES = 20
"""Minimal number of images with tags; a good fit needs a few hundred."""

RIDGE = 1e-4
"""Weight of half the squared slope of the standardised score, so that the optimum of separable data is finite."""


@dataclass(frozen=True)
class CalibrationFit:
    """A fitted calibration, and its log-loss and that of the backbone's default on a held-out set.

    Attributes:
        calibration: the fitted map, for ``TTDOptions(calibration=...)``.
        default: the backbone's own calibration.
        log_loss, default_log_loss: mean negative log-likelihood of own and sampled words of the held-out images, in
            nats per word; a coin flip has 0.693.
        images, held_out_images: number of distinct images in the fit and in the held-out set.
        words, held_out_words: number of own words in each; there are as many sampled words.
        captions_without_words: number of captions that were left out, without a tag or without negatives.
    """

    calibration: Calibration
    default: Calibration
    log_loss: float
    default_log_loss: float
    images: int
    held_out_images: int
    words: int
    held_out_words: int
    captions_without_words: int

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as a mapping that JSON can store."""
        return asdict(self)


def fit_logistic(scores: NDArray[Any], present: NDArray[Any], *, ridge: float = RIDGE) -> Calibration:
    """Fit the logistic regression of ``present`` on ``scores`` to its optimum, in float64.

    The objective is the mean log-loss plus ``ridge / 2`` times the square of the slope of the *standardised* score, so
    that an affine change of all scores changes no fitted probability. It is strictly convex; Newton's method with step
    halving solves it.

    Args:
        scores: cosines ``[N]``.
        present: bool ``[N]``.
        ridge: above zero; separable data have no finite optimum without it.

    Returns:
        Scale and shift of the fitted map.

    Raises:
        InputError: the ridge is not above zero.
        TTDError: there is only one class, a score is not finite, all scores are equal, or positives do not have higher
            scores than negatives, so that no increasing map fits.
    """
    x, y = np.asarray(scores, np.float64), np.asarray(present, np.float64)
    ridge = number("the ridge", ridge, low=0, inclusive=False)
    if x.ndim != 1 or x.shape != y.shape or not 0 < y.sum() < len(y):
        raise TTDError("a calibration needs scores of words that are present and of words that are absent")
    if not np.isfinite(x).all():
        raise TTDError("a calibration cannot be fitted: the backbone returned scores that are not finite")
    mean, spread = x.mean(), x.std()
    if spread <= 1e-7 * max(abs(mean), 1e-30):
        raise TTDError("a calibration cannot be fitted: the backbone returned the same score for every word and image")
    z = np.stack([(x - mean) / spread, np.ones_like(x)], axis=1)
    penalty = np.array([ridge, 0.0])

    def objective(weights: NDArray[np.float64]) -> float:
        logits = z @ weights
        return float((np.logaddexp(0, logits) - y * logits).mean() + 0.5 * penalty @ weights**2)

    weights = np.array([0.0, math.log(y.mean() / (1 - y.mean()))])
    for _ in range(200):
        chance = _sigmoid(z @ weights)
        gradient = z.T @ (chance - y) / len(y) + penalty * weights
        if np.abs(gradient).max() < 1e-13:
            break
        curvature = (z * (chance * (1 - chance))[:, None]).T @ z / len(y) + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        size, now = 1.0, objective(weights)
        while objective(weights - size * step) > now and size > 1e-12:
            size /= 2
        if size <= 1e-12:
            break
        weights = weights - size * step
    if weights[0] <= 0:
        raise TTDError(
            "a calibration cannot be fitted: words of other captions have scores as high as a caption's own, so the "
            "backbone does not separate present from absent words; check that captions belong to their images"
        )
    return Calibration(float(weights[0] / spread), float(weights[1] - weights[0] * mean / spread))


def log_loss(calibration: Calibration, scores: NDArray[Any], present: NDArray[Any]) -> float:
    """Return the mean negative log-likelihood, in nats, of ``present`` (bool ``[N]``) given ``scores`` (``[N]``)."""
    logits = calibration.scale * np.asarray(scores, np.float64) + calibration.shift
    return float((np.logaddexp(0, logits) - np.asarray(present, np.float64) * logits).mean())


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logits))


@dataclass
class _Pair:
    """One image with one caption: own words, sampled words of other captions, and a digest of the pixels."""

    image: Any
    caption: str
    own: list[str]
    sampled: list[str]
    digest: str = ""


@torch.no_grad()
def fit_calibration(
    backbone: DenseAdapter,
    pairs: Iterable[tuple[Any, Any]],
    *,
    extractor: str | TagExtractor = "words",
    template: str = "{}",
    size: Size | None = None,
    held_out: float = 0.25,
    batch_size: int = 32,
    ridge: float = RIDGE,
    seed: int = 0,
) -> CalibrationFit:
    """Fit a backbone's calibration by logistic regression on nearest-patch scores.

    The positives are a caption's own words. The negatives are as many words sampled from other captions, by their
    frequency there, and never words of the caption itself. A probability of one half thus means "as likely a word of
    this image's caption as of another". Images, each with all of its captions, are held out for the log-loss. The
    backbone is in evaluation mode meanwhile. The result is deterministic in ``seed``.

    Args:
        backbone: the backbone, with or without LoRA.
        pairs: pairs ``(image, caption)``, the image being a PIL image, a path, the bytes of an image file or normalised
            pixels ``[3, height, width]``; or batches ``(pixels [B, 3, height, width], B captions)``, as from a data
            loader.
        extractor: a tag extractor, or its name.
        template: prompt around a word, with ``{}`` for the word.
        size: input (height, width) in pixels of images in files and of PIL images; by default the preferred one.
        held_out: share of the images in the held-out set.
        batch_size: number of images per forward pass.
        ridge: see :func:`fit_logistic`.
        seed: seed of the held-out set and of the sampled words.

    Raises:
        InputError: an option is out of range, an item is not a pair, an image cannot be read, or fewer than 20
            distinct images have captions with words.
        TagExtractionError: the extractor finds no word in any caption, or returns the wrong number of lists.
        TTDError: no increasing map fits; see :func:`fit_logistic`.
    """
    require_adapter(backbone, "fit_calibration()")
    held_out = number("held_out", held_out, low=0, high=1, inclusive=False)
    batch_size = whole_number("batch_size", batch_size, at_least=1)
    seed = whole_number("seed", seed, at_least=0)
    check_seed(seed)
    if not isinstance(template, str) or template.count("{}") != 1:
        raise InputError(f"the template {template!r} must contain {{}} once, where the word goes")
    found = _read_pairs(pairs)
    without = _draw_words(found, extractor, np.random.default_rng([seed, 0]))
    usable = [pair for pair in found if pair.own]
    with evaluation_mode(backbone):
        scores = _score(backbone, usable, template, size, batch_size)
    images = sorted({pair.digest for pair in usable})
    if len(images) < MIN_IMAGES:
        raise InputError(
            f"a calibration needs at least {MIN_IMAGES} different images whose captions have words, better a few "
            f"hundred; {len(images)} of {len(found)} pairs have some"
        )
    count = min(max(round(held_out * len(images)), 1), len(images) - 1)
    chosen = np.random.default_rng([seed, 1]).permutation(len(images))[:count]
    held_out_digests = {images[index] for index in chosen}
    parts: dict[bool, tuple[list[float], list[bool]]] = {False: ([], []), True: ([], [])}
    for pair, values in zip(usable, scores, strict=True):
        part_scores, part_present = parts[pair.digest in held_out_digests]
        part_scores.extend(values)
        part_present.extend([True] * len(pair.own) + [False] * len(pair.sampled))
    (x, y), (test_x, test_y) = ((np.array(s, np.float64), np.array(p, bool)) for s, p in parts.values())
    fitted = fit_logistic(x, y, ridge=ridge)
    default = backbone.description.calibration
    return CalibrationFit(
        calibration=fitted,
        default=default,
        log_loss=log_loss(fitted, test_x, test_y),
        default_log_loss=log_loss(default, test_x, test_y),
        images=len(images) - count,
        held_out_images=count,
        words=int(y.sum()),
        held_out_words=int(test_y.sum()),
        captions_without_words=without,
    )


def _read_pairs(pairs: Iterable[tuple[Any, Any]]) -> list[_Pair]:
    """Return one item per caption; batches are split."""
    found: list[_Pair] = []
    for position, item in enumerate(pairs):
        if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
            raise InputError(f"item {position} is not a pair of an image and a caption, or of pixels and captions")
        image, captions = item
        if isinstance(captions, str):
            if isinstance(image, Tensor) and image.ndim != 3:
                raise InputError(
                    f"the image of item {position} has shape {tuple(image.shape)}, not [3, height, width]; a batch "
                    "needs a list of captions"
                )
            found.append(_Pair(image, captions, [], []))
            continue
        if not isinstance(image, Tensor) or image.ndim != 4 or len(image) != len(captions):
            raise InputError(f"item {position} is not a batch of pixels [B, 3, height, width] and a list of B captions")
        found += [_Pair(one, caption, [], []) for one, caption in zip(image, captions, strict=True)]
    return found


def _draw_words(pairs: list[_Pair], extractor: str | TagExtractor, rng: np.random.Generator) -> int:
    """Set own and sampled words of each pair; return the number of captions without words."""
    if isinstance(extractor, str):
        from ttd_plugins.plugins import make_tag_extractor

        extractor = make_tag_extractor(extractor)
    words = extractor([pair.caption for pair in pairs])
    if len(words) != len(pairs):
        raise TagExtractionError(
            f"tag extractor {extractor.name!r} returned {len(words)} lists for {len(pairs)} captions"
        )
    everything = [word for own in words for word in own]
    if pairs and not everything:
        raise TagExtractionError(
            f"tag extractor {extractor.name!r} finds no word in any of {len(pairs)} captions, so no calibration can be "
            "fitted; use captions that name things, or another extractor"
        )
    folded = [fold(word) for word in everything]
    without = 0
    for pair, own in zip(pairs, words, strict=True):
        mine = {fold(word) for word in own}
        others = [index for index, word in enumerate(folded) if word not in mine]
        if not own or not others:
            without += 1
            continue
        pair.own = list(own)
        pair.sampled = [everything[index] for index in rng.choice(others, size=len(own))]
    return without


def _score(
    backbone: DenseAdapter, pairs: list[_Pair], template: str, size: Size | None, batch_size: int
) -> list[list[float]]:
    """Return nearest-patch scores of each pair's own and then sampled words; set the digests of the pixels."""
    number: dict[str, int] = {}
    for pair in pairs:
        for word in (*pair.own, *pair.sampled):
            number.setdefault(word, len(number))
    names = [template.format(word) for word in number]
    parts = [encode_texts(backbone, names[start : start + 256])[0] for start in range(0, len(names), 256)]
    words = torch.cat(parts) if parts else torch.zeros(0, backbone.description.embedding_width)
    scores: list[list[float]] = []
    for batch in _batches(backbone, pairs, size, batch_size):
        pixels = torch.stack([one for _, one in batch]).to(backbone.device)
        features = similarity.normalize(image_features(backbone, pixels, pooled=False).patches.flatten(1, 2))
        for (pair, one), patches in zip(batch, features, strict=True):
            pair.digest = hashlib.blake2b(one.float().cpu().numpy().tobytes(), digest_size=16).hexdigest()
            chosen = words[[number[word] for word in (*pair.own, *pair.sampled)]]
            scores.append(selection.pixel_scores(chosen.to(patches.device) @ patches.T).double().cpu().tolist())
    return scores


def _batches(
    backbone: DenseAdapter, pairs: list[_Pair], size: Size | None, batch_size: int
) -> Iterable[list[tuple[_Pair, Tensor]]]:
    """Yield batches of consecutive pairs with their pixels; a batch has one image size."""
    transform = backbone.dense_transform(size)
    batch: list[tuple[_Pair, Tensor]] = []
    for pair in pairs:
        pixels = _pixels(pair.image, transform)
        if batch and (len(batch) == batch_size or batch[0][1].shape != pixels.shape):
            yield batch
            batch = []
        batch.append((pair, pixels))
    if batch:
        yield batch


def _pixels(image: Any, transform: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | Path | bytes):
        from ttd_plugins.data.images import read_image

        image = read_image(image)
    if not hasattr(image, "convert"):
        raise InputError(f"an image must be a PIL image, a path, bytes or pixels, not a {type(image).__name__}")
    return transform(image)
