"""mmengine's Runner for runs that are interrupted, and for CPUs, with one process or many."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import mmdet.registry
import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_world_size, init_dist, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import is_model_wrapper
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from vitarium.checkpoints import CheckpointError
from vitarium.checkpoints.disk import replacing
from vitarium.detection import checks
from vitarium.detection.checkpoints import WholeCheckpointHook, clear, located, newest, read
from vitarium.detection.configs import differences, load_config, save_config, without_pretrained
from vitarium.detection.loops import EpochLoop, IterLoop
from vitarium.detection.pictures import Extremes
from vitarium.heads.mmdet.released import fitted
from vitarium.tools.list import did_you_mean
from vitarium.training.signals import interruption

_CONFIG = "config.json"
_VARIABLES: dict[str, tuple[str, ...]] = {  # rank, number of processes, rank on the machine
    "none": (),
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


class DetectionRunner(Runner):
    """mmengine's, with loops and checkpoints of our own.

    Attributes:
        interrupted: whether a signal asks for the end.
        begin: called before the first iteration.
    """

    interrupted: Callable[[], bool]
    begin: Callable[[], None]

    @property
    def _detector(self) -> nn.Module:
        model: Any = self.model
        detector: nn.Module = model.module if is_model_wrapper(model) else model
        return detector

    def build_model(self, model: Any) -> nn.Module:
        """The detector that a config's ``model`` describes, if its parts fit."""
        built: nn.Module = super().build_model(model)
        checks.check_channels(built)
        return built

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        """Register mmengine's hooks, and ours for checkpoints in the place of its own."""
        settings = _arguments((hooks or {}).get("checkpoint") or {})
        self.checkpoint_hook = WholeCheckpointHook(**settings)
        super().register_default_hooks({**(hooks or {}), "checkpoint": self.checkpoint_hook})

    def _maybe_compile(self, target: str) -> None:
        """Compile the backbone and the neck where a config says ``compile``.

        mmengine takes the whole step, whose shapes follow what is found on the images.
        """
        settings = self.cfg.get("compile")
        if not settings:
            return
        for part in ("backbone", "neck"):
            if hasattr(self._detector, part):
                getattr(self._detector, part).compile(**({} if settings is True else settings))

    def build_train_loop(self, loop: Any) -> EpochLoop:
        """The loop that a config's ``train_cfg`` describes."""
        if isinstance(loop, EpochLoop):
            return loop
        settings = _arguments(loop)
        settings.pop("by_epoch", None)  # said by max_epochs or max_iters too
        kind = EpochLoop if "max_epochs" in settings else IterLoop
        return kind(self, self._train_dataloader, **settings)

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; what it replaces stays until it is complete.

        Raises:
            ValueError: weights are lost.
            OSError: it cannot be written; older ones stay.
        """
        if not is_main_process():
            return
        if not all(bool(x.isfinite().all()) for x in self._detector.state_dict().values()):
            raise ValueError(
                "loss: expected finite weights, got others; lower optim_wrapper.optimizer.lr"
            )
        layout = self.train_loop.layout
        meta = kwargs.pop("meta", None) or {}
        meta["layout"] = [layout.batch, layout.accumulation, layout.world]
        path = Path(out_dir) / filename
        try:
            with replacing(path) as temporary:
                super().save_checkpoint(out_dir, temporary.name, *args, meta=meta, **kwargs)
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Take weights that fit, or say what does not.

        Raises:
            CheckpointError: the file cannot be read, or is of another detector.
        """
        if self._resume:
            return super().load_checkpoint(filename, *args, **kwargs)
        content = read(Path(filename))
        skip = self.cfg.get("load_skip") or ()
        try:
            _, state_dict = fitted(self._detector, content, filename, skip)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; load_skip=('...',) names the beginnings of those that start anew"
            ) from error
        content["state_dict"] = state_dict
        self.call_hook("after_load_checkpoint", checkpoint=content)
        self._detector.load_state_dict(content["state_dict"], strict=False)
        self._has_loaded = True
        return content


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What a config's dict says beside the class."""
    return {key: x for key, x in config.items() if key not in ("type", "_scope_")}


