"""The training loop, its networks, and their checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.bench.comparison.run import compare
from foveate.core.errors import DivergedError, OptionError, TaskError, UnknownKey, UnsupportedModel, UnsupportedPattern
from foveate.models.base.spec import Mixer, Spec
from foveate.tasks.base.training_task import IGNORED, TrainingTask
from foveate.train.loop import checkpoint, network
from foveate.train.loop.loop import History, Schedule, Training, evaluate, fit, loss_of
from tests.support.tensors import assert_near


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, rate=2.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps=0"), (dict(batch=0), "batch=0"), (dict(rate=0), "rate=0 must be above 0"),
        (dict(clip=-1), "clip=-1 must be above 0"), (dict(decay=-1), "decay=-1 must be at least 0"),
    ],
)  # fmt: skip
def test_invalid_schedules_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Schedule(**options)


def small(key: str = "hedgehog") -> tuple[nn.Module, Spec, TrainingTask]:
    task = network.training_task("copy", vocabulary=8, length=12)
    spec = network.spec(key, task, dim=16, heads=2)
    torch.manual_seed(0)
    return spec.build(), spec, task


def test_the_loss_covers_the_labelled_positions() -> None:
    net, _, task = small()
    tokens, labels = task.sample(3, torch.Generator().manual_seed(0))
    logits = net(tokens)
    labelled = labels != IGNORED
    assert_near(loss_of(net, tokens, labels), F.cross_entropy(logits[labelled], labels[labelled]), 1e-6)


def test_training_learns_and_reports_its_progress() -> None:
    net, _, task = small("softmax")
    calls = []
    history = fit(net, task, Schedule(steps=150, rate=1e-2), evaluations=3, progress=lambda *at: calls.append(at))
    assert len(history.losses) == 150
    assert list(history.scores) == [50, 100, 150]
    assert history.losses[-1] < 0.6 * history.losses[0]
    assert history.score > 2 * 1 / 7
    assert history.score == pytest.approx(evaluate(net, task, 256))
    assert calls[0][:2] == (1, 150)
    assert calls[-1][:2] == (150, 150)
    assert "accuracy" in calls[-1][2]
    assert not net.training


def test_weight_decay_shrinks_matrices_and_spares_vectors() -> None:
    """A clip near zero leaves no gradient, so that a step does nothing but decay."""
    net, _, task = small("softmax")
    before = {name: x.detach().clone() for name, x in net.named_parameters()}
    training = Training(net, task, Schedule(steps=1, rate=0.1, decay=2.0, clip=1e-30), evaluations=1)
    training.advance()
    for name, x in net.named_parameters():
        assert_near(x.detach(), before[name] * (0.8 if x.ndim > 1 else 1.0), 1e-6, name)


def test_a_seed_repeats_its_training() -> None:
    runs = []
    for seed in (0, 0, 1):
        net, _, task = small()
        runs.append(fit(net, task, Schedule(steps=5, seed=seed), evaluations=1).losses)
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_that_is_not_finite_stops_training() -> None:
    net, _, task = small()
    nn.init.constant_(net.embed.weight, math.nan)
    with pytest.raises(DivergedError, match="must be lower for this network: the loss is nan at step 0"):
        fit(net, task, Schedule(steps=2))


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["softmax", "lightning_attention_2", "titans", "mega", "mhe_attention"])
def test_any_operator_or_layer_makes_a_decoder(key: str) -> None:
    net, spec, task = small(key)
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    tokens, _ = task.sample(2, torch.Generator().manual_seed(0))
    assert net(tokens).shape == (2, 12, 8)
    changed = tokens.clone()
    changed[:, 8:] = 7 - changed[:, 8:]
    assert_near(net(changed)[:, :8], net(tokens)[:, :8], 1e-5)


def test_a_layer_of_fixed_length_gets_that_of_its_task() -> None:
    for name, length, causal in (("copy", 64, True), ("digits", 16, False)):  # 8 by 8 pixels in patches of 2 by 2
        task = network.training_task(name)
        assert network.spec("super_attention", task).mixers[0].options == {"context_len": length, "causal": causal}


def test_a_decoder_streams_token_by_token() -> None:
    net, _, task = small("lightning_attention_2")
    tokens, _ = task.sample(2, torch.Generator().manual_seed(0))
    state, out = net.init_state(2), []
    for t in range(12):
        logits, state = net.step(tokens[:, t : t + 1], state, t)
        out.append(logits)
    assert_near(torch.cat(out, 1), net(tokens), 1e-5)


def test_bidirectional_layers_read_images() -> None:
    for key, causal in (("softmax", False), ("l2vit", False), ("lightning_attention_2", True)):
        spec = network.spec(key, network.training_task("digits"), dim=16, heads=2)
        assert spec.image["causal"] is causal
        assert spec.build().eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: network.training_task("mqat"), UnknownKey, 'unknown task "mqat"; did you mean "mqar"'),
        (lambda: network.training_task("lm", pairs=3), OptionError, "takes no pairs; valid are length"),
        (lambda: network.training_task("copy", pairs=3), OptionError, "valid are length, vocabulary"),
        (lambda: network.training_task("digits", length=8), OptionError, "takes no length; valid are no sizes"),
        (lambda: small("efficient_attention"), UnsupportedPattern, "a decoder's layers are causal"),
        (lambda: small("sink_recent"), OptionError, 'system "sink_recent" must be an operator or a layer'),
        (lambda: Spec(8, 2, (Mixer("softmax"),)), OptionError, "vocabulary=.* or image="),
        (lambda: Spec(8, 2, (), vocabulary=3).build(), OptionError, "mixers must be layers of one width"),
        (lambda: Spec.from_dict({"dim": 8}), OptionError, "no description of a network"),
    ],
)
def test_invalid_networks_are_refused(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# -- on disk -----------------------------------------------------------------------------------------------------------


def trained(
    folder: Path, key: str, name: str, steps: int = 3, conv: int | None = None, **sizes
) -> tuple[nn.Module, TrainingTask]:
    task = network.training_task(name, **sizes)
    spec = network.spec(key, task, dim=16, heads=2, conv=conv)
    torch.manual_seed(0)
    net, schedule = spec.build(), Schedule(steps=steps)
    history = fit(net, task, schedule, evaluations=1)
    checkpoint.save(net, spec, task, schedule, history, folder)
    return net, task


@pytest.mark.parametrize(
    ("key", "name"),
    [("softmax", "mqar"), ("hedgehog", "copy"), ("titans", "lm"), ("softmax", "digits"), ("mega", "copy")],
)
def test_a_saved_network_loads(tmp_path: Path, key: str, name: str) -> None:
    net, task = trained(tmp_path, key, name)
    inputs, _ = task.heldout(3)
    assert_near(checkpoint.load(tmp_path)(inputs), net(inputs), 1e-6)
    assert checkpoint.task_of(tmp_path) == task
    record = json.loads((tmp_path / checkpoint.RECORD).read_text())
    assert len(record["losses"]) == 3
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize(("key", "conv"), [("softmax", 0), ("softmax", 4), ("hedgehog", 4), ("titans", 4)])
def test_compare_runs_a_saved_network(tmp_path: Path, key: str, conv: int) -> None:
    """Each answered token is the likeliest one of the network on the whole sequence."""
    net, task = trained(tmp_path / "net", key, "mqar", steps=40, conv=conv, vocabulary=16, length=16, pairs=2)
    found = compare(model=str(tmp_path / "net"), examples=8, out=tmp_path / "out", methods=["full"])
    assert [row.method for row in found.rows] == ["full"]
    for answer in found.rows[0].answers:
        ids = [int(word) for word in answer.prompt.split()]
        answered = [int(word) for word in answer.output.split()]
        for token in answered:
            assert net(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)


def test_cache_policies_apply_to_plain_attention(tmp_path: Path) -> None:
    trained(tmp_path / "net", "softmax", "mqar", conv=0, vocabulary=64, length=64, pairs=8)
    found = compare(model=str(tmp_path / "net"), examples=2, budget=0.5, out=tmp_path / "out", methods=["sink_recent"])
    kept = {row.method: row.cache_kept for row in found.rows}
    assert kept["full"] == 1.0
    assert kept["sink_recent"] < 0.7


def test_cache_policies_are_refused_without_a_cache(tmp_path: Path) -> None:
    trained(tmp_path / "net", "hedgehog", "copy")
    with pytest.raises(UnsupportedModel, match="does not go through transformers' attention interface"):
        compare(model=str(tmp_path / "net"), examples=2, out=tmp_path / "out", methods=["sink_recent"])
    found = compare(model=str(tmp_path / "net"), examples=2, out=tmp_path / "out2")
    assert [row.method for row in found.rows] == ["full"]


def test_a_task_the_model_was_not_trained_on_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "net", "softmax", "copy")
    with pytest.raises(TaskError, match="foveate train --task mqar"):
        compare(model=str(tmp_path / "net"), task="mqar", out=tmp_path / "out")
    with pytest.raises(OptionError, match="copy has the length of the training"):
        compare(model=str(tmp_path / "net"), length=300, out=tmp_path / "out")


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must hold a trained network"):
        checkpoint.load(tmp_path)
    assert checkpoint.task_of(tmp_path) is None


def test_history_returns_its_last_score() -> None:
    assert History([1.0], {3: 0.2, 7: 0.5}).score == 0.5
