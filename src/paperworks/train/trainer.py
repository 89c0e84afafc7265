"""The training loop, on Lightning Fabric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, Metric, MetricCollection

from paperworks.errors import UserError, check_counts
from paperworks.nn import keeping_modes

from . import checkpoint
from .batches import Batches, loader
from .intervention import Criterion, Intervention, State, compose_loss
from .progress import ProgressBar

Data = Dataset[Any] | DataLoader[Any]


class NonFiniteLoss(UserError, ArithmeticError):
    """The loss became NaN or infinite."""


class History(list[dict[str, float]]):
    """One mapping of figures an epoch: ``train/loss``, ``eval/loss``, ``eval/<metric>`` and what interventions add."""

    @property
    def last(self) -> dict[str, float]:
        """The last epoch's figures."""
        return self[-1] if self else {}

    def column(self, name: str) -> list[float]:
        """One figure over the epochs in which it was recorded."""
        return [row[name] for row in self if name in row]


class Trainer:
    """Trains a model, with interventions, on one device or many.

    Each epoch draws the batches in an order that depends on ``seed`` and the epoch alone. A run that is killed and
    started again with the same arguments and ``checkpoint_dir`` ends with the numbers of an undisturbed one.

    Args:
        epochs: Passes over the training data.
        interventions: Changes to training, in the order in which they act.
        batch_size: Examples a step over all processes together; used when ``fit`` gets a dataset. A DataLoader
            keeps its own batches.
        seed: Seeds batch order, dropout and transforms. The caller's global random states come back afterwards.
        accelerator, devices, strategy, precision: As in ``lightning_fabric.Fabric``, e.g. ``devices=2,
            strategy="ddp"``, ``precision="bf16-mixed"``. The default takes a GPU where there is one.
        accumulate: Batches whose gradients are averaged before a step of the optimizer.
        clip_norm: Largest L2 norm of the whole gradient; ``None`` leaves it alone.
        schedule: Whether the scheduler steps after every optimizer ``"step"`` or every ``"epoch"``.
        drop_last: Leave out an incomplete last batch.
        num_workers: Loader processes for datasets that are not tensors.
        metrics: torchmetrics by name, measured on the evaluation data.
        eval_every: Evaluate every that many epochs, and after the last.
        log_dir: Folder for ``CSVLogger`` and ``TensorBoardLogger`` files; ``loggers`` adds others of Fabric's.
        checkpoint_dir: Folder of the checkpoint; an existing one is resumed.
        checkpoint_every: Also write one every that many steps, not only after each epoch.
        progress: Show a progress bar, or a callable ``(fraction done, text)`` that gets it instead.

    Example:
        >>> trainer = Trainer(epochs=3, interventions=[LogitClip(tau=1.0)])
        >>> trainer.fit(model, train_data, loss=nn.CrossEntropyLoss(), optimizer=partial(SGD, lr=0.1))
    """

    def __init__(
        self,
        epochs: int,
        *,
        interventions: Iterable[Intervention] = (),
        batch_size: int = 128,
        seed: int = 0,
        accelerator: str = "auto",
        devices: int | str | list[int] = 1,
        strategy: str = "auto",
        precision: Any = "32-true",
        accumulate: int = 1,
        clip_norm: float | None = None,
        schedule: Literal["step", "epoch"] = "step",
        drop_last: bool = False,
        num_workers: int = 0,
        metrics: Mapping[str, Metric] | None = None,
        eval_every: int = 1,
        log_dir: str | Path | None = None,
        loggers: Sequence[Any] = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        progress: bool | Callable[[float, str], None] = False,
    ) -> None:
        check_counts(epochs=epochs, accumulate=accumulate, eval_every=eval_every)
        if clip_norm is not None and not clip_norm > 0:
            raise UserError(f"clip_norm must be positive, got {clip_norm}")
        if checkpoint_every is not None and checkpoint_every < 1:
            raise UserError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        if schedule not in ("step", "epoch"):
            raise UserError(f"schedule must be 'step' or 'epoch', got {schedule!r}")
        self.interventions = list(interventions)
        for intervention in self.interventions:
            if not isinstance(intervention, Intervention):
                raise UserError(f"interventions must be Intervention objects, got {intervention!r}")
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.accumulate, self.clip_norm, self.schedule = accumulate, clip_norm, schedule
        self.drop_last, self.num_workers, self.eval_every = drop_last, num_workers, eval_every
        self.metrics = MetricCollection(dict(metrics or {}), prefix="eval/")
        self.checkpoint_path = Path(checkpoint_dir) / "checkpoint.pt" if checkpoint_dir else None
        self.checkpoint_every = checkpoint_every
        self._progress = progress
        if log_dir:
            loggers = [
                CSVLogger(log_dir, name="csv", flush_logs_every_n_steps=1),
                TensorBoardLogger(log_dir, name="tensorboard"),
                *loggers,
            ]
        try:
            self.fabric = Fabric(
                accelerator=accelerator,
                devices=devices,
                strategy=strategy,
                precision=precision,
                loggers=list(loggers),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"cannot set up accelerator={accelerator!r}, devices={devices!r}: {error}") from error

    def fit(
        self,
        model: nn.Module,
        train_data: Data,
        eval_data: Data | None = None,
        *,
        loss: Criterion,
        optimizer: Optimizer | Callable[[Iterator[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> History:
        """Train ``model`` in place.

        Args:
            model: Called with the batch's first item.
            train_data: A dataset of ``(inputs, targets, …)``, or a DataLoader of such batches.
            eval_data: What ``metrics`` and the plain loss are measured on.
            loss: ``(outputs, targets) -> scalar``.
            optimizer: An optimizer, or how to make one from parameters: ``partial(SGD, lr=0.1)``.
            scheduler: How to make a scheduler from the optimizer; ``steps(train_data)`` is the run's length.

        Returns:
            The figures of each epoch.

        Raises:
            NonFiniteLoss: At the first step whose loss is NaN or infinite.
            UserError: If the checkpoint does not belong to this run.
        """
        self.fabric.launch()
        total_steps = self.steps(train_data)
        if not isinstance(optimizer, Optimizer):
            optimizer = optimizer(model.parameters())
        state = State(
            fabric=self.fabric,
            module=model,
            model=model,
            optimizer=optimizer,
            criterion=loss,
            epochs=self.epochs,
            total_steps=total_steps,
        )
        # Eyes on the trainer come last, so that they see what the other interventions left.
        bar = [ProgressBar(self._progress)] if self._progress and self.fabric.is_global_zero else []
        with (
            checkpoint.seeded(self.seed + self.fabric.global_rank),
            self._in_place(state, [*self.interventions, *bar]),
        ):
            run = _Run(self, state, train_data, scheduler, [*self.interventions, *bar])
            run.resume()
            return run.train(eval_data)

    @contextmanager
    def _in_place(self, state: State, interventions: list[Intervention]) -> Iterator[None]:
        done: list[Intervention] = []
        try:
            for intervention in interventions:
                intervention.setup(state)
                done.append(intervention)
            state.model, state.optimizer = self.fabric.setup(state.module, state.optimizer)
            yield
        finally:
            for intervention in reversed(done):
                intervention.teardown(state)
            for logger in self.fabric.loggers:
                logger.finalize("success")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Data, loss: Criterion | None = None) -> dict[str, float]:
        """Measure ``metrics``, and ``loss`` where one is given, in evaluation mode.

        Processes may have different numbers of batches, hence the bare ``model``: DDP's would wait for the others.
        """
        metrics, mean = self.metrics.clone().to(self.fabric.device), MeanMetric().to(self.fabric.device)
        precision = self.fabric.strategy.precision
        with keeping_modes(model), checkpoint.seeded(self.seed):  # looking must not change what training draws
            self.fabric.to_device(model).eval()
            for inputs, targets, *_ in self.loader(data, shuffle=False):
                with precision.forward_context():
                    outputs = model(precision.convert_input(inputs))
                outputs = precision.convert_output(outputs)
                metrics.update(outputs, targets)
                if loss is not None:
                    mean.update(loss(outputs, targets), weight=len(targets))
        figures = {name: float(value) for name, value in metrics.compute().items()}
        return figures | ({"eval/loss": float(mean.compute())} if loss is not None else {})

    def steps(self, train_data: Data) -> int:
        """Optimizer steps of the whole run on ``train_data``, e.g. for ``OneCycleLR(total_steps=…)``."""
        return self.epochs * math.ceil(len(self.loader(train_data)) / self.accumulate)

    def loader(self, data: Data, *, shuffle: bool = True) -> DataLoader[Any]:
        """Batches of ``data`` on the device; each process gets its share."""
        if isinstance(data, DataLoader):
            if not len(data):
                raise UserError("the DataLoader holds no batch")
            return self.fabric.setup_dataloaders(data)  # type: ignore[return-value]
        batches = Batches(
            len(data),  # type: ignore[arg-type]
            self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=self.drop_last and shuffle,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )
        plain = loader(data, batches, self.num_workers)
        return self.fabric.setup_dataloaders(plain, use_distributed_sampler=False)  # type: ignore[return-value]


class _Run:
    """One call of ``fit``: the state that a checkpoint holds, and the loops over epochs and batches."""

    LOSS_EVERY = 50  # steps between looks at the losses: each look waits for the device

    def __init__(
        self,
        trainer: Trainer,
        state: State,
        train_data: Data,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        interventions: list[Intervention],
    ) -> None:
        self.trainer, self.state, self.interventions = trainer, state, interventions
        self.fabric = trainer.fabric
        self.batches = trainer.loader(train_data)
        self.optimizer: Optimizer = getattr(state.optimizer, "optimizer", state.optimizer)  # without Fabric's wrapper
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.loss = compose_loss(interventions)
        self.looks_at_gradients = trainer.clip_norm is not None or any(
            type(i).on_gradients is not Intervention.on_gradients for i in interventions
        )
        self.history = History()
        self.batch = 0  # batches of this epoch already used
        self.losses: list[Tensor] = []  # of the last steps, still on the device
        self.loss_sum, self.loss_count = 0.0, 0
        self.epoch_random: dict[str, Any] | None = None  # random state in which the epoch began

    def train(self, eval_data: Data | None) -> History:
        state = self.state
        while state.epoch < self.trainer.epochs:
            self._epoch()
            self._call("on_epoch_end")
            figures = {"train/loss": self.loss_sum / self.loss_count, **_floats(state.logs)}
            last = state.epoch + 1 == self.trainer.epochs
            if eval_data is not None and (last or (state.epoch + 1) % self.trainer.eval_every == 0):
                figures |= self.trainer.evaluate(state.module, eval_data, state.criterion)
            self.history.append(figures)
            self.fabric.log_dict({**figures, "epoch": state.epoch}, step=state.step)
            if self.scheduler and self.trainer.schedule == "epoch":
                self.scheduler.step()
            self.batch, self.loss_sum, self.loss_count, self.epoch_random, state.logs = 0, 0.0, 0, None, {}
            state.epoch += 1
            self._save()
        return self.history

    def _epoch(self) -> None:
        state, accumulate, every = self.state, self.trainer.accumulate, self.trainer.checkpoint_every
        state.model.train()
        if self.batch == 0:
            self._call("on_epoch_start")
        rest, total = self._start(), len(self.batches)
        for index, (state.inputs, state.targets, *extra) in enumerate(rest, self.batch):
            state.extra = tuple(extra)
            in_group = min(accumulate, total - index // accumulate * accumulate)
            boundary = (index + 1) % accumulate == 0 or index + 1 == total
            self._call("on_batch")
            with self.fabric.no_backward_sync(state.model, enabled=not boundary):  # type: ignore[arg-type]
                state.outputs = state.model(state.inputs)
                loss = self.loss(state)
                self.fabric.backward(loss / in_group if in_group > 1 else loss)
            self.losses.append(loss.detach())
            self.batch = index + 1
            if boundary:
                self._step()
                if every and state.step % every == 0 and self.batch < total:
                    self._save()
        self._look_at_losses()

    def _step(self) -> None:
        state = self.state
        if self.looks_at_gradients:  # "16-mixed" has scaled them so far
            self.fabric.strategy.precision.unscale_gradients(self.optimizer)
        self._call("on_gradients")
        if self.trainer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.fabric.strategy.precision.main_params(self.optimizer), self.trainer.clip_norm)
        state.optimizer.step()
        if self.scheduler and self.trainer.schedule == "step":
            self.scheduler.step()
        state.step += 1
        self._call("on_step_end")
        state.optimizer.zero_grad()
        if state.step % self.LOSS_EVERY == 0:
            self._look_at_losses()

    def _call(self, moment: str) -> None:
        for intervention in self.interventions:
            getattr(intervention, moment)(self.state)

    def _look_at_losses(self) -> None:
        if not self.losses:
            return
        stacked = torch.stack(self.losses).float()
        if self.fabric.world_size > 1:  # all processes see the same losses, so that all of them stop
            stacked = self.fabric.all_reduce(stacked, reduce_op="mean")  # type: ignore[assignment]
        values, self.losses = stacked.tolist(), []
        for batch, value in enumerate(values, self.batch - len(values)):
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the loss is {value} at epoch {self.state.epoch}, batch {batch} (both from 0); "
                    "lower the learning rate, set clip_norm, or look for NaN in the inputs"
                )
            self.loss_sum += value  # one by one, so that the sum does not depend on when it was looked at
        self.loss_count += len(values)
        if self.fabric.loggers:
            self.fabric.log_dict({"train/step_loss": values[-1]}, step=self.state.step)

    # Place in the epoch. The loader is made again in the random state in which the epoch began and read up to
    # the place, so that any loader with its own order and transforms continues with the right batch.

    def _start(self) -> Iterator[Any]:
        sampler = self.batches.sampler if self.batches.batch_size is None else self.batches.batch_sampler
        if isinstance(sampler, Batches):
            sampler.epoch = self.state.epoch
        self.batches._num_iter_calls = self.state.epoch  # what Fabric gives to set_epoch of samplers
        if self.epoch_random is None:
            self.epoch_random = self._random_state()
            return iter(self.batches)
        here = self._random_state()
        self._set_random_state(self.epoch_random)
        rest = iter(self.batches)
        for _ in range(self.batch):
            next(rest)
        self._set_random_state(here)
        return rest

    def _random_state(self) -> dict[str, Any]:
        return checkpoint.random_state() | {"loader": [g.get_state() for g in _generators(self.batches)]}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        checkpoint.set_random_state(state)
        for generator, content in zip(_generators(self.batches), state["loader"], strict=True):
            generator.set_state(content)

    @property
    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds by its ``state_dict``."""
        parts = {
            "model": self.state.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "precision": self.fabric.strategy.precision,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes from it must share."""
        return {
            "interventions": [type(i).__name__ for i in self.trainer.interventions],
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__ if self.scheduler else "none",
            "seed": self.trainer.seed,
            "steps": self.state.total_steps,
            "processes": self.fabric.world_size,
        }

    def _save(self) -> None:
        path, state = self.trainer.checkpoint_path, self.state
        if path is None:
            return
        self._look_at_losses()
        mine = {
            "random": self._random_state(),
            "epoch_random": self.epoch_random,
            "interventions": [i.state_dict() for i in self.interventions],
        }
        per_process = [mine]
        if self.fabric.world_size > 1:
            per_process = [{}] * self.fabric.world_size
            torch.distributed.all_gather_object(per_process, mine)
        if self.fabric.is_global_zero:
            checkpoint.save(
                path,
                {
                    "run": self._identity,
                    "epoch": state.epoch,
                    "batch": self.batch,
                    "step": state.step,
                    "loss": [self.loss_sum, self.loss_count],
                    "logs": _floats(state.logs),
                    "history": list(self.history),
                    "parts": {name: part.state_dict() for name, part in self._parts.items()},
                    "processes": per_process,
                },
            )
        self.fabric.barrier()

    def resume(self) -> None:
        path, state = self.trainer.checkpoint_path, self.state
        if path is None or not path.exists():
            return
        saved = checkpoint.load(path)
        for name, here in self._identity.items():
            if (was := saved["run"][name]) != here:
                raise UserError(f"checkpoint {path} is of another run: {name} {was}, here {here}; delete it")
        for name, part in self._parts.items():
            try:
                part.load_state_dict(saved["parts"][name])
            except (RuntimeError, ValueError) as error:
                raise UserError(f"checkpoint {path} is of another run: {name} of other shapes; delete it") from error
        mine = saved["processes"][self.fabric.global_rank]
        for intervention, content in zip(self.interventions, mine["interventions"], strict=False):
            intervention.load_state_dict(content)
        state.epoch, state.step, self.batch = saved["epoch"], saved["step"], saved["batch"]
        (self.loss_sum, self.loss_count), state.logs = saved["loss"], saved["logs"]
        self.history.extend(saved["history"])
        self.epoch_random = mine["epoch_random"]
        self._set_random_state(mine["random"])


def _generators(batches: DataLoader[Any]) -> list[torch.Generator]:
    """The generators of a loader and its samplers, which draw its order."""
    holders = (batches, batches.sampler, getattr(batches.batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [generator for generator in found if generator is not None]


def _floats(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items()}