def train(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    device: str | None = None,
    launcher: str | None = None,
    pictures: int = 0,
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Train what a config describes, to the end or to an interruption.

    Args:
        path: a config file, which is run.
        output: the run's folder: a new one, or that of this run where ``resume`` says so.
        overrides: see `load_config`.
        resume: whether to go on from the newest checkpoint.
        device: ``cpu`` or ``cuda``; None for CUDA where there is one.
        launcher: what started the processes, ``none``, ``pytorch``, ``slurm`` or ``mpi``; None for
            ``pytorch`` where torchrun's variables are set.
        pictures: how many of the best and of the worst images of each validation are drawn, to
            ``best.png`` and ``worst.png`` in ``output``.
        hooks: further ones of mmengine's kind.

    Returns:
        The last validation's measures, on every process.

    Raises:
        ValueError: the config, its data or its weights do not fit together, or are not there; the
            folder holds another run, or none to go on with.
        OSError: the folder cannot be written; what was complete there stays.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    config = load_config(path, overrides)
    with _processes(config, device, launcher):
        _agree(lambda: checks.check_training(config))
        if not resume:
            _find_start(config)
        _agree(lambda: _check_folder(output, config, resume))
        config.work_dir = str(output)
        config.resume = False
        if resume:
            found = newest(output)
            if found is None:
                _say(f"{output}: no checkpoint yet, the run begins anew")
                _find_start(config)
            else:
                _check_layout(found, config)
                config.load_from, config.resume = str(found), True
        with _registered():
            runner = DetectionRunner.from_cfg(config)
            # Whatever does not fit was said by then: a new folder is left without a run.
            runner.begin = lambda: _begin(output, config, resume)
            extremes = Extremes(output, pictures)
            for hook in (*hooks, *([extremes] if pictures else [])):
                runner.register_hook(hook)
            with interruption() as runner.interrupted:
                runner.train()
        _say_pictures(extremes, "val")
        return dict(runner.train_loop.measures)


def measure(
    path: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    launcher: str | None = None,
    pictures: int = 0,
) -> dict[str, float]:
    """Measure weights on a config's test data.

    Args:
        path: a config file, which is run.
        output: the folder of the run that trained; logs go to its ``test``.
        overrides: see `load_config`.
        checkpoint: weights, see `located`; None for the best ones in ``output``, or else the
            newest.
        device: as for `train`.
        launcher: as for `train`.
        pictures: how many of the best and of the worst images are drawn, to ``best.png`` and
            ``worst.png`` in ``test``.

    Returns:
        The measures.

    Raises:
        ValueError: the config, its data or its weights do not fit together, or are not there.
        OSError: the folder cannot be written.
    """
    config = load_config(path, overrides)
    with _processes(config, device, launcher):
        _agree(lambda: checks.check_test(config))
        best = max(output.glob("best_*.pth"), key=lambda x: x.stat().st_mtime_ns, default=None)
        weights = checkpoint or best or newest(output)
        if weights is None:
            raise ValueError(f"--checkpoint: expected weights, {output} has none")
        _say(f"weights of {weights}")
        config.work_dir = str(output / "test")
        config.load_from = _weights(str(weights), "--checkpoint")
        config.resume = False
        without_pretrained(config)
        with _registered():
            runner = DetectionRunner.from_cfg(config)
        extremes = Extremes(output / "test", pictures)
        if pictures:
            runner.register_hook(extremes)
        with _registered():
            measures = dict(runner.test())
        _say_pictures(extremes, "test")
        return measures


def _check_folder(output: Path, config: Config, resume: bool) -> None:
    """See that the run can begin there, or go on."""
    if (output / Path(config.filename).name).resolve() == Path(config.filename).resolve():
        raise ValueError(
            f"--output: expected another folder than the config's, {output}: mmengine writes a "
            f"file of that name there"
        )
    path = output / _CONFIG
    if path.exists() and not resume:
        raise ValueError(
            f"{output}: holds a run already; --resume goes on with it, --output names another "
            f"folder"
        )
    if resume and not path.exists():
        raise ValueError(f"{output}: expected a run to go on with, found none")
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "writable") as temporary:
        temporary.touch()
    (output / "writable").unlink()
    changed = differences(path, config) if resume else {}
    if changed:
        name, (was, now) = next(iter(changed.items()))
        raise ValueError(f"{output}: its run has another config: {name} was {was!r}, is {now!r}")


def _begin(output: Path, config: Config, resume: bool) -> None:
    if not is_main_process():
        return
    if resume:
        clear(output)
    else:
        save_config(config, output / _CONFIG)


def _check_layout(checkpoint: Path, config: Config) -> None:
    """Iterations are counted in batches of a process, so these must stay as they were."""
    names = ("images a batch", "batches a step and process", "processes")
    before = read(checkpoint, outline=True)["meta"].get("layout")
    accumulation = config.optim_wrapper.get("accumulative_counts", 1)
    now = [config.train_dataloader.batch_size, accumulation, get_world_size()]
    if before != now:
        said = ", ".join(f"{number} {name}" for number, name in zip(now, names, strict=True))
        raise ValueError(f"{checkpoint}: expected {said}, as here, its run had {before}")


