"""Run a comparison: measure every backbone, train it by TTD and by the contrastive term alone, and measure it again."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ttd_plugins.backbone_sources import check_backbone, open_backbone
from ttd_plugins.caption_maps import backbone_notes
from ttd_plugins.comparison.arms import (
    ArmExecutor,
    ArmJob,
    ArmResult,
    ProcessExecutor,
    SequentialExecutor,
    open_arm,
    remove_unfinished_work,
)
from ttd_plugins.comparison.choice import choose
from ttd_plugins.comparison.cost import measure_cost
from ttd_plugins.comparison.data import open_data
from ttd_plugins.comparison.data_interface import ComparisonData, Sample
from ttd_plugins.comparison.experiment_record import ExperimentRecord, read_record, versions
from ttd_plugins.comparison.gallery import CANDIDATES, choose_gallery, compute_view, gallery_rule
from ttd_plugins.comparison.options import SCENES, CompareOptions
from ttd_plugins.comparison.results import Arm, BackboneResult, Comparison, View
from ttd_plugins.comparison.tables import summary, write_csv, write_markdown
from ttd_plugins.engine import TTD
from ttd_plugins.errors import InputError, TTDError, one_sentence
from ttd_plugins.toolkit.weights_hash import weights_hash
from ttd_plugins.training.stop_signals import TrainingStoppedError
from ttd_plugins.utils.contract_types import TunedFrom
from ttd_plugins.utils.files import given_path, make_folder
from ttd_plugins.utils.output_folder import FolderKind, output_folder
from ttd_plugins.utils.progress import Stage, no_progress, progress_bars

log = logging.getLogger(__name__)

RESULTS, TABLE, SHEET, REPORT, PLOTS, WORK = (
    "results.json", "results.md", "results.csv", "report.html", "plots", "work",
)  # fmt: skip
TRAINED_ARMS: tuple[Arm, ...] = ("control", "after")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def compare(
    backbones: str | Sequence[str],
    *,
    out: Path | str = "comparison",
    data: str = "scenes",
    seeds: int = 3,
    steps: int = 200,
    tune: bool = True,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Compare backbones before and after fine-tuning by TTD (arXiv 2404.00384), and write tables, plots and a report.

    Each backbone is measured, trained by TTD, trained from the same weights by the contrastive term alone (the
    control), and measured again. A stopped comparison continues if it is started again with the same options.

    Args:
        backbones: one or more names for :func:`ttd_plugins.backbone_sources.open_backbone`: ``family:model@weights``,
            the folder of a run, or a name and the path of trained weights joined by ``+``.
        out: folder for the results; it is created if it does not exist.
        data: ``"scenes"``; or a data set in the folder ``root``, with image-text ``pairs`` for fine-tuning: captions
            with masks (``"coco_captions"``, ``"cc3m_tagmask"``), masks (``"voc"``, ``"folder"``, ...), labels
            (``"coco"``, ``"table"``, ...), or held-out ``"pairs"``.
        seeds: number of seeds, from ``first_seed`` on.
        steps: optimizer steps of each fine-tuning.
        tune: whether to fine-tune; otherwise backbones are measured as loaded.
        progress: whether to show progress bars on standard error.
        **options: other fields of :class:`ttd_plugins.comparison.options.CompareOptions`, such as ``root``,
            ``pairs``, ``batch_size``, ``rank``, ``limit``, ``jobs``, ``device`` and ``ttd``. With ``jobs`` above 1 the
            calling script must be importable (``if __name__ == "__main__":``), as for any multiprocessing.

    Returns:
        The results: metrics per backbone, arm and seed, training curves, and the gallery.

    Raises:
        InputError: an option, the data or ``out`` cannot be used, or ``out`` has the results of other options.
        TTDError: a name is unknown, or every backbone failed.
        TrainingStoppedError: SIGTERM or Ctrl-C during training on pairs; the state is saved.

    Example::

        comparison = compare(["family:model", "runs/mine"], out="runs/compare", seeds=1, steps=50)
        print(comparison.backbones[0].mean("after", "caption_iou"))
    """
    names = (backbones,) if isinstance(backbones, str) else tuple(backbones)
    settings = CompareOptions(names, data=data, seeds=seeds, steps=steps, tune=tune, **options)
    with progress_bars(width=40, keep_finished=4) if progress else nullcontext(no_progress) as stage:
        return run_comparison(given_path(out), settings, stage=stage)


