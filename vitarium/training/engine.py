"""The loop: steps, averages, validation, snapshots; one process or many."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from vitarium import checkpoints
from vitarium.training.config import Config
from vitarium.training.data import Batch, Layout, seeded_step, training_batches, validation_batches
from vitarium.training.logs import Log
from vitarium.training.runs import RunFolder
from vitarium.training.sources import Source
from vitarium.training.states import Average, model_state, optimizer_state, restore, shard
from vitarium.training.tasks import Task, create_task

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_SCHEDULES = {"cosine": "cosine", "poly": "poly", "step": "multistep", "constant": "constant"}


class Engine:
    """A config brought to life on this process' device, beside the other processes.

    To be used in a ``with`` statement, which leaves their group in the end.

    Args:
        config: the run.
        device: ``cpu`` or ``cuda``; None for CUDA where there is one.

    Attributes:
        main: whether this process, of all, writes and prints.

    Raises:
        ValueError: the config, its data or its model do not fit together, or are not there.
        CheckpointError: the weights to start from cannot be had or do not fit.
    """

    def __init__(self, config: Config, device: str | None = None) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError(
                'accelerate is not installed: pip install "vitarium[train]"'
            ) from error
        cuda = torch.cuda.is_available()
        if device not in (None, "cpu", *(["cuda"] if cuda else [])):
            raise ValueError(f"device: expected cpu{' or cuda' * cuda}, got {device!r}")
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(config.deterministic)
        if config.deterministic:  # cuBLAS asks for it, before its first call
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._accelerator = Accelerator(
            cpu=device == "cpu" or not cuda, mixed_precision=_PRECISIONS[config.train.precision]
        )
        try:
            self._build(config)
        except BaseException:
            self.__exit__()
            raise

    def _build(self, config: Config) -> None:
        self._device: torch.device = self._accelerator.device
        self.main: bool = self._accelerator.is_main_process
        self._config = config
        self._layout = Layout(
            config.train.batch_size,
            config.train.accumulation,
            self._accelerator.process_index,
            self._accelerator.num_processes,
        )
        self._task: Task[Any] = create_task(config)
        last = config.train.channels_last
        self._format: torch.memory_format = torch.channels_last if last else torch.contiguous_format
        self._model = self._task.model.to(self._device).to(memory_format=self._format)
        self._trained = self._task.trained  # a part of the model, or all of it
        self._average: Average | None = None
        self._nothing = self._tried()

    def _tried(self) -> Tensor:
        """Counts of no image, from a model that shows that it takes images of the config's size."""
        model, task = self._model.eval(), self._task
        try:
            with torch.no_grad(), self._accelerator.autocast():
                return task.counts(model, task.blank().to(self._device, self._format))
        except (RuntimeError, AssertionError) as error:
            height, width = self._config.data.image_size
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"data.image_size: {self._config.model.name} cannot take images of 3 channels and "
                f"{height} x {width} pixels: {reason}"
            ) from error

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the group of processes; another engine may follow, of another precision."""
        from accelerate.state import AcceleratorState

        torch.use_deterministic_algorithms(self._before)
        self._accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)

    def load(self, checkpoint: str | Path) -> None:
        """Take weights from a file: of the model, or of the part of it that is trained.

        Raises:
            CheckpointError: it cannot be read or does not fit.
        """
        checkpoints.load(self._trained, checkpoint)

    def test(self) -> dict[str, float]:
        """Validate once.

        Returns:
            The task's measures.

        Raises:
            ValueError: no image can be read.
        """
        log = Log(None, self._config, 0, 1.0, self._layout.images, self.main)
        return self._validated(0, log)

    def row(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """Measures among the columns of timm's results, where they are a classifier's."""
        return self._task.row(measures)

    def train(self, output: str | Path, resume: bool = False) -> dict[str, float]:
        """Train to the end, or to an interruption.

        Args:
            output: the run's folder, which all processes share: a new one, or that of this run
                where ``resume`` says so.
            resume: whether to go on from the newest snapshot.

        Returns:
            The last validation's measures.

        Raises:
            ValueError: the folder holds another run, or none to go on with; the loss is not
                finite.
            OSError: the folder cannot be written; what was complete there stays.
            KeyboardInterrupt: SIGINT or SIGTERM came; a snapshot was written first.
        """
        config, task = self._config, self._task
        folder = RunFolder(Path(output), config)
        updates, epoch = run_length(config, task.train, self._layout)
        log = Log(folder, config, updates, epoch, self._layout.images, self.main)
        transform = task.transform(training=True)
        module, optimizer = self._prepared()
        scheduler = create_scheduler(
            config, optimizer.optimizer, self._layout.images, updates, epoch
        )
        # Whatever does not fit was said by now: a new folder is left without a run.
        found = self._opened(folder, resume)
        update, best, measures = 0, -math.inf, {}
        if found is not None:
            update, best, measures = found["update"], found["best"], found["measures"]
            self._restore(optimizer.optimizer, found)
        if self.main:
            folder.rewind(update)
        batches = training_batches(
            task.train,
            transform,
            self._layout,
            seed=config.seed,
            update=update,
            workers=config.data.workers,
            strict=config.data.strict,
            repeats=config.data.repeats,
        )
        validate = _every(config.train.validate_every * epoch, updates)
        keep = _every(config.train.checkpoint_every or epoch, updates)
        self._model.train()
        with closing(batches), log.running(update), _interruption() as interrupted:
            while update < updates:
                scheduler.step_update(update)
                losses = self._step(module, optimizer, batches, update, log)
                update += 1
                if self._average is not None:
                    self._average.update(self._trained, update)
                log.count(losses)
                told = update % config.train.log_every == 0 or update == updates
                if told or keep(update) or self._layout.world == 1:
                    self._name_unreadable(log)
                if validate(update) or keep(update):
                    self._require_finite(log)
                if told:
                    log.losses(update, self._mean(log.mean()), optimizer.param_groups)
                if validate(update):
                    measures = self._validated(update, log)
                    log.measures(update, measures)
                    if measures[task.best] > best:
                        best = measures[task.best]
                        self._save_weights(folder, "best", update, measures)
                # Processes must agree: where there are several, they do when the log is written.
                stop = self._any(interrupted()) if told or self._layout.world == 1 else False
                if keep(update) or stop:
                    self._require_finite(log)
                    self._snapshot(folder, update, best, measures, optimizer.optimizer)
                if stop and update < updates:
                    raise KeyboardInterrupt(
                        f"interrupted after update {update} of {updates}; --resume goes on"
                    )
        self._save_weights(folder, "last", updates, measures)
        return measures

    def _opened(self, folder: RunFolder, resume: bool) -> dict[str, Any] | None:
        """The snapshot to go on from; what one process finds wrong, all raise."""
        from accelerate.utils import broadcast_object_list

        fault: list[str | None] = [None]
        if self.main:
            try:
                folder.open(resume)
            except (ValueError, OSError) as error:
                fault = [str(error)]
        if self._layout.world > 1:
            broadcast_object_list(fault)
        if fault[0] is not None:
            raise ValueError(fault[0])
        found = folder.snapshots.newest() if resume else None
        if found is not None and found["images"] != self._layout.images:
            raise ValueError(
                f"{folder.path}: its run takes {found['images']} images a step, these processes "
                f"take {self._layout.images}; train.accumulation can make up for their number"
            )
        return found

    def _prepared(self) -> tuple[nn.Module, Any]:
        """The model for steps of all processes together, and its optimizer."""
        train, model = self._config.train, self._model
        if train.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        several = self._layout.world > 1
        if train.sync_batchnorm and several:
            if self._device.type == "cpu":
                raise ValueError("train.sync_batchnorm: expected false on CPUs, got true")
            self._model = model = convert_sync_batchnorm(model)
        if train.parallel == "fsdp2":
            if not several:
                raise ValueError("train.parallel: expected ddp for a single process, got fsdp2")
            shard(model, init_device_mesh(self._device.type, (self._layout.world,)))
        if self._config.ema is not None:
            self._average = Average(self._trained, self._config.ema.decay, self._config.ema.warmup)
        if train.compile:
            model.compile()
        optimizer = self._accelerator.prepare_optimizer(
            create_optimizer(
                self._config,
                self._task.parameters(self._config.optimizer.weight_decay),
                self._layout.images,
            )
        )
        if not several or isinstance(model, FSDPModule):
            return model, optimizer
        ids = [self._device.index] if self._device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids), optimizer

    def _step(
        self, module: nn.Module, optimizer: Any, batches: Iterator[Batch], update: int, log: Log
    ) -> dict[str, Tensor]:
        """One update of the weights; the losses of this process."""
        layout, accelerator = self._layout, self._accelerator
        total: dict[str, Tensor] = {}
        for part in range(layout.accumulation):
            batch = next(batches)
            log.unreadable(update, batch.failures)
            batch = batch.to(self._device, self._format)
            with (
                seeded_step(self._config.seed, layout.micro_batch(update, part)),
                self._unsynchronised(module, part < layout.accumulation - 1),
            ):
                with accelerator.autocast():
                    losses = self._task.losses(module, batch)
                accelerator.backward(losses["loss"] / layout.accumulation)
            for name, loss in losses.items():
                total[name] = total.get(name, 0) + loss.detach() / layout.accumulation
        if self._config.optimizer.clip_grad is not None:
            accelerator.unscale_gradients(optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def _unsynchronised(self, module: nn.Module, wanted: bool) -> Any:
        """Gradients stay with this process where more of them are to come."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not wanted)
        elif isinstance(module, DistributedDataParallel) and wanted:
            return module.no_sync()
        return nullcontext()

    def _validated(self, update: int, log: Log) -> dict[str, float]:
        """Measures over all images of all processes, of the average of weights if there is one."""
        config, task, model = self._config, self._task, self._model
        batches = validation_batches(
            task.val,
            task.transform(training=False),
            task.validation_layout(self._layout),
            workers=config.data.workers,
            strict=config.data.strict,
        )
        average = self._average
        before = model.training
        model.eval()
        counts = self._nothing.clone()
        with (
            torch.no_grad(),
            average.applied(self._trained) if average is not None else nullcontext(),
            closing(batches),
        ):
            if self._layout.world > 1:  # each process has seen statistics of its own
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, 0)
            for batch in self._together(batches):
                log.unreadable(update, batch.failures)
                with self._accelerator.autocast():
                    counts += task.counts(model, batch.to(self._device, self._format))
        model.train(before)
        self._name_unreadable(log)
        return task.measures(self._accelerator.reduce(counts, "sum"))

    def _name_unreadable(self, log: Log) -> None:
        """What any process could not read, the main one says."""
        from accelerate.utils import gather_object

        found = log.unsaid()
        log.name(gather_object(found) if self._layout.world > 1 else found)

    def _require_finite(self, log: Log) -> None:
        """Refuse to validate or keep weights that are lost, even where no loss shows it yet."""
        values = self._trained.state_dict().values()
        parts = [x.to_local() if isinstance(x, DTensor) else x for x in values]
        finite = log.finite() and bool(torch.stack([x.isfinite().all() for x in parts]).all())
        if self._any(not finite):
            raise ValueError(
                "loss: expected a finite number, and finite weights, got others; lower "
                "optimizer.lr, or use bf16 or fp32"
            )

    def _together(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches with images, and one without any wherever sharded weights are waited for."""
        sharded = isinstance(self._model, FSDPModule)
        blank = self._task.blank()
        batch = None
        while True:
            batch = next(batches, None)
            if batch is None or not len(batch.images):
                batch = (
                    None if batch is None else Batch(blank.images, blank.targets, batch.failures)
                )
            if not (self._any(batch is not None) if sharded else batch is not None):
                return
            yield blank if batch is None else batch

    def _snapshot(
        self,
        folder: RunFolder,
        update: int,
        best: float,
        measures: dict[str, float],
        optimizer: Optimizer,
    ) -> None:
        content: dict[str, Any] = {
            "update": update,
            "images": self._layout.images,
            "best": best,
            "measures": measures,
            "model": model_state(self._trained),
            "optimizer": optimizer_state(self._trained, optimizer),
        }
        if self._average is not None:
            content["average"] = self._average.state(self._trained)
        if self._accelerator.scaler is not None:
            content["scaler"] = self._accelerator.scaler.state_dict()
        if self.main:
            folder.snapshots.save(update, content)
        self._accelerator.wait_for_everyone()

    def _restore(self, optimizer: Optimizer, found: dict[str, Any]) -> None:
        restore(self._trained, optimizer, found["model"], found["optimizer"])
        if self._average is not None:
            self._average.restore(self._trained, found["average"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(found["scaler"])

    def _save_weights(
        self, folder: RunFolder, name: str, update: int, measures: dict[str, float]
    ) -> None:
        average = self._average
        with average.applied(self._trained) if average is not None else nullcontext():
            tensors = model_state(self._trained)
            if self.main:
                folder.save_weights(name, tensors, {"update": update, "measures": measures})

    def _mean(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Over processes."""
        if not losses:
            return {}
        values = self._accelerator.reduce(torch.stack([*losses.values()]).float(), "mean")
        return dict(zip(losses, values.tolist(), strict=True))

    def _any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        if self._layout.world == 1:
            return flag
        found = torch.tensor(float(flag), device=self._device)
        return bool(self._accelerator.reduce(found, "sum") > 0)


def run_length(config: Config, train: Any, layout: Layout) -> tuple[int, float]:
    """Updates of a run, and updates of one pass over the data.

    Raises:
        ValueError: a stream whose number of images the config must say.
    """
    images = len(train) if isinstance(train, Source) else config.data.samples
    if images is None:
        raise ValueError("data.samples: expected how many images a pass has, streams do not say")
    if not images:
        raise ValueError("data.train: expected images, got none")
    epoch = images / layout.images
    schedule = config.schedule
    updates = schedule.updates
    if updates is None:
        assert schedule.epochs is not None
        updates = max(1, math.ceil(schedule.epochs * epoch))
    return updates + _cooldown(config, epoch), epoch


def create_optimizer(
    config: Config, parameters: nn.Module | list[dict[str, Any]], images: int
) -> Optimizer:
    """Create timm's optimizer for steps of so many images.

    Args:
        config: of the run.
        parameters: what is changed: a model, or groups with a weight decay each.
        images: of a step, over all processes.

    Raises:
        ValueError: no optimizer of this name, or one that has not what the config sets.
    """
    section = config.optimizer
    try:
        info = get_optimizer_info(section.name)
    except ValueError as error:
        raise ValueError(f"optimizer.name: {error}") from error
    if info.second_order:
        raise ValueError(f"optimizer.name: {section.name} needs second derivatives, got none")
    kwargs = {}
    for key in ("momentum", "betas", "eps"):
        value = getattr(section, key)
        if value is not None and not getattr(info, f"has_{key}"):
            raise ValueError(f"optimizer.{key}: {section.name} has none, got {value}")
        if value is not None:
            kwargs[key] = value
    if isinstance(parameters, nn.Module):
        kwargs |= {
            "weight_decay": section.weight_decay,
            "layer_decay": section.layer_decay,
            "fallback_no_weight_decay": True,  # of muon: position tables are no matrices
        }
    return create_optimizer_v2(
        parameters, opt=section.name, lr=section.lr * _scale(config, images), **kwargs
    )


def create_scheduler(
    config: Config, optimizer: Optimizer, images: int, updates: int, epoch: float
) -> Scheduler:
    """Create timm's schedule, counted in updates, of which a pass over the data has ``epoch``."""
    section, scale = config.schedule, _scale(config, images)
    warmup = section.warmup_updates or round((section.warmup_epochs or 0) * epoch)
    prefix = section.warmup_prefix
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=_SCHEDULES[section.name],
        num_epochs=max(1, updates - _cooldown(config, epoch) - warmup * prefix),
        warmup_epochs=warmup,
        warmup_prefix=prefix,
        warmup_lr=section.warmup_lr * scale,
        min_lr=section.min_lr * scale,
        decay_milestones=[round(x * epoch) for x in section.milestones or ()],
        decay_rate=section.power or section.decay_rate or 1.0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert scheduler is not None
    return scheduler


def _cooldown(config: Config, epoch: float) -> int:
    """Updates after the schedule's end."""
    return round(config.schedule.cooldown_epochs * epoch)


def _scale(config: Config, images: int) -> float:
    """Of learning rates, for a step of so many images."""
    stated = config.optimizer.lr_batch
    return 1.0 if stated is None else images / stated


def _every(period: float, last: int) -> Callable[[int], bool]:
    """Whether something is due after an update: once in each period, and after the last one."""
    return lambda update: update == last or update // period > (update - 1) // period


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are noted; a second one is not waited for."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # has no signals
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
