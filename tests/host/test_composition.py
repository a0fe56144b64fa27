"""A cache policy, a calibration and a lens in one `apply` work together, in order, and leave no trace."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from foveate.host import PrefillSwap, apply
from foveate.kv.sink_recent import SinkRecent
from foveate.lens import MEASURES, Lens
from foveate.lens.lens import look
from foveate.ops import HiP
from foveate.steer.text.act_calibration import ActCalibration, calibrate_sinks, find_sinks
from foveate.tasks.parts import corpus
from tests.lens.models import eager_maps, text, tiny
from tests.support.lab import lab
from tests.support.tensors import assert_near

SINK, RECENT, CALIBRATED = 2, 6, (2, 1)


def methods() -> tuple[SinkRecent, ActCalibration, Lens]:
    lens = Lens(list(MEASURES), phase="all", keep_maps={CALIBRATED: slice(0, 24)})
    return SinkRecent(SINK, RECENT), ActCalibration([CALIBRATED], alpha=1.0), lens


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_policy_calibration_and_lens_together(order: tuple[int, ...], padding: str) -> None:
    model, inputs = tiny("llama", num_hidden_layers=4), text(padding)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    (policy, calibration, lens), new = methods(), 4
    with torch.no_grad():
        separate = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        with apply(model, *[(policy, calibration, lens)[i] for i in order]) as run:
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        assert torch.equal(model(**inputs).logits, separate)
        assert torch.equal(model.generate(**inputs, max_new_tokens=new, do_sample=False), generated)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert out.shape == (2, 24 + new)

    # the policy: the tokens stored at the end, in every layer
    assert run.stats.kept == pytest.approx((SINK + RECENT) / (24 + new - 1))
    # the calibration: rows still sum to 1, and equal the model's own map after calibration, in any order
    maps, real = eager_maps(model, inputs), inputs["attention_mask"].bool()
    seen = real[:, None, None, :] & real[:, None, :, None] & torch.ones(24, 24, dtype=torch.bool).tril()
    expected = calibrate_sinks(maps[2], [CALIBRATED[1]], alpha=1.0, seen=seen)
    assert not torch.equal(expected, maps[2])
    assert_near(lens.map(*CALIBRATED), expected[:, CALIBRATED[1]], 1e-5)
    # the lens: the prompt's rows are those of the calibrated weights, before the decoded rows
    entropy = lens.values("entropy")
    for layer, w in enumerate([*maps[:2], expected]):
        assert_near(entropy[layer][..., :24], torch.special.entr(w).sum(-1), 1e-4)
    # decoded rows cover the tokens that the policy kept: the sinks, the window and the new token
    assert entropy[3].shape == (2, 4, 24 + new - 1)
    assert bool((entropy[3][..., 24:] <= torch.tensor(float(SINK + RECENT + 1)).log() + 1e-5).all())


def test_methods_do_the_same_alone_and_together() -> None:
    """The policy acts after the prompt is read and the lens never: the prompt's logits are the calibration's."""
    model, inputs = tiny("llama", num_hidden_layers=4), text()
    policy, calibration, lens = methods()
    with torch.no_grad():
        with apply(model, calibration):
            separate = model(**inputs).logits
        with apply(model, policy, calibration, lens):
            together = model(**inputs).logits
        with apply(model, policy), apply(model, calibration), apply(model, lens):
            nested = model(**inputs).logits
    assert torch.equal(together, separate) and torch.equal(nested, separate)


def lab_prompt(first: int | None = None) -> Tensor:
    """Return real text after the lab's `<bos>` or another first token."""
    model, tokenizer = lab()
    raw = corpus.text("heldout")[1000:1400].encode()[:255]
    return torch.tensor([[tokenizer.bos_token_id if first is None else first, *raw]])


def strongest(ids: Tensor) -> tuple[float, tuple[int, int]]:
    """Return how many times its even share the first token receives, and the head of the lab model with the most."""
    received = look(lab()[0], ids, measures=["received_mean"]).values("received_mean")
    times = torch.stack([values[0, :, 0] for values in received.values()]) * ids.shape[1]
    layer, head = divmod(int(times.argmax()), times.shape[1])
    return times.max().item(), (layer, head)


def test_a_trained_models_first_token_is_a_sink() -> None:
    """The lens and ACT agree: `<bos>` receives far more than its even share, another first token does not."""
    ids = lab_prompt()
    times, (layer, head) = strongest(ids)
    ordinary, _ = strongest(lab_prompt(first=ord("e")))
    assert times > 20 and times > 3 * ordinary
    weights = look(lab()[0], ids, keep_maps={(layer, head): slice(None)}).map(layer, head)[:, None]
    causal = torch.ones(256, 256, dtype=torch.bool).tril()[None, None]
    assert bool(find_sinks(weights, "alpha/N", 5.0, seen=causal)[0, 0, 0])


def test_calibration_of_a_trained_model_spares_the_first_token() -> None:
    """The first token loses no weight in heads in which it is a sink; later sinks lose most of theirs."""
    model, ids = lab()[0], lab_prompt()
    lens, calibrated = Lens(["received_mean"]), Lens(["received_mean"])
    with torch.no_grad():
        with apply(model, lens):
            model(ids)
        with apply(model, ActCalibration([(3, head) for head in range(8)]), calibrated):
            model(ids)
    before, after = (x.values("received_mean")[3][0] for x in (lens, calibrated))
    sinks = before > 5.0 / ids.shape[1]
    heads = sinks[:, 0] & (sinks.sum(-1) > 1)
    assert int(heads.sum()) >= 2
    later = sinks[heads].clone()
    later[:, 0] = False
    assert bool((after[heads, 0] > before[heads, 0]).all())
    assert bool((after[heads][later] < 0.5 * before[heads][later]).all())


def test_an_operator_is_a_method_that_reads_the_prompt() -> None:
    model, inputs = tiny("llama"), text("none")
    operator = HiP(keep=8, block_q=4, block_k=2)
    with torch.no_grad():
        separate = model(**inputs).logits
        with apply(model, PrefillSwap(operator)):
            swapped = model(**inputs).logits
        with apply(model, operator):
            assert torch.equal(model(**inputs).logits, swapped)
    assert not torch.equal(separate, swapped)