def run_comparison(
    out: Path, options: CompareOptions, *, stage: Stage = no_progress, command: str | None = None
) -> Comparison:
    """Compare backbones; write ``results.json``, ``results.csv``, ``results.md``, ``report.html`` and ``plots``.

    ``results.json`` is written after every stage. A stopped run continues where it stopped if it is started again with
    the same options. A backbone that fails is listed in ``failures``, and the others are still compared.

    Args:
        out: folder for the results; it is created if it does not exist.
        options: what is compared.
        stage: progress callback.
        command: shell command that repeats the comparison, for the report.

    Raises:
        InputError: ``out`` cannot be written, or has the results of other options.
        TTDError: a name is unknown, the data cannot be used, or every backbone failed.
        TrainingStoppedError: SIGTERM or Ctrl-C during training on pairs; the state is saved.
    """
    for name in options.backbones:
        check_backbone(name)
    data = open_data(options)
    with output_folder(out, COMPARISON_FOLDER):
        comparison = run_comparison_in(out, options, data, stage=stage, command=command)
        write_outputs(out, comparison)
        return comparison


def run_comparison_in(
    out: Path, options: CompareOptions, data: ComparisonData, *, stage: Stage, command: str | None
) -> Comparison:
    """Run a comparison in a folder that the caller has locked; :func:`write_outputs` writes what it returns."""
    run = _ComparisonRun(out, options, data, stage, command)
    for sentence in data.warnings():
        log.warning("%s", sentence)
    run.describe_backbones()
    run.run_arms()
    return run.comparison()


def _is_earlier_comparison(folder: Path) -> bool:
    """Whether a folder without a marker has the results of a comparison, or those of the demo's older form."""
    for name, keys in ((RESULTS, {"settings", "backbones"}), ("metrics.json", {"settings", "seconds", "curves"})):
        with suppress(InputError):
            if (folder / name).is_file() and keys <= read_record(folder / name).keys():
                return True
    return False


COMPARISON_FOLDER = FolderKind("comparison", "the folder of ttd compare or ttd demo", _is_earlier_comparison)


def write_outputs(out: Path, comparison: Comparison) -> None:
    """Write the tables, the plots and the report of a comparison.

    Raises:
        InputError: a file cannot be written.
    """
    write_csv(out / SHEET, comparison)
    write_markdown(out / TABLE, comparison)
    # Imported after the tables are written, which need neither matplotlib nor the page.
    from ttd_plugins.reports.comparison_html import write_comparison_report
    from ttd_plugins.reports.comparison_plots import draw_comparison_plots

    make_folder(out / PLOTS)
    draw_comparison_plots(out / PLOTS, comparison)
    write_comparison_report(out / REPORT, comparison)


