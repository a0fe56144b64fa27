"""Next-token loss behind long text: each text is read once, and its next tokens are forced under every policy."""

from __future__ import annotations

from torch import Tensor

from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.policies.desk import Desk
from foveate.bench.policies.shared import Reading, go_on, read


def steps(desk: Desk) -> int:
    return len(desk.contenders) * len(desk.plan.losses)


def measure(desk: Desk) -> None:
    """Write down every loss that the journal does not have."""
    for tokens in desk.plan.losses:
        ids, forced = texts(desk, tokens)
        reading = None
        for contender in desk.able():
            if any(desk.known(contender, *what(row, answer)) is None for row, answer in zip(ids, forced, strict=True)):
                reading = reading or read(desk.model, ids)
                _measure(desk, contender, reading, forced)
            desk.watch.advance(f"loss at {tokens}: {contender.key} at {contender.budget:.0%}")


def texts(desk: Desk, tokens: int) -> tuple[Tensor, Tensor]:
    """Contexts `(texts, tokens)` and what follows them, one token more than is counted.

    The first token behind a context comes from attention to all of it under most policies, and is not counted.
    """
    ids = desk.text(tokens + desk.plan.horizon + 1, desk.plan.texts)
    return ids[:, :tokens], ids[:, tokens:]


def what(ids: Tensor, forced: Tensor) -> tuple[str, str]:
    return "loss", digest.of(ids.tolist(), forced.tolist())


def _measure(desk: Desk, contender: Contender, reading: Reading, forced: Tensor) -> None:
    ids, new = reading.ids, forced.shape[1]
    methods = contender.at(ids.shape[1])
    said = desk.attempt(contender, lambda: go_on(desk.model, methods, reading, new, forced))
    if said is None:
        return
    desk.journal.add(
        {
            desk.key(contender, *what(row, answer)): {
                "losses": [round(loss, 5) for loss in losses[1:]], "kept": said.kept, "read": said.read,
            }
            for row, answer, losses in zip(ids, forced, said.losses.tolist(), strict=True)
        }
    )  # fmt: skip
