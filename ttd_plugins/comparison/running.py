"""Run a comparison: every backbone measured, tuned by TTD and by the contrastive term alone, and measured again."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ttd_plugins.adapter import DenseAdapter
from ttd_plugins.comparison.backbones import check_backbone, open_backbone
from ttd_plugins.comparison.command import repeat_command
from ttd_plugins.comparison.data import SCENES, ComparisonData, Sample, open_data, picture_at
from ttd_plugins.comparison.results import ARMS, Arm, BackboneResult, Comparison, Picture, TagView, View
from ttd_plugins.comparison.tables import summary, write_csv, write_markdown
from ttd_plugins.engine import TTD, TTDOptions
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.evaluation.metrics import mask_overlap, upsample_map
from ttd_plugins.evaluation.protocols.runner import weights_hash
from ttd_plugins.evaluation.scene_protocol import CAPTION_MAP_THRESHOLD
from ttd_plugins.training.stages import StageRecord, keep_weights, timed, versions
from ttd_plugins.utils.progress import Stage, no_progress

CANDIDATES = 96
RESULTS, TABLE, SHEET, REPORT, PLOTS, WORK = (
    "results.json", "results.md", "results.csv", "report.html", "plots", "work",
)  # fmt: skip
TUNED: tuple[Arm, ...] = ("control", "after")


@dataclass(frozen=True)
class CompareOptions:
    """What is compared.

    Attributes:
        backbones: names as :func:`ttd_plugins.comparison.backbones.open_backbone` takes them, in the table's order.
        data: ``"scenes"``, or a captioned data set with masks: ``"coco_captions"`` or ``"cc3m_tagmask"``.
        root: folder of the data set.
        split: of the data set; its reader's default where ``None``.
        pairs: what is tuned on beside a data set, as :func:`ttd_plugins.data.open_pairs` takes it; scenes bring theirs.
        tune: whether anything is fine-tuned; otherwise backbones are measured as they are.
        seeds: how many; they are 0, 1 and so on.
        steps, batch_size, rank: of each fine-tuning; a rank of 0 means all weights in place of LoRA.
        learning_rate: peak of the schedule; ``None`` means 1e-3 on scenes and 1e-4 on pairs.
        limit: pictures that are measured; ``None`` means 512 scenes, or the whole data set.
        gallery: pictures that are shown.
        preset: settings of the protocols, ``"fast"`` or ``"paper"``; scenes have one way only.
        workers: processes that decode pairs.
        jobs: arms that are tuned at the same time on scenes, each by a process with its share of the cores; two
            processes of one core do more than one process of two. It changes no more than threads do.
        device: where to compute.
        ttd: the options of the engine, the same for every backbone; without a calibration each has its own.
    """

    backbones: tuple[str, ...]
    data: str = SCENES
    root: Path | None = None
    split: str | None = None
    pairs: str | None = None
    tune: bool = True
    seeds: int = 3
    steps: int = 200
    batch_size: int = 48
    rank: int = 16
    learning_rate: float | None = None
    limit: int | None = None
    gallery: int = 12
    preset: str = "fast"
    workers: int = 0
    jobs: int = 1
    device: str | None = None
    ttd: TTDOptions = field(default_factory=TTDOptions)

    def __post_init__(self) -> None:
        if not self.backbones or len(set(self.backbones)) != len(self.backbones):
            raise InputError("give one backbone or more, each once")
        if self.seeds < 1 or self.steps < 1 or self.batch_size < 2 or self.rank < 0:
            raise InputError(
                "seeds and steps must be 1 or more, batch_size 2 or more and rank 0 or more; not "
                f"{self.seeds}, {self.steps}, {self.batch_size} and {self.rank}"
            )
        if (self.limit is not None and self.limit < 2) or self.gallery < 0:
            raise InputError(f"limit must be 2 or more and gallery 0 or more, not {self.limit} and {self.gallery}")
        if self.jobs < 1 or (self.jobs > 1 and (self.data != SCENES or self.device not in (None, "cpu"))):
            raise InputError(
                f"jobs must be 1, or more on scenes and the CPU, not {self.jobs}; on pairs one run at a time is tuned"
            )
        if self.ttd.contrastive_weight <= 0 and self.tune:
            raise InputError("contrastive_weight must be above 0, since the control trains by that term alone")

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that are run."""
        return ARMS if self.tune else ("before",)

    def of_arm(self, arm: Arm) -> TTDOptions:
        """The engine's options while an arm is tuned."""
        return self.ttd if arm == "after" else replace(self.ttd, tag_weight=0.0, distill_weight=0.0)