class _ComparisonRun:
    """One run of a comparison; its state is the record, so that a stopped run continues."""

    def __init__(
        self, out: Path, options: CompareOptions, data: ComparisonData, stage: Stage, command: str | None
    ) -> None:
        self.out, self.options, self.data, self.stage = out, options, data, stage
        metrics = [asdict(metric) for metric in data.metrics]
        self.record = ExperimentRecord(
            out / RESULTS, self._settings(), figures=metrics, backbones={}, failures={}, pictures=[]
        )
        self.record.content["figures"] = metrics
        # A failed backbone is tried again.
        self.failures: dict[str, str] = {}
        self.record.content["failures"] = self.failures
        self.record.content["command"] = command or self.record.content.get("command")

    def _settings(self) -> dict[str, Any]:
        """The settings that must not change when a run continues."""
        settings = asdict(self.options)
        # Neither the number of processes nor further measurements change a result.
        del settings["jobs"], settings["lora_scales"]
        # Older records have no first seed and no list of classes.
        if not self.options.first_seed:
            del settings["first_seed"]
        if self.options.classes is None:
            del settings["classes"]
        root = None if self.options.root is None else str(self.options.root)
        return settings | {"root": root, "data": self.data.describe(), "versions": versions()}

    # Backbones -----------------------------------------------------------------------------------------------------

    def describe_backbones(self) -> None:
        """Record the properties of every backbone, and check that it suits the data."""
        self._attempt(self._describe)

    def _describe(self, name: str) -> None:
        backbone = open_backbone(name, seed=self.options.first_seed, device=self.options.device)
        self.data.check(backbone)
        description = backbone.description
        if self.options.data != SCENES:
            for note in backbone_notes(description):
                log.warning("%s", note)
        about: dict[str, Any] = {
            "family": description.family,
            "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
            "image_size": list(description.image_size),
            "patch_size": list(description.patch_size),
            "grid": list(backbone.patch_grid(*description.image_size)),
            "embedding_width": description.embedding_width,
            "context_length": description.context_length,
            "logits": description.logits,
            "dense_mode": description.dense_mode,
            "calibration": asdict(description.calibration),
            "weights_sha256": weights_hash(backbone),
        }
        if backbone.tuned_from is not None:
            about["tuned_from"] = backbone.tuned_from.as_dict()
        if description.positions != "library":
            about["positions"] = description.positions
        content = self._content(name)
        # Older records do not name the run.
        if content["about"] and any(about.get(key) != value for key, value in content["about"].items()):
            sources: list[dict[str, Any]] = [part.get("tuned_from") or {} for part in (content["about"], about)]
            was, now = (source.get("step") for source in sources)
            what, advice = "", ""
            if was is not None and was != now:
                what, advice = f" (step {was}, now {now})", f"name the step, as in {name}@{was}, or "
            raise InputError(
                f"{name} has changed since {self.record.file} was started{what}; {advice}choose another --out"
            )
        content["about"] = about
        # Before any training, which would share the cores.
        if not content["cost"]:
            content["cost"] = measure_cost(backbone)
        self.record.save()

    def _attempt(self, action: Callable[[str], None]) -> None:
        """Call ``action`` for every backbone that has not failed; an exception fails that backbone only."""
        for name in self.options.backbones:
            if name not in self.failures:
                try:
                    action(name)
                # A backbone is third-party code: whatever it raises, the other backbones are compared.
                except Exception as error:
                    self._fail(name, error)
        self._check_that_one_is_left()

    def _fail(self, name: str, error: Exception) -> None:
        """Record why a backbone failed; raise errors that would fail every backbone."""
        disk_error = isinstance(error, InputError) and getattr(error.__cause__, "errno", None) in DISK_ERRORS
        if disk_error or isinstance(error, TrainingStoppedError):
            raise error
        log.debug("%s failed", name, exc_info=error)
        kind = "" if isinstance(error, TTDError) else f"{type(error).__name__}: "
        self.failures[name] = kind + one_sentence(error)
        # A comparison whose backbones all fail at once leaves no results behind.
        if self.record.content["backbones"]:
            self.record.save()

    def _check_that_one_is_left(self) -> None:
        if len(self.failures) == len(self.options.backbones):
            name, reason = next(iter(self.failures.items()))
            raise TTDError(f"every backbone failed; the first, {name}: {reason}")

    # Arms ----------------------------------------------------------------------------------------------------------

    def run_arms(self) -> None:
        """Train and measure every arm that is not recorded yet."""
        executor: ArmExecutor = SequentialExecutor(self.options, self.data, self.stage)
        if self.options.jobs > 1 and self.options.tune:
            executor = ProcessExecutor(self.options, self.stage, fallback=executor)
        # Results of later seeds wait until those of earlier seeds are recorded.
        waiting: dict[ArmJob, ArmResult] = {}
        with closing(executor.run(self._missing_jobs())) as outcomes:
            for job, outcome in outcomes:
                if isinstance(outcome, Exception):
                    self._fail(job.backbone, outcome)
                    continue
                waiting[job] = outcome
                for other in sorted(waiting, key=lambda one: one.seed or 0):
                    if all(len(self._rows(other, scale)) == self._index(other) for scale in other.scales):
                        self._record(other, waiting.pop(other))
        self._check_that_one_is_left()

    def _missing_jobs(self) -> Iterator[ArmJob]:
        """Yield the arms to run; backbones that fail in the meantime are left out."""
        arms: list[tuple[int | None, str, Arm]] = [(None, name, "before") for name in self.options.backbones]
        arms += [
            (seed, name, arm)
            for seed in self.options.seed_numbers
            for name in self.options.backbones
            for arm in TRAINED_ARMS
        ]
        for seed, name, arm in arms:
            job = self._job(name, arm, seed)
            # A comparison that is started again with other factors of LoRA measures the missing ones.
            wanted = (1.0, *self.options.scales) if arm == "after" else job.scales
            missing = tuple(scale for scale in wanted if len(self._rows(job, scale)) <= self._index(job))
            if name not in self.failures and missing:
                yield replace(job, scales=missing)

    def _job(self, name: str, arm: Arm, seed: int | None) -> ArmJob:
        key = f"{_slug(name)}-{arm}" + ("" if seed is None else f"-seed{seed}")
        index = 0 if seed is None else seed - self.options.first_seed
        recorded = len(self._content(name)["curves"].get(arm, [])) > index
        source = self._content(name)["about"].get("tuned_from")
        tuned_from = None if source is None else str(TunedFrom(**source))
        return ArmJob(name, arm, seed, self.record.weights_file(key), self.out / WORK / key, recorded, tuned_from)

    def _index(self, job: ArmJob) -> int:
        return 0 if job.seed is None else job.seed - self.options.first_seed

    def _rows(self, job: ArmJob, scale: float) -> list[dict[str, float | None]]:
        """The recorded metrics of the job's arm at a factor of LoRA, one mapping per seed."""
        content = self._content(job.backbone)
        rows: list[dict[str, float | None]]
        if scale == 1:
            rows = content["figures"].setdefault(job.arm, [])
        else:
            rows = content["scaled"].setdefault(f"{scale:g}", [])
        return rows

    def _record(self, job: ArmJob, result: ArmResult) -> None:
        content, index = self._content(job.backbone), self._index(job)
        for scale, measurement in result.measurements.items():
            self._rows(job, scale).append(measurement.metrics)
            if scale == 1:
                bias = content["bias"].setdefault(job.arm, [])
                # Older records have no bias.
                bias += [{}] * (index - len(bias)) + [measurement.bias]
        content["seconds"][f"measure {job.label}"] = result.seconds
        if result.training is not None:
            content["curves"].setdefault(job.arm, [])[index:] = [result.training.curve]
            content["seconds"][f"tune {job.label}"] = result.training.seconds
            content["warnings"] += [f"{job.arm}, seed {job.seed}, {text}" for text in result.training.warnings]
        content.update(summary(self._result(job.backbone), self.data.metrics))
        self.record.save()
        remove_unfinished_work(job)

    def _content(self, name: str) -> dict[str, Any]:
        """What the record stores of a backbone."""
        content = self.record.content["backbones"].setdefault(name, {})
        empty: dict[str, Any] = {
            "about": {}, "figures": {}, "bias": {}, "curves": {}, "seconds": {}, "warnings": [],
            "cost": {}, "scaled": {},
        }  # fmt: skip
        for key, value in empty.items():
            content.setdefault(key, value)
        return content

    def _result(self, name: str) -> BackboneResult:
        content = self._content(name)
        parts = {key: content[key] for key in ("about", "curves", "seconds", "warnings", "bias", "cost", "scaled")}
        return BackboneResult(name, metrics=content["figures"], **parts)

    # Result --------------------------------------------------------------------------------------------------------

    def comparison(self) -> Comparison:
        """Return the finished comparison, with its gallery."""
        views: dict[str, list[dict[Arm, View]]] = {}
        samples: list[Sample] = []
        if self.options.gallery:
            samples = list(self.data.samples(CANDIDATES))
            self._attempt(lambda name: views.update({name: self._views(name, samples)}))
        names = [name for name in self.options.backbones if name not in self.failures]
        seen = {name: views[name] for name in names if name in views}
        gallery = choose_gallery(samples, seen, self.options.gallery)
        for name in names:
            self._content(name)["weights"] = self._weights(name)
        self.record.content["pictures"] = [{"key": one.key, "caption": one.caption, "why": one.why} for one in gallery]
        comparison = Comparison(
            settings=self.record.content["settings"] | {"command": self.record.content["command"]},
            metrics=self.data.metrics,
            backbones=[self._result(name) for name in names],
            gallery=gallery,
            trade_off=self.data.trade_off,
            attribution=self.data.attribution,
            failures=dict(self.failures),
            gallery_rule=gallery_rule(samples, seen, self.options.gallery),
        )
        choice = choose(comparison)
        self.record.content["choice"] = None if choice is None else choice.as_dict()
        self._remove_work()
        self.record.save()
        return comparison

    def _remove_work(self) -> None:
        """Delete the work of this comparison's arms, and nothing else that the folder may have."""
        for name in self.options.backbones:
            for arm in self.options.arms:
                for seed in (None,) if arm == "before" else self.options.seed_numbers:
                    remove_unfinished_work(self._job(name, arm, seed))
        with suppress(OSError):
            (self.out / WORK).rmdir()

    def _weights(self, name: str) -> dict[Arm, list[str]]:
        """For each trained arm one file per seed, relative to the folder of the comparison."""
        seeds = self.options.seed_numbers
        files = {arm: [self._job(name, arm, seed).weights for seed in seeds] for arm in TRAINED_ARMS if seeds}
        return {arm: [str(file.relative_to(self.out)) for file in of_arm] for arm, of_arm in files.items()}

    def _views(self, name: str, samples: Sequence[Sample]) -> list[dict[Arm, View]]:
        """The maps of every sample in every arm, for the first seed."""
        advance = self.stage(f"{name}: gallery", len(samples) * len(self.options.arms))
        views: list[dict[Arm, View]] = [{} for _ in samples]
        for arm in self.options.arms:
            seed = None if arm == "before" else self.options.first_seed
            backbone, _ = open_arm(self._job(name, arm, seed), self.options, self.data)
            ttd = TTD(backbone, self.options.ttd)
            for sample, by_arm in zip(samples, views, strict=True):
                by_arm[arm] = compute_view(ttd, sample)
                advance(1)
        return views


def _slug(name: str) -> str:
    """A file name for a backbone name; different names have different slugs."""
    plain = re.sub(r"[^\w.-]+", "_", name)[-60:]
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
