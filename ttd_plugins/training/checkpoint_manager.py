"""When checkpoints of a run are written, and how a run continues from one."""

from __future__ import annotations

import time
from pathlib import Path

from ttd_plugins.training import checkpoints
from ttd_plugins.training.config import RunConfig
from ttd_plugins.training.prefetching import BatchPrefetcher
from ttd_plugins.training.processes import main_process_first
from ttd_plugins.training.train_state import TrainState
from ttd_plugins.utils import distributed


class CheckpointManager:
    """Writes the checkpoints of a run and restores the newest.

    Args:
        out: folder of the run.
        options: intervals, and how many checkpoints are kept.
        rank: number of this process.
        processes: how many processes train together.

    Attributes:
        saved_step: step of the newest checkpoint; -1 where there is none.
        best_step: step of the best checkpoint, which is kept; ``None`` where there is none.
    """

    def __init__(self, out: Path, options: RunConfig, *, rank: int = 0, processes: int = 1) -> None:
        self.out, self.options = out, options
        self.rank, self.processes = rank, processes
        self.saved_step = -1
        self.best_step: int | None = None
        self._saved_at = time.monotonic()

    def restore(self, state: TrainState) -> bool:
        """Load the newest checkpoint into ``state``; returns ``False`` where there is none."""
        steps = checkpoints.checkpoint_steps(self.out)
        if not steps:
            return False
        stored = checkpoints.read_checkpoint(self.out)
        where = str(checkpoints.checkpoint_folder(self.out, steps[-1]))
        state.restore(stored, where, rank=self.rank, processes=self.processes)
        self.saved_step = state.step
        return True

    def start_clock(self) -> None:
        """Measure ``checkpoint_minutes`` from now."""
        self._saved_at = time.monotonic()

    def is_due(self, state: TrainState) -> bool:
        """Whether a checkpoint is due after the last step. Collective."""
        if state.step == state.total_steps:
            return True
        if self.options.checkpoint_every and state.step % self.options.checkpoint_every == 0:
            return True
        if not self.options.checkpoint_minutes:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.options.checkpoint_minutes
        # Every process takes part in a checkpoint, and their clocks differ.
        return bool(distributed.gathered(late)[0])

    def save(self, state: TrainState) -> None:
        """Write a checkpoint. Collective.

        Raises:
            InputError: it cannot be written.
        """
        is_main = self.rank == 0
        checkpoint = state.to_checkpoint(is_main=is_main, processes=self.processes)

        def write() -> None:
            assert checkpoint is not None
            protected = [*state.health.kept, *([] if self.best_step is None else [self.best_step])]
            checkpoints.write_checkpoint(self.out, checkpoint, self.options.keep, protected=protected)

        main_process_first(write, is_main=is_main)
        self.saved_step = state.step
        self.start_clock()

    def save_within_step(self, state: TrainState, prefetcher: BatchPrefetcher) -> bool:
        """Save the state after the last complete step, while the next one is under way. Collective.

        Returns:
            ``False`` where that state is lost because a forward pass of the next step changed it already.
        """
        if self.saved_step == state.step:
            return True
        point = state.point
        step_has_begun = (prefetcher.epoch, prefetcher.position) != (point.epoch, point.position)
        if step_has_begun and state.changes_in_forward_pass():
            return False
        self.save(state)
        return True

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        steps = checkpoints.checkpoint_steps(self.out)
        return checkpoints.checkpoint_folder(self.out, steps[-1]) if steps else None
