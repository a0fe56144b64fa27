"""ECAPA-TDNN against SpeechBrain, whose side is a record: see `speechbrain_record.py`."""

from __future__ import annotations

import json

import torch

from foveate.models import ECAPATDNN
from foveate.train import AAMSoftmax
from tests.parity import speechbrain_record as record
from tests.support.tensors import assert_near

RECORD = json.loads(record.RECORD.read_text("utf-8"))


def network() -> ECAPATDNN:
    net = ECAPATDNN(6, 16, 5, scale=4, se=4, aggregate=12, attention_channels=4, variant="release").double().eval()
    net.load_released(record.parameters(RECORD["parameters"]))
    return net


def recorded(name: str) -> torch.Tensor:
    return torch.tensor(RECORD[name], dtype=torch.float64)


def test_embeddings_and_the_gradient_of_the_frames() -> None:
    x = record.frames().requires_grad_()
    out = network()(x)
    assert_near(out, recorded("out"), 1e-10)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert_near(grad, recorded("gradient"), 1e-9)


def test_the_pooling_of_sequences_of_several_lengths() -> None:
    x = record.pooled_frames()
    lengths = torch.tensor([round(share * x.shape[2]) for share in record.LENGTHS])
    assert_near(network().asp(x, lengths), recorded("pooled"), 1e-10)


def test_the_margin() -> None:
    """Their loss takes cosines; ours are those of unit vectors with a class each."""
    cosines, loss = record.cosines(), AAMSoftmax(4, 4).double()
    loss.cosines = lambda embeddings: embeddings  # type: ignore[method-assign]
    assert_near(loss(cosines, torch.arange(6) % 4), recorded("margin"), 1e-5)


def test_the_released_size_has_their_parameters() -> None:
    with torch.device("meta"):
        net = ECAPATDNN.of_size("speechbrain")
        theirs = net.renamed({name: torch.empty(shape) for name, shape in RECORD["released"].items()})
    assert {name: x.shape for name, x in theirs.items()} == {name: x.shape for name, x in net.state_dict().items()}


def test_padded_frames_have_no_effect_here() -> None:
    """A padded example gives what SpeechBrain gives for the frames alone."""
    x = record.frames()
    padded = torch.cat([x, torch.full((3, 7, 6), torch.nan).double()], 1)
    assert_near(network()(padded, torch.full((3,), 20)), recorded("out"), 1e-10)
