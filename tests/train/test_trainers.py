"""Objectives in a plain loop, in Hugging Face's `Trainer` and in Lightning: an example of each, and what they log."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from foveate.core.errors import FoveateError, OptionError
from foveate.models import BiLSTMAttentionClassifier
from foveate.train import AttentionAT, CutMix, fit_objective, lightning_module, objective_trainer
from tests.contracts.objectives import bert


def texts(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Return texts of seven words that contain 1 or 2, which is their label less one."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (count, 7), generator=random)
    labels = torch.randint(2, (count,), generator=random)
    ids[torch.arange(count), torch.randint(7, (count,), generator=random)] = labels + 1
    return {"ids": ids, "labels": labels}


def images(count: int) -> dict[str, Tensor]:
    """Return images that are bright in the upper or in the lower half."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=random)
    x = 0.3 * torch.randn(count, 1, 8, 8, generator=random)
    x[labels == 0, :, :4] += 1.0
    x[labels == 1, :, 4:] += 1.0
    return {"input": x, "labels": labels}


def rows(batch: dict[str, Tensor], **renamed: str) -> list[dict[str, Tensor]]:
    """Return the examples of a batch, with some inputs renamed."""
    return [{renamed.get(name, name): x[i] for name, x in batch.items()} for i in range(len(batch["labels"]))]


def batches(data: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(data["labels"])
    return [{name: x[first : first + size] for name, x in data.items()} for first in range(0, count, size)]


def classifier() -> BiLSTMAttentionClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BiLSTMAttentionClassifier(20, dim=8, hidden=6)


# -- a plain loop ------------------------------------------------------------------------------------------------------


def test_a_plain_loop() -> None:
    net, objective = classifier(), AttentionAT(0.5)
    optimiser = torch.optim.Adam(net.parameters(), 2e-2)
    found = list(fit_objective(net, objective, batches(texts(32 * 40), 32), optimiser, clip=1.0))
    assert len(found) == 40 and net.training
    clean = [loss.parts["clean"].item() for loss in found]
    assert sum(clean[-5:]) < 0.3 * sum(clean[:5])
    held = texts(100, seed=1)
    net.eval()
    with torch.no_grad():
        assert objective.plain(net, held).total < 0.3


def test_a_step_is_the_optimiser_s_on_the_clipped_gradient() -> None:
    net, other = classifier(), classifier()
    (batch,) = batches(texts(8), 8)
    objective = AttentionAT(0.5)
    for x in net.parameters():
        x.grad = torch.full_like(x, 9.0)  # of an earlier step
    (loss,) = fit_objective(net, objective, [batch], torch.optim.SGD(net.parameters(), 1.0), clip=0.1)
    objective(other, batch).total.backward()
    nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)
    assert loss.total.isfinite()
    with pytest.raises(OptionError, match="clip=-1 must be at least 0"):
        next(fit_objective(net, objective, [batch], torch.optim.SGD(net.parameters(), 1.0), clip=-1))


