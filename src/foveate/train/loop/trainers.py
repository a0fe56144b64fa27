"""Objectives in training loops: a plain one, Hugging Face's `Trainer`, and Lightning.

    for loss in fit_objective(model, objective, batches, optimizer): ...

    trainer = objective_trainer(objective)(model=model, args=arguments, train_dataset=data)
    trainer.train()

    module = lightning_module(model, objective, torch.optim.AdamW)
    lightning.Trainer(max_epochs=1).fit(module, batches)

A batch is a mapping of the model's inputs by name, with the targets under "labels".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from foveate.core import validate
from foveate.core.errors import OptionError
from foveate.train.base.objective import Batch, Loss, Objective, logits_of

Optimizers = Callable[[Iterable[nn.Parameter]], Optimizer]


def fit_objective(
    model: nn.Module, objective: Objective, batches: Iterable[Batch], optimizer: Optimizer, *, clip: float | None = None
) -> Iterator[Loss]:
    """Train a model for one step on each batch; yield the loss of each, from before its step.

    Args:
        model: is put into training mode, and stays in it.
        clip: the largest norm of the gradient; None for any.
    """
    if clip is not None:
        validate.at_least("clip", clip, 0)
    model.train()
    for batch in batches:
        loss = objective(model, batch)
        optimizer.zero_grad()
        loss.total.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield loss


def objective_trainer(objective: Objective, base: type | None = None) -> type:
    """Return a subclass of Hugging Face's `Trainer` that trains with an objective.

    Training logs the parts of the loss beside it, as `loss_<part>`. Evaluation and prediction use the plain loss. The
    labels are what `label_names` names; without it, "labels".

    Args:
        base: a subclass of `Trainer` to build on; None for `Trainer`.
    """
    from transformers import Trainer

    return type(f"{type(objective).__name__}Trainer", (_InTrainer, base or Trainer), {"objective": objective})


def lightning_module(model: nn.Module, objective: Objective, optimizer: Optimizers) -> Any:
    """Return a `LightningModule` that trains a model with an objective, and validates and tests with the plain loss.

    It logs `train_loss`, `train_loss_<part>`, `val_loss` and `test_loss`.

    Args:
        optimizer: makes an optimizer of the trained parameters, such as `torch.optim.AdamW` or a `functools.partial`.

    Raises:
        OptionError: Lightning is not installed.
    """
    module = type(f"{type(objective).__name__}Module", (_InLightning, _lightning_module_class()), {})()
    module.model, module.objective, module.optimizer_of = model, objective, optimizer
    return module


class _InTrainer:
    """The parts of a `Trainer` that an objective changes."""

    objective: Objective
    label_names: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        given: Any = self
        if given.label_smoother is not None or given.compute_loss_func is not None:
            name = "compute_loss_func" if given.label_smoother is None else "label_smoothing_factor"
            raise OptionError(f"{name} must not be given: {type(self.objective).__name__} makes the loss")
        self.label_names = self.label_names or ["labels"]
        if len(self.label_names) > 1:
            raise OptionError(f"label_names={self.label_names!r} must be one name, that of the objective's targets")
        # the loss is a mean over a batch, so that the trainer has to divide it by the steps that it accumulates
        self.model_accepts_loss_kwargs = False
        self._noted: dict[str, Tensor] = {}
        self._steps = 0

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: the objective's in training, else the plain one."""
        batch = dict(inputs)
        if (name := self.label_names[0]) in batch:
            batch["labels"] = batch.pop(name)
        loss = self.objective(model, batch) if model.training else self.objective.plain(model, batch)
        if model.training:
            self._note(loss.parts)
        return (loss.total, _as_dict(loss.outputs)) if return_outputs else loss.total

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the means of the parts since the last time, beside the loss."""
        if "loss" in logs and self._steps:
            logs |= {f"loss_{name}": (part / self._steps).item() for name, part in self._noted.items()}
            self._noted, self._steps = {}, 0
        super().log(logs, *args, **options)  # type: ignore[misc]  # of `Trainer`, the other base

    def _note(self, parts: Mapping[str, Float[Tensor, ""]]) -> None:
        self._steps += 1
        for name, part in parts.items():
            self._noted[name] = self._noted.get(name, 0.0) + part.float()


def _as_dict(outputs: Any) -> Mapping[str, Any]:
    """Return outputs in the form that `Trainer` reads: a tensor alone would lose its first row."""
    return outputs if isinstance(outputs, Mapping) else {"logits": logits_of(outputs)}


class _InLightning:
    """The steps of a `LightningModule` with an objective."""

    model: nn.Module
    objective: Objective
    optimizer_of: Optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.objective(self.model, batch)
        self._log("train_loss", loss)
        return loss.total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("val_loss", self.objective.plain(self.model, batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log("test_loss", self.objective.plain(self.model, batch))

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer_of([p for p in self.model.parameters() if p.requires_grad])

    def _log(self, name: str, loss: Loss) -> None:
        values = {name: loss.total.detach()} | {f"{name}_{part}": x for part, x in loss.parts.items()}
        module: Any = self
        module.log_dict(values, prog_bar=True)


def _lightning_module_class() -> type:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).LightningModule
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
                raise  # Lightning is there, and something that it needs is not
    raise OptionError("lightning_module needs the package lightning: pip install lightning")
