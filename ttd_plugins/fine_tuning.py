"""Fine-tuning on your own image-text pairs in one call, with progress on the terminal and heat maps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.engine_checks import require_adapter
from ttd_plugins.errors import InputError, MissingDependencyError
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.prefetching import PairBatches
from ttd_plugins.training.reporting import Reporter
from ttd_plugins.training.run import Evaluate, LoaderFactory, Sample, TrainResult, train_run
from ttd_plugins.utils.files import given_path
from ttd_plugins.utils.progress import Advance

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.engine import TTD

SHOWN_METRICS = (
    "loss", "tag", "distill", "contrastive", "anchor", "tags_per_caption", "selected_per_caption", "images_per_second",
    "tags/map", "text/caption_iou", "retrieval/r1", "scenes/tag_ap", "scenes/caption_iou", "scenes/retrieval_r1",
)  # fmt: skip


def fine_tune(
    config: TrainConfig | Mapping[str, Any] | Path | str | None,
    out: Path | str,
    *,
    backbone: DenseAdapter | None = None,
    loader: PairBatches | LoaderFactory | None = None,
    resume: bool = False,
    progress: bool = True,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Fine-tune a backbone by TTD (arXiv 2404.00384) and write checkpoints, logs and heat maps into a folder.

    The call is the same in one process and under ``accelerate launch`` or ``torchrun``. Several processes train on
    their joint batch, with the loss and the gradient that one process would have with it.

    Args:
        config: a :class:`~ttd_plugins.training.config.TrainConfig`, nested dictionaries, or the path of a YAML file.
            ``None`` resumes with the configuration in ``out``.
        out: folder of the run.
        backbone: an adapter without LoRA, tuned in place; by default the one that the configuration names.
        loader: batches of pairs, or a function of (backbone, rank, processes) that returns them; by default the data
            that the configuration names.
        resume: whether to continue the run in ``out``; the result is that of an uninterrupted run.
        progress: whether to show progress on the terminal.
        evaluate: called with the engine and the step every ``run.evaluate_every`` steps, on the main process; the
            metrics that it returns are logged. A labelled set of the section ``evaluation`` needs no such function.

    Returns:
        The tuned backbone and the last metrics.

    Raises:
        InputError: an option, the data or the folder cannot be used; ``out`` has a run that is not to be resumed or has
            another configuration; a checkpoint cannot be written.
        TrainingStoppedError: SIGTERM or Ctrl-C; the state is saved.
        NonFiniteError: a loss or gradient was not finite, and the configuration does not allow to skip the step.
        TTDError: the backbone cannot be loaded, or cannot be tuned as configured.
    """
    out = given_path(out)
    if backbone is not None:
        backbone = require_adapter(backbone, "fine_tune()")
    if config is None:
        stored = out / "config.yaml"
        if not resume or not stored.is_file():
            raise InputError(
                f"there is no configuration: none is given, and {out} has no run that --resume could continue"
            )
        config = TrainConfig.read(stored)
    elif isinstance(config, Path | str):
        config = TrainConfig.read(config)
    elif not isinstance(config, TrainConfig):
        config = TrainConfig.from_dict(config)
    require_packages(config)
    return train_run(
        config,
        out,
        backbone=backbone,
        loader=loader,
        resume=resume,
        reporter=TerminalReporter() if progress else None,
        draw=draw_samples,
        evaluate=evaluate,
    )


def draw_samples(ttd: TTD, step: int, folder: Path, samples: list[Sample]) -> None:
    """Write heat maps of the fixed samples as ``folder/sample-1.png`` and so on.

    Raises:
        TTDError: a heat map cannot be written.
    """
    from ttd_plugins.reports.heatmaps import draw_maps

    for number, (image, caption, tags) in enumerate(samples, 1):
        maps = ttd.maps(image, caption, size=(image.height, image.width), tags=tags)
        draw_maps(maps, folder / f"sample-{number}.png")


class TerminalReporter(Reporter):
    """A progress bar with the metrics of the last log line; messages appear above it. Without a terminal: lines."""

    displays_messages = True

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.progress: Any = None
        self.task: Any = None
        self.steps = self.started_at = self.done = 0
        self.clock = time.monotonic()

    def on_start(self, steps: int, done: int) -> None:
        """Show the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.fields[title]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.steps, self.started_at, self.done, self.clock = steps, done, done, time.monotonic()
        if done:
            self.console.print(f"continuing after step {done}", highlight=False)
        # Without a terminal rich prints a bar only at its end; the log lines say more.
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=done, title="fine-tuning")
        self.progress.start()

    def on_step(self, step: int, loss: float) -> None:
        """Advance the bar."""
        self.done = step
        self.progress.update(self.task, completed=step)

    def stage(self, name: str, steps: int) -> Advance:
        """Show a second bar until the subtask is done."""
        task, left = self.progress.add_task("", total=steps, title=name), [steps]

        def advance(done: int) -> None:
            left[0] -= done
            self.progress.advance(task, done)
            if left[0] <= 0 and task in self.progress.task_ids:
                self.progress.remove_task(task)

        return advance

    def on_log(self, metrics: Mapping[str, Any]) -> None:
        """Show metrics beside the bar, or on a line of their own without a terminal."""
        names = [name for name in metrics if name in SHOWN_METRICS] or [name for name in metrics if name != "step"]
        text = "  ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {metrics[name]:.4g}" for name in names)
        if self.console.is_terminal:
            self.progress.update(self.task, description=text)
        else:
            left = self._time_left()
            self.console.print(
                f"step {metrics['step']}/{self.steps}: {text}" + (f"  {left} left" if left else ""),
                highlight=False,
                soft_wrap=True,
            )

    def _time_left(self) -> str | None:
        """Time for the steps that are left, by the mean over those taken so far; ``None`` before the first."""
        taken, left = self.done - self.started_at, self.steps - self.done
        if taken < 1 or left < 1:
            return None
        seconds = (time.monotonic() - self.clock) / taken * left
        return str(timedelta(seconds=max(1, round(seconds))))

    def on_message(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def on_end(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()


def require_packages(config: TrainConfig) -> None:
    """Check before a long training for packages that only its first heat map needs.

    Raises:
        MissingDependencyError: matplotlib is not installed, and heat maps are configured.
    """
    if config.run.heatmap_every and config.run.heatmap_samples:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "heat maps need matplotlib, which is not installed; run: pip install matplotlib, or set "
                "run.heatmap_every to 0"
            ) from error