# -- Hugging Face's Trainer --------------------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = dict(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=16, per_device_eval_batch_size=16, num_train_epochs=1, learning_rate=1e-2, seed=0,
    )  # fmt: skip
    return TrainingArguments(**{**given, **changes})


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [each for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("kind", ["classifier", "transformers"])
def test_hugging_face_s_trainer(tmp_path: Path, kind: str) -> None:
    net = classifier() if kind == "classifier" else bert()
    names = {} if kind == "classifier" else {"ids": "input_ids"}
    train, held = rows(texts(16 * 12), **names), rows(texts(40, seed=1), **names)
    trainer = objective_trainer(AttentionAT(0.5))(
        model=net, args=arguments(tmp_path), train_dataset=train, eval_dataset=held
    )
    assert isinstance(trainer, Trainer) and type(trainer).__name__ == "AttentionATTrainer"
    trainer.train()
    assert len(logged(trainer)) == 12
    for each in logged(trainer):
        assert each["loss_clean"] + each["loss_adversarial"] == pytest.approx(each["loss"], abs=2e-3)
        assert each["loss_adversarial"] > each["loss_clean"]
    if kind == "classifier":
        assert logged(trainer)[-1]["loss_clean"] < 0.97 * logged(trainer)[0]["loss_clean"], "it learns"
    inputs = {names.get("ids", "ids"): texts(40, seed=1)["ids"]}
    with torch.no_grad():
        logits = net.eval()(**inputs).logits
    plain = F.cross_entropy(logits, texts(40, seed=1)["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), abs=1e-4), "without the perturbation"
    predicted = trainer.predict(held)
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits, rtol=1e-4, atol=1e-5)
    assert predicted.label_ids.tolist() == texts(40, seed=1)["labels"].tolist()


def test_the_trainer_mixes_images_and_takes_labels_of_another_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    args = arguments(tmp_path, label_names=["target"], logging_steps=4)
    kind = objective_trainer(CutMix(generator=torch.Generator().manual_seed(0)))
    data = rows(images(16 * 8), labels="target")
    trainer = kind(model=net, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert len(logged(trainer)) == 2
    for each in logged(trainer):
        assert each["loss_own"] + each["loss_other"] == pytest.approx(each["loss"], abs=2e-3), "means of four steps"
        assert each["loss_other"] > 0
    assert trainer.evaluate()["eval_loss"] < 0.7
    assert trainer.predict(data).predictions.shape == (128, 2), "no row of the logits is lost"


@pytest.mark.parametrize("kind", ["classifier", "transformers"])
def test_accumulated_steps_are_one_step(tmp_path: Path, kind: str) -> None:
    found = []
    for size, steps in ((8, 1), (4, 2)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = classifier() if kind == "classifier" else bert()
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant",
        )  # fmt: skip
        data = rows(texts(8), **({} if kind == "classifier" else {"ids": "input_ids"}))
        trainer = objective_trainer(AttentionAT(0.5))(model=net, args=args, train_dataset=data)
        trainer.train()
        found.append([x.detach() for x in net.parameters()])
        assert trainer.state.global_step == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_trainer_can_have_another_base(tmp_path: Path) -> None:
    class Mine(Trainer):
        pass

    kind = objective_trainer(AttentionAT(), Mine)
    assert issubclass(kind, Mine)
    with pytest.raises(OptionError, match="label_smoothing_factor must not be given: AttentionAT makes the loss"):
        kind(model=bert(), args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(OptionError, match="compute_loss_func must not be given"):
        kind(model=classifier(), args=arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    with pytest.raises(OptionError, match=r"label_names=\['start', 'end'\] must be one name"):
        kind(model=classifier(), args=arguments(tmp_path, label_names=["start", "end"]))


# -- Lightning ---------------------------------------------------------------------------------------------------------

LIGHTNING = next((name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)), None)


@pytest.mark.skipif(LIGHTNING is None, reason="Lightning is optional: pip install lightning")
def test_lightning(tmp_path: Path) -> None:
    lightning = importlib.import_module("lightning.pytorch" if LIGHTNING == "lightning" else "pytorch_lightning")
    net, objective = classifier(), AttentionAT(0.5)
    module = lightning_module(net, objective, partial(torch.optim.Adam, lr=2e-2))
    assert isinstance(module, lightning.LightningModule)

    def loader(data: dict[str, Tensor]) -> Any:
        return torch.utils.data.DataLoader(rows(data), batch_size=32)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(module, loader(texts(32 * 40)), loader(texts(64, seed=1)))
    metrics = {name: float(x) for name, x in trainer.callback_metrics.items()}
    assert metrics["train_loss_clean"] + metrics["train_loss_adversarial"] == pytest.approx(metrics["train_loss"], 1e-4)
    with torch.no_grad():
        plain = objective.plain(net.eval(), texts(64, seed=1)).total
    assert metrics["val_loss"] == pytest.approx(plain.item(), abs=1e-4) and plain < 0.3
    (tested,) = trainer.test(module, loader(texts(64, seed=1)), verbose=False)
    assert tested["test_loss"] == pytest.approx(plain.item(), abs=1e-4)


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("foveate.train.loop.trainers.import_module", missing)
    with pytest.raises(FoveateError) as caught:
        lightning_module(classifier(), AttentionAT(), torch.optim.Adam)
    assert str(caught.value) == "lightning_module needs the package lightning: pip install lightning"


def test_a_broken_lightning_shows_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

    monkeypatch.setattr("foveate.train.loop.trainers.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
        lightning_module(classifier(), AttentionAT(), torch.optim.Adam)