def run_comparison(out: Path, options: CompareOptions, *, stage: Stage | None = None) -> Comparison:
    """Compare backbones, and write ``results.json``, ``results.csv``, ``results.md``, ``report.html`` and plots.

    ``results.json`` is written whole after every stage. A run that was stopped and is started again with the same
    options takes up what it had finished. A backbone that fails is told in ``failures``, and the others go on.

    Args:
        out: folder for the results, made if it is not there.
        options: what is compared.
        stage: announces the stages, for progress bars.

    Raises:
        InputError: ``out`` cannot be written, or holds the results of a run with other options.
        TTDError: a name is unknown, the data cannot be used, or no backbone is left.
        TrainingStoppedError: SIGTERM or Ctrl-C while pairs are trained on; the state is saved.
    """
    for name in options.backbones:
        check_backbone(name)
    data = open_data(options)
    run = _Run(out, options, data, stage or no_progress)
    run.attempt(run.about)
    run.attempt(run.before)
    if options.jobs > 1 and options.tune:
        run.tune_side_by_side()
    # One at a time, or what another process could not do.
    for seed in range(options.seeds if options.tune else 0):
        for arm in TUNED:
            run.attempt(lambda name, seed=seed, arm=arm: run.tuned(name, seed, arm))  # type: ignore[misc]
    comparison = run.comparison()
    write_outputs(out, comparison)
    return comparison


def write_outputs(out: Path, comparison: Comparison) -> None:
    """Write the tables, the plots and the report of a comparison.

    Raises:
        InputError: they cannot be written.
    """
    try:
        write_csv(out / SHEET, comparison)
        write_markdown(out / TABLE, comparison)
        # After the tables, which need neither matplotlib nor a page.
        from ttd_plugins.reports.comparison_html import write_comparison_report
        from ttd_plugins.reports.comparison_plots import draw_comparison_plots

        (out / PLOTS).mkdir(exist_ok=True)
        draw_comparison_plots(out / PLOTS, comparison)
        write_comparison_report(out / REPORT, comparison)
    except OSError as error:
        raise InputError(f"the results cannot be written to {out} ({one_sentence(error)}); free some room") from error


