"""Multi-query associative recall, and a two-layer model around any operator, for the claims that need training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.ops import Operator

KEYS, VOCAB = 32, 64


@dataclass(frozen=True)
class Recall:
    """Recall of key-value pairs: `pairs` keys come first, `tellings` times, each time with new values in a new order.

    After that every token is one of these keys, and the target is its latest value."""

    pairs: int = 8
    length: int = 48
    tellings: int = 1

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens `(size, length)` and the target of each position, or -100."""
        keys = torch.rand(size, KEYS, generator=generator).argsort(-1)[:, : self.pairs]
        given = []
        for _ in range(self.tellings):
            keys = keys.gather(1, torch.rand(size, self.pairs, generator=generator).argsort(-1))
            values = torch.randint(KEYS, VOCAB, (size, self.pairs), generator=generator)
            given.append(torch.stack([keys, values], -1).flatten(1))
        given = torch.cat(given, 1)
        queried = torch.randint(0, self.pairs, (size, self.length - given.shape[1]), generator=generator)
        tokens = torch.cat([given, keys.gather(1, queried)], 1)
        labels = torch.cat([torch.full_like(given, -100), values.gather(1, queried)], 1)
        return tokens, labels


class Mixer(nn.Module):
    """Projections, a short causal convolution, the operator, its gates if it has any, and an output projection."""

    def __init__(self, dim: int, heads: int, op: Operator, unit: bool) -> None:
        super().__init__()
        self.heads, self.op, self.unit = heads, op, unit
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, 4, groups=3 * dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gates = nn.ModuleDict(
            {name: nn.Linear(dim, heads) for name in sorted(op.capabilities.inputs & set(FIRST))}
        )
        for name, gate in self.gates.items():
            nn.init.constant_(gate.bias, FIRST[name])

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.conv(F.pad(self.qkv(x).transpose(1, 2), (3, 0))).transpose(1, 2)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.unit:
            q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        rates = {
            name: (F.softplus if name == "delta" else torch.sigmoid)(gate(x)).transpose(1, 2)
            for name, gate in self.gates.items()
        }
        return self.out(self.op(q, k, v, causal=True, **rates).transpose(1, 2).flatten(2))


#: Initial biases of the gates: little forgetting, some momentum, a short step (chunks add steps up).
FIRST = {"alpha": -4.0, "eta": -2.0, "theta": -3.0, "delta": 0.0}


class Model(nn.Module):
    """A layer of mixer and MLP for each operator. `unit`: queries and keys of length 1, which suit memories."""

    def __init__(self, ops: list[Operator], dim: int = 64, heads: int = 2, unit: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.mixers = nn.ModuleList([Mixer(dim, heads, op, unit) for op in ops])
        self.mlps = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in ops]
        )
        self.norms = nn.ModuleList([nn.RMSNorm(dim) for _ in range(2 * len(ops) + 1)])
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(self.norms[-1](x))


def train(model: Model, task: Recall, steps: int, *, seed: int = 0, lr: float = 5e-3, size: int = 32) -> Model:
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        tokens, labels = task.batch(size, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model: Model, task: Recall, seed: int = 12345, size: int = 256) -> float:
    """Return the share of queried values that the model predicts."""
    tokens, labels = task.batch(size, torch.Generator().manual_seed(seed))
    queried = labels >= 0
    return (model(tokens).argmax(-1) == labels)[queried].double().mean().item()
