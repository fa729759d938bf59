"""mmengine's training loops, from any iteration on as if there had been no interruption."""

from __future__ import annotations

from bisect import bisect
from typing import Any

import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.runner import EpochBasedTrainLoop

from vitarium.detection.data import Batches, batch_number, training_loader
from vitarium.training.data import Layout, seeded, seeded_step

_VALIDATION = 2  # what a place is drawn for, beside steps and samples


class EpochLoop(EpochBasedTrainLoop):
    """Epochs, with everything that is drawn seeded by the iteration.

    A run may begin inside an epoch. Where a validation was due when the checkpoint was written, it
    comes first, since a checkpoint is written before it.

    Args:
        runner: a `DetectionRunner`.
        dataloader: its config.
        max_epochs: of the whole run.
        **kwargs: ``val_begin``, ``val_interval`` and ``dynamic_intervals``, as mmengine has them.

    Attributes:
        measures: of the last validation.
    """

    def __init__(
        self, runner: Any, dataloader: dict[str, Any], max_epochs: int, **kwargs: Any
    ) -> None:
        self.layout = Layout(
            dataloader["batch_size"],
            runner.optim_wrapper.get("accumulative_counts", 1),
            *get_dist_info(),
        )
        loader = training_loader(dataloader, runner.build_dataloader, self.layout, runner.seed)
        super().__init__(runner, loader, max_epochs, **kwargs)
        assert isinstance(loader.batch_sampler, Batches)
        self._batches = loader.batch_sampler
        self.measures: dict[str, float] = {}

    def run(self) -> torch.nn.Module:
        """Train to the end.

        Raises:
            KeyboardInterrupt: a signal came; a checkpoint was written first.
        """
        self.runner.begin()
        self.runner.call_hook("before_train")
        if self._iter and self._iter == self._epoch * len(self.dataloader):
            self._validate(self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self._batches.span = self._iter, (self._epoch + 1) * len(self.dataloader)
            self.run_epoch()
            self._validate(self._epoch, self._max_epochs)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Take one step, or a part of one that accumulates; ``idx`` counts from the start."""
        with seeded_step(self.runner.seed, batch_number(self.layout, self._iter)):
            super().run_iter(self._iter % len(self.dataloader), data_batch)
        if self.updated and self._iter < self._max_iters and self._asked():
            self.runner.checkpoint_hook.save_now(self.runner)
            raise KeyboardInterrupt(
                f"interrupted after iteration {self._iter} of {self._max_iters}; --resume goes on"
            )

    @property
    def updated(self) -> bool:
        """Whether no gradients wait for others to be added."""
        return bool(self.runner.optim_wrapper.should_update())

    def _validate(self, done: int, last: int) -> None:
        """Validate if it is due after so many epochs or iterations."""
        step = bisect(self.dynamic_milestones, done + 1) - 1
        self.val_interval = self.dynamic_intervals[step]
        due = done >= self.val_begin and (done % self.val_interval == 0 or done == last)
        if self.runner.val_loop is not None and due:
            with seeded(self.runner.seed, _VALIDATION, self._iter):
                self.measures = self.runner.val_loop.run()

    def _asked(self) -> bool:
        """Whether a signal came to any process."""
        if self.layout.world == 1:
            return self.runner.interrupted()
        asked = torch.tensor(int(self.runner.interrupted()))
        all_reduce(asked, "max")
        return bool(asked)


class IterLoop(EpochLoop):
    """So many iterations, with validations between them.

    Args:
        runner: a `DetectionRunner`.
        dataloader: its config.
        max_iters: of the whole run.
        **kwargs: as of `EpochLoop`, counted in iterations.
    """

    def __init__(
        self, runner: Any, dataloader: dict[str, Any], max_iters: int, **kwargs: Any
    ) -> None:
        super().__init__(runner, dataloader, 1, **{"val_interval": 1000, **kwargs})
        self._max_iters = int(max_iters)

    def run(self) -> torch.nn.Module:
        """Train to the end.

        Raises:
            KeyboardInterrupt: a signal came; a checkpoint was written first.
        """
        self.runner.begin()
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        if self._iter:
            self._validate(self._iter, self._max_iters)
        self._batches.span = self._iter, self._max_iters
        for batch in self.dataloader:
            if self.stop_training:
                break
            self.runner.model.train()
            self.run_iter(self._iter, batch)
            self._validate(self._iter, self._max_iters)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model