class _Run:
    def __init__(self, out: Path, options: CompareOptions, data: ComparisonData, stage: Stage) -> None:
        self.out, self.options, self.data, self.stage = out, options, data, stage
        # How many work side by side may differ when a run goes on.
        settings = {key: value for key, value in asdict(options).items() if key != "jobs"} | {
            "root": None if options.root is None else str(options.root),
            "data": data.describe(),
            "versions": versions(),
        }
        figures = [asdict(figure) for figure in data.figures]
        self.record = StageRecord(out / RESULTS, settings, figures=figures, backbones={}, failures={}, pictures=[])
        self.record.content["failures"] = {}
        # No setting: another folder or more jobs change no figure.
        self.record.content["command"] = repeat_command(out, options)
        self.failures: dict[str, str] = self.record.content["failures"]

    # Stages --------------------------------------------------------------------------------------------------------

    def attempt(self, one: Any) -> None:
        """Call ``one`` with every backbone that is left; one that fails is left out with the reason."""
        from ttd_plugins.training.run import TrainingStoppedError

        for name in self.options.backbones:
            if name in self.failures:
                continue
            try:
                one(name)
            except TrainingStoppedError:
                raise
            except InputError as error:
                # A full disk is no backbone's fault, and the others would fail as well.
                if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                self._fail(name, error)
            # A backbone is foreign code; whatever it raises, the others are compared.
            except Exception as error:
                self._fail(name, error)
        if len(self.failures) == len(self.options.backbones):
            name, reason = next(iter(self.failures.items()))
            raise TTDError(f"no backbone could be compared; the first, {name}: {reason}")

    def _fail(self, name: str, error: Exception) -> None:
        kind = "" if isinstance(error, TTDError) else f"{type(error).__name__}: "
        self.failures[name] = kind + one_sentence(error)
        self.record.save()

    def about(self, name: str) -> None:
        backbone = self._open(name)
        self.data.check(backbone)
        description = backbone.description
        rows, columns = backbone.patch_grid(*description.image_size)
        about = {
            "family": description.family,
            "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
            "image_size": list(description.image_size),
            "patch_size": list(description.patch_size),
            "grid": [rows, columns],
            "embedding_width": description.embedding_width,
            "context_length": description.context_length,
            "logits": description.logits,
            "dense_mode": description.dense_mode,
            "calibration": asdict(description.calibration),
            "weights_sha256": weights_hash(backbone),
        }
        content = self._content(name)
        if content["about"] and content["about"] != about:
            raise InputError(f"{name} is not what it was when {self.record.file} was begun; give another --out")
        content["about"] = about
        self.record.save()

    def before(self, name: str) -> None:
        if not self._content(name)["figures"].get("before"):
            self._measure(name, "before", None, self._open(name))

    def tuned(self, name: str, seed: int, arm: Arm) -> None:
        content = self._content(name)
        if len(content["figures"].get(arm, [])) <= seed:
            self._measure(name, arm, seed, self._tuned(name, seed, arm))

    def tune_side_by_side(self) -> None:
        """Tune and measure every arm that is left, several at a time, each in a process of its own."""
        left = [
            (name, seed, arm)
            for seed in range(self.options.seeds)
            for name in self.options.backbones
            for arm in TUNED
            if name not in self.failures and len(self._content(name)["figures"].get(arm, [])) <= seed
        ]
        if not left:
            return
        advance = self.stage(f"tune and measure, {self.options.jobs} side by side", len(left))
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // self.options.jobs)
        done: dict[tuple[str, int, Arm], _Arm] = {}
        with ProcessPoolExecutor(self.options.jobs, context, _start_worker, (self.options, threads)) as pool:
            weights = [self.record.weights_file(self._key(*one)) for one in left]
            folders = [self._work(name, arm, seed) for name, seed, arm in left]
            futures = {
                pool.submit(_work_arm, *one, folder, file): one
                for one, folder, file in zip(left, folders, weights, strict=True)
            }
            try:
                for future in as_completed(futures):
                    one = futures[future]
                    try:
                        done[one] = future.result()
                    # The same arm is tried again by this process, which tells what is wrong with it.
                    except Exception:
                        continue
                    finally:
                        advance(1)
                    self._keep_arms(done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep_arms(self, done: dict[tuple[str, int, Arm], _Arm]) -> None:
        """Record what is finished, the seeds of an arm in order."""
        for name, seed, arm in sorted(done, key=lambda one: one[1]):
            content = self._content(name)
            figures = content["figures"].setdefault(arm, [])
            if len(figures) != seed:
                continue
            found = done.pop((name, seed, arm))
            figures.append(found.figures)
            content["curves"].setdefault(arm, [])[seed:] = [found.curve]
            content["warnings"] += [f"{arm}, seed {seed}, {warning}" for warning in found.warnings]
            content["seconds"] |= {f"tune {arm} {seed}": found.seconds[0], f"measure {arm} {seed}": found.seconds[1]}
            content.update(summary(self._result(name), self.data.figures))
            self.record.save()

    @staticmethod
    def _key(name: str, seed: int, arm: Arm) -> str:
        return f"{_slug(name)}-{arm}-seed{seed}"

    def _tuned(self, name: str, seed: int, arm: Arm) -> DenseAdapter:
        """The backbone fine-tuned, now or by an earlier run whose weights were kept."""
        content, key = self._content(name), self._key(name, seed, arm)
        backbone = self._open(name)
        curves = content["curves"].setdefault(arm, [])
        if len(curves) > seed and self.record.weights_file(key).exists():
            return self.record.take_weights(key, backbone, self.options.rank)
        folder, title = self._work(name, arm, seed), f"{name} {arm} {seed}"
        (curve, warnings), seconds = timed(
            lambda: self.data.tune(backbone, seed, self.options.of_arm(arm), folder, title, self.stage)
        )
        keep_weights(self.record.weights_file(key), backbone)
        curves[seed:] = [curve]
        content["seconds"][f"tune {arm} {seed}"] = seconds
        content["warnings"] += [f"{arm}, seed {seed}, {warning}" for warning in warnings]
        self.record.save()
        return backbone

    def _measure(self, name: str, arm: Arm, seed: int | None, backbone: DenseAdapter) -> None:
        content = self._content(name)
        folder, number = self._work(name, arm, seed), "" if seed is None else f" {seed}"
        title = f"{name} {arm}{number}"
        values, seconds = timed(lambda: self.data.measure(backbone, folder / "measure", title, self.stage))
        content["figures"].setdefault(arm, []).append(values)
        content["seconds"][f"measure {arm}{number}"] = seconds
        content.update(summary(self._result(name), self.data.figures))
        self.record.save()
        shutil.rmtree(folder, ignore_errors=True)

    def _open(self, name: str) -> DenseAdapter:
        return open_backbone(name, device=self.options.device)

    def _work(self, name: str, arm: Arm, seed: int | None) -> Path:
        """Where a stage keeps what is half done."""
        return self.out / WORK / f"{_slug(name)}-{arm}{'' if seed is None else f'-seed{seed}'}"

    def _content(self, name: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"about": {}, "figures": {}, "curves": {}, "seconds": {}, "warnings": []}
        return self.record.content["backbones"].setdefault(name, empty)

    def _result(self, name: str) -> BackboneResult:
        content = self._content(name)
        parts = {key: content[key] for key in ("about", "figures", "curves", "seconds", "warnings")}
        return BackboneResult(name, **parts)

    # What came of it -----------------------------------------------------------------------------------------------

    def comparison(self) -> Comparison:
        """The finished comparison, with its gallery."""
        views: dict[str, list[dict[Arm, View]]] = {}
        samples: list[Sample] = []
        if self.options.gallery:
            samples = list(self.data.samples(CANDIDATES))
            self.attempt(lambda name: views.update({name: self._views(name, samples)}))
        names = [name for name in self.options.backbones if name not in self.failures]
        pictures = _gallery(samples, {name: views[name] for name in names if name in views}, self.options.gallery)
        self.record.content["pictures"] = [{"key": one.key, "caption": one.caption, "why": one.why} for one in pictures]
        shutil.rmtree(self.out / WORK, ignore_errors=True)
        self.record.save()
        return Comparison(
            settings=self.record.content["settings"] | {"command": self.record.content["command"]},
            figures=self.data.figures,
            backbones=[self._result(name) for name in names],
            gallery=pictures,
            attribution=self.data.attribution,
            failures=dict(self.failures),
        )

    def _views(self, name: str, samples: Sequence[Sample]) -> list[dict[Arm, View]]:
        advance = self.stage(f"{name}: pictures", len(samples) * len(self.options.arms))
        found: list[dict[Arm, View]] = [{} for _ in samples]
        for arm in self.options.arms:
            backbone = self._open(name) if arm == "before" else self._tuned(name, 0, arm)
            ttd = TTD(backbone.eval(), self.options.ttd)
            for sample, views in zip(samples, found, strict=True):
                views[arm] = see(ttd, sample)
                advance(1)
        return found


# Arms side by side ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arm:
    """What a process found of one arm; its weights are in their file."""

    figures: dict[str, float | None]
    curve: list[dict[str, float]]
    warnings: list[str]
    seconds: tuple[float, float]


_shared: dict[str, Any] = {}
"""The options and the data of a worker process, which keeps the scenes that it drew for its next arm."""


def _start_worker(options: CompareOptions, threads: int) -> None:
    # Ctrl-C is the main process' to answer, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _shared.update(options=options, data=open_data(options))


def _work_arm(name: str, seed: int, arm: Arm, folder: Path, weights: Path) -> _Arm:
    options, data = _shared["options"], _shared["data"]
    backbone = open_backbone(name, device=options.device)
    (curve, warnings), tuning = timed(lambda: data.tune(backbone, seed, options.of_arm(arm), folder, "", no_progress))
    keep_weights(weights, backbone)
    values, measuring = timed(lambda: data.measure(backbone, folder / "measure", "", no_progress))
    return _Arm(values, curve, warnings, (tuning, measuring))


def see(ttd: TTD, sample: Sample) -> View:
    """A picture at the backbone's preferred size; its IoU is that of the map, above 0.40, with the union of masks."""
    maps = ttd.maps(picture_at(sample, ttd.backbone.description.image_size), sample.caption)
    folded, tags, start = sample.caption.lower(), [], 0
    rows = zip(maps.tags, maps.probabilities, maps.selected, maps.tag_maps_normalized, strict=True)
    for text, score, selected, heat in rows:
        match = re.search(rf"(?<!\w){re.escape(text.lower())}(?!\w)", folded[start:])
        where = -1 if match is None else start + match.start()
        tags.append(TagView(text, where, float(score), bool(selected), heat.astype(np.float32)))
        start = start if match is None else start + match.end()
    iou = None
    if sample.truth:
        union = np.logical_or.reduce(list(sample.truth.values()))
        lit = upsample_map(maps.caption_map_normalized, *union.shape) > CAPTION_MAP_THRESHOLD
        valid = np.ones_like(union) if sample.valid is None else sample.valid
        if ((lit | union) & valid).any():
            iou = mask_overlap(lit, union, valid).iou
    return View(maps.caption_map_normalized.astype(np.float32), tags, iou)


def _gallery(samples: Sequence[Sample], views: dict[str, list[dict[Arm, View]]], count: int) -> list[Picture]:
    """Evenly spaced ranks of the change of Caption IoU, averaged over backbones, from the largest gain to the worst.

    The change is from the control to after, so that further training is not taken for TTD. Without tuned arms, ranks
    of Caption IoU itself.
    """
    ranked: list[tuple[float, int]] = []
    for number in range(len(samples)):
        values = []
        for of_backbone in views.values():
            seen = of_backbone[number]
            last = seen["after" if "after" in seen else "before"].iou
            first = seen["control"].iou if "control" in seen else 0.0
            if last is not None and first is not None:
                values.append(last - first)
        if values:
            ranked.append((float(np.mean(values)), number))
    ranked.sort(key=lambda item: (-item[0], item[1]))
    if not ranked or not count:
        return []
    tuned = any("after" in seen for of_backbone in views.values() for seen in of_backbone)
    places = sorted(set(np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int).tolist()))
    if count == 1:
        places = [len(ranked) - 1]
    what = "change of Caption IoU against the control" if tuned else "Caption IoU"
    pictures = []
    for place in places:
        value, number = ranked[place]
        rank = "largest" if place == 0 else "smallest" if place == len(ranked) - 1 else f"rank {place + 1} by"
        sample = samples[number]
        why = f"{rank} {what} of {len(ranked)} pictures: {value:+.3f}, mean over backbones"
        by_name = {name: of_backbone[number] for name, of_backbone in views.items()}
        pictures.append(Picture(sample.key, _small(sample.image), sample.caption, _small_masks(sample), by_name, why))
    return pictures


SHOWN_SIDE = 384


def _small(image: Any) -> Any:
    """A picture no larger than is shown, so that the report stays small."""
    height, width = image.shape[:2]
    factor = SHOWN_SIDE / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _small_masks(sample: Sample) -> dict[str, Any]:
    height, width = _small(sample.image).shape[:2]
    return {
        tag: np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST), dtype=bool)
        for tag, mask in sample.truth.items()
    }


def _slug(name: str) -> str:
    """A name for files; names that differ give slugs that differ."""
    plain = re.sub(r"[^\w.-]+", "_", name)[-60:]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
