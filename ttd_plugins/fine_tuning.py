"""Fine-tuning on image-text pairs of one's own, in one call: the run, its progress on the terminal, its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttd_plugins.errors import InputError, MissingDependencyError
from ttd_plugins.training.config import TrainConfig
from ttd_plugins.training.run import Evaluate, PairBatches, Reporter, TrainResult, train_run

if TYPE_CHECKING:
    from ttd_plugins.adapter import DenseAdapter
    from ttd_plugins.engine import TTD

SHOWN = (
    "loss", "tag", "distill", "contrastive", "tags_per_caption", "selected_per_caption", "images_per_second",
    "tags/map", "text/caption_iou", "retrieval/r1", "scenes/tag_ap", "scenes/caption_iou", "scenes/retrieval_r1",
)  # fmt: skip


def fine_tune(
    config: TrainConfig | Mapping[str, Any] | Path | str | None,
    out: Path | str,
    *,
    backbone: DenseAdapter | None = None,
    loader: PairBatches | Callable[[DenseAdapter, int, int], PairBatches] | None = None,
    resume: bool = False,
    progress: bool = True,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Fine-tune a backbone by TTD (arXiv 2404.00384), and leave all that came of it in a folder.

    It works unchanged in one process and under ``accelerate launch`` or ``torchrun``: the processes then train on the
    joint batch of all of them, and the loss and gradient are those that one process would have with it.

    Args:
        config: every option, as a :class:`~ttd_plugins.training.config.TrainConfig`, as nested dictionaries, or as
            the path of a YAML file; ``None``, to resume, means the one in ``out``.
        out: folder of the run.
        backbone: an adapter without LoRA, tuned in place; by default the one that the configuration names.
        loader: batches of pairs, or a function of (backbone, process, processes) that gives them; by default those
            of the data that the configuration names.
        resume: whether to go on where the run in ``out`` stopped, as if it had not; a run that never started starts.
        progress: whether to show progress on the terminal.
        evaluate: called with the engine and the step every ``run.evaluate_every`` steps, on the main process; the
            figures that it gives are logged. The labelled set of the section ``evaluation`` needs no such function.

    Returns:
        The tuned backbone and the last figures.

    Raises:
        InputError: an option, the data or the folder cannot be used; there is a run in ``out`` already, or one that
            differs; a checkpoint cannot be written.
        TrainingStoppedError: SIGTERM or Ctrl-C; the state is saved.
        NonFiniteError: a loss or gradient was not finite, and the configuration does not let it pass.
        TTDError: the backbone cannot be loaded or tuned so.
    """
    if config is None:
        kept = Path(out) / "config.yaml"
        if not resume or not kept.is_file():
            raise InputError(
                f"there is no configuration: neither one given nor a run in {out} that --resume goes on with"
            )
        config = TrainConfig.read(kept)
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


def draw_samples(ttd: TTD, step: int, folder: Path, samples: list[tuple[Any, str, list[str] | None]]) -> None:
    """Heat maps of the fixed samples as ``folder/sample-1.png`` and so on.

    Raises:
        TTDError: they cannot be drawn.
    """
    from ttd_plugins.reports.heatmaps import draw_maps

    for number, (picture, caption, tags) in enumerate(samples, 1):
        maps = ttd.maps(picture, caption, size=(picture.height, picture.width), tags=tags)
        draw_maps(maps, folder / f"sample-{number}.png")


class TerminalReporter(Reporter):
    """A progress bar with the figures of the last line of the log, and every sentence above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.progress: Any = None
        self.task: Any = None

    def started(self, steps: int, done: int) -> None:
        """Put up the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.fields[title]}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        if done:
            self.console.print(f"going on after step {done}", highlight=False)
        # Without a terminal a bar would only be printed at the end; the lines of the log say more.
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=done, title="fine-tuning")
        self.progress.start()

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step)

    def stage(self, name: str, steps: int) -> Callable[[int], None]:
        """Put up a second bar until the stage is done."""
        task, left = self.progress.add_task("", total=steps, title=name), [steps]

        def advance(done: int) -> None:
            left[0] -= done
            self.progress.advance(task, done)
            if left[0] <= 0 and task in self.progress.task_ids:
                self.progress.remove_task(task)

        return advance

    def logged(self, figures: Mapping[str, Any]) -> None:
        """Show figures beside the bar, or on a line where there is no terminal."""
        names = [name for name in figures if name in SHOWN] or [name for name in figures if name != "step"]
        said = "  ".join(f"{name.replace('_per_', '/').replace('_', ' ')} {figures[name]:.4g}" for name in names)
        if self.console.is_terminal:
            self.progress.update(self.task, description=said)
        else:
            self.console.print(f"step {figures['step']}: {said}", highlight=False, soft_wrap=True)

    def said(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def ended(self) -> None:
        """Take the bar down."""
        if self.progress is not None:
            self.progress.stop()


def require_packages(config: TrainConfig) -> None:
    """Refuse now what a long training would only notice at its first picture.

    Raises:
        MissingDependencyError: matplotlib is not installed, and pictures are asked for.
    """
    if config.run.picture_every and config.run.pictures:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                "heat maps need matplotlib, which is not installed; run: pip install matplotlib, or set "
                "run.picture_every to 0"
            ) from error
