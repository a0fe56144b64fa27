"""Times of calls that take turns in one process, so that a drift of the machine meets all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from foveate.bench.parts.timing import now


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device,
    after: Callable[[int], None] = lambda number: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Return the seconds of each call in each round; every second round goes back through them.

    Args:
        calls: the calls by name; whoever wants them warm has called them before.
        rounds: the number of rounds.
        device: the clock waits for it.
        after: called with the number of each round that is done.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            begun = now(device)
            calls[name]()
            taken[name].append(now(device) - begun)
        after(number + 1)
    return taken
