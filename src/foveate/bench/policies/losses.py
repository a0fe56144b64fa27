"""Next-token loss after long text: each text is read once, and its next tokens are forced under every policy."""

from __future__ import annotations

from torch import Tensor

from foveate.bench.known import own_tokens
from foveate.bench.methods import Contender
from foveate.bench.parts import digest
from foveate.bench.policies.model_run import ModelRun
from foveate.bench.policies.shared_prefill import Prefilled, decode, prefill
from foveate.core.errors import TaskError


def loss_steps(run: ModelRun) -> int:
    """Return the number of measurements over all contenders and lengths."""
    return len(run.contenders) * len(run.plan.losses)


def check_losses(run: ModelRun) -> None:
    """Refuse lengths that do not fit into the model's context, before anything is measured."""
    for tokens in run.plan.losses:
        if run.context is not None and tokens + run.plan.horizon + 1 > run.context:
            needed = f"{tokens} + {run.plan.horizon + 1}"
            raise TaskError(f"losses={tokens} takes {needed} tokens; the model's context holds {run.context}")


def measure_losses(run: ModelRun) -> None:
    """Record every loss that the journal does not have."""
    for tokens in run.plan.losses:
        ids, forced = texts(run, tokens)
        prefilled = None
        for contender in run.working():
            keys = [loss_key(row, following) for row, following in zip(ids, forced, strict=True)]
            if any(run.known(contender, *key) is None for key in keys):
                prefilled = prefilled or prefill(run.model, ids)
                _measure(run, contender, prefilled, forced)
            run.progress.advance(f"loss at {tokens}: {contender.key} at {contender.budget:.0%}")


def texts(run: ModelRun, tokens: int) -> tuple[Tensor, Tensor]:
    """Return contexts `(texts, tokens)` and the tokens that follow, one more than is counted.

    The first token after a context is not counted: most policies compute it with attention to the whole context.
    """
    ids = run.text(tokens + run.plan.horizon + 1, run.plan.texts)
    return ids[:, :tokens], ids[:, tokens:]


def loss_key(ids: Tensor, forced: Tensor) -> tuple[str, str]:
    """Return what identifies one text's record."""
    return "loss", digest.of(ids.tolist(), forced.tolist())


def _measure(run: ModelRun, contender: Contender, prefilled: Prefilled, forced: Tensor) -> None:
    ids, new, own = prefilled.ids, forced.shape[1], own_tokens(contender.key)
    decoded = run.attempt(
        contender, lambda: decode(run.model, contender.at(ids.shape[1]), prefilled, new, forced, own=own)
    )
    if decoded is None:
        return
    run.journal.add(
        {
            run.key(contender, *loss_key(row, following)): {
                "losses": [round(loss, 5) for loss in losses[1:]], "kept": decoded.kept, "read": decoded.read,
            }
            for row, following, losses in zip(ids, forced, decoded.losses.tolist(), strict=True)
        }
    )  # fmt: skip