@contextmanager
def _registered() -> Iterator[None]:
    """Say of what a config names, and nobody has, or has with other arguments, what is near it."""
    try:
        yield
    except (KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if frames[-1].name != "build_from_cfg":  # mmengine's: the call itself
            raise
        text = str(error.args[0]).partition(" Please check")[0]
        match = re.match(r"(\S+) is not in the \S+::(.+) registry", text)
        known = {name for x in _registries(match[2]) for name in x.module_dict} if match else ()
        raise ValueError(f"{text}{did_you_mean(match[1], known) if match else ''}") from error


def _registries(name: str) -> Iterator[Registry]:
    """The registry of this kind of mmdet's, and mmengine's above it."""
    for registry in vars(mmdet.registry).values():
        if isinstance(registry, Registry) and registry.name == name:
            yield registry
            if registry.parent is not None:
                yield registry.parent


@contextmanager
def _processes(config: Config, device: str | None, launcher: str | None) -> Iterator[None]:
    """Everything of mmengine's that is one for all runs of a process, as this run needs it."""
    cuda = torch.cuda.is_available()
    if device not in (None, "cpu", *(["cuda"] if cuda else [])):
        raise ValueError(f"device: expected cpu{' or cuda' * cuda}, got {device!r}")
    cpu = device == "cpu" or not cuda
    config.randomness = {"seed": 0, **config.get("randomness", {})}
    if config.randomness.get("deterministic"):  # cuBLAS asks for it, before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config.setdefault("default_scope", "mmdet")
    config.launcher = _launcher(launcher)
    before = mmengine.device.utils.DEVICE, torch.are_deterministic_algorithms_enabled()
    try:
        if cpu:
            mmengine.device.utils.DEVICE = "cpu"
        if config.launcher != "none":
            _join(config, cpu)
        with redirect_stdout(sys.stderr):  # mmengine's logs and COCO's tables
            yield
    finally:
        mmengine.device.utils.DEVICE = before[0]
        torch.use_deterministic_algorithms(before[1])
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for manager in (MMLogger, MessageHub, Visualizer, DefaultScope):  # names may come again
            for kind in (manager, *manager.__subclasses__()):
                kind._instance_dict.clear()


def _launcher(name: str | None) -> str:
    if name is None:
        started = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()
        return "pytorch" if started else "none"
    for variable, other in zip(_VARIABLES["pytorch"], _VARIABLES[name], strict=False):
        if other not in os.environ:
            raise ValueError(f"--launcher {name}: expected {other} in the environment, found none")
        os.environ[variable] = os.environ[other]
    return name


def _join(config: Config, cpu: bool) -> None:
    """Join the group of processes before the Runner does, which would ask for a GPU."""
    if not cpu:
        init_dist(config.launcher, **config.get("env_cfg", {}).get("dist_cfg", {}))
        return
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        raise ValueError("MASTER_ADDR: expected the first process' machine, found none")
    torch.distributed.init_process_group("gloo")
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
        **(config.get("model_wrapper_cfg") or {}),
        "device_ids": None,
    }


def _find_start(config: Config) -> None:
    """Bring here what the config wants to start from."""
    if config.get("load_from"):
        config.load_from = _weights(config.load_from, "load_from")


def _weights(source: str, argument: str) -> str:
    """A file of weights; one process brings it here for all."""

    def bring() -> None:
        located(source, argument)

    _agree(bring)
    return str(located(source, argument))


def _agree(check: Callable[[], Iterable[str] | None]) -> None:
    """What the main process finds wrong, all raise; what it finds worth a line, it says."""
    fault: list[str | None] = [None]
    if is_main_process():
        try:
            for line in check() or ():
                _say(line)
        except OSError as error:
            fault = [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
        except ValueError as error:
            fault = [str(error)]
    broadcast_object_list(fault)
    if fault[0] is not None:
        raise ValueError(fault[0])


def _say_pictures(extremes: Extremes, split: str) -> None:
    for file in extremes.written:
        _say(f"wrote {file}")
    if extremes.blind:
        _say(
            f"no pictures: {split}_dataloader.dataset.pipeline has no LoadAnnotations, or packs no "
            f"img_path"
        )


def _say(text: str) -> None:
    if is_main_process():
        print(text, file=sys.stderr)
