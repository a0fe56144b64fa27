"""AutoInt: products of a row's fields, found by attention, that predict a click.

AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks (2018), arXiv 1810.11921.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Self, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, shown
from foveate.models.base.network import Network
from foveate.models.recommendation.fields import FieldEmbedding, TabularField
from foveate.nn.sequence.interacting import InteractingLayer


@final
class AutoInt(Network):
    """The logit `(B,)` of a row of categorical, multi-valued and numeric fields.

    Fields become vectors, which interacting layers mix; a linear map reads all of them. With an `mlp`, whose logit is
    added, it is AutoInt+. Cost O(M²) for M fields. `correlations` shows which fields it combines. The wrong choice for
    a few numeric columns, where boosted trees do better.

    Args:
        fields: the fields; see `TabularField`.
        dim: width of a field's vector.
        layers: number of layers; l of them make products of up to l + 1 fields. 0 leaves a logistic regression on the
            vectors.
        heads, units, residual, variant: see `InteractingLayer`.
        mlp: hidden widths of the network beside the layers, such as (400, 400); none without.
        dropout: shares of the weights, the vectors and the MLP's hidden units that training drops. The release's
            default is (0, 0, 0.5).
        spread: standard deviation of the first vectors; 0.01 as in the release.

    The release's optional BatchNorm in the MLP is left out. Published sizes depend on the data, so that `sizes` is
    empty: the paper has 16 channels, 3 layers and 2 heads of 32 units.

    Raises:
        OptionError: an option out of range.
    """

    def __init__(
        self, fields: Sequence[TabularField], dim: int = 16, *, layers: int = 3, heads: int = 2, units: int = 32,
        residual: bool = True, mlp: Sequence[int] = (), dropout: tuple[float, float, float] = (0.0, 0.0, 0.0),
        spread: float = 0.01, variant: Literal["paper", "release"] = "paper",
    ) -> None:  # fmt: skip
        super().__init__()
        validate.count("layers", layers, 0)
        if not isinstance(dropout, tuple) or len(dropout) != 3:
            raise OptionError(f"dropout={shown(dropout)} must be three shares: of weights, of vectors, of the MLP")
        for share in dropout:
            validate.between("dropout", share, 0.0, 1.0)
        self.dropout = dropout[1]
        self.embed = FieldEmbedding(fields, dim, spread)
        widths = [dim, *[heads * units] * layers]
        self.layers = nn.ModuleList(
            InteractingLayer(width, heads, units, residual=residual, dropout=dropout[0], variant=variant)
            for width in widths[:-1]
        )
        self.out = nn.Linear(len(fields) * widths[-1], 1)
        self.mlp = _mlp(len(fields) * dim, mlp, dropout[2]) if mlp else None

    def forward(self, ids: Int[Tensor, "b i"], values: Float[Tensor, "b v"] | None = None) -> Float[Tensor, " b"]:
        """Return the logits, to be trained with `binary_cross_entropy_with_logits`.

        Args:
            ids: the categories of the fields that have any, in their order, with a column for each slot; -1 for none.
            values: the numbers of the numeric fields, in their order; None if there are none.
        """
        embedded = F.dropout(self.embed(ids, values), self.dropout, self.training)
        x = embedded
        for layer in self._layers():
            x = layer(x)
        logit = self.out(x.flatten(1))
        return (logit if self.mlp is None else logit + self.mlp(embedded.flatten(1)))[:, 0]

    @torch.no_grad()
    def weights(
        self, ids: Int[Tensor, "b i"], values: Float[Tensor, "b v"] | None = None
    ) -> Float[Tensor, "b l h m m"]:
        """Return the weights between fields in each layer and head: what a row's prediction combines."""
        x, found = self.embed(ids, values), list[Tensor]()
        for layer in self._layers():
            found.append(layer.weights(x))
            x = layer(x)
        if not found:
            raise OptionError("a network with layers=0 has no weights between fields")
        return torch.stack(found, 1)

    def correlations(self, batches: Iterable[tuple[Tensor, ...]]) -> Float[Tensor, "l h m m"]:
        """Return the mean weights over rows: how much a field (row) draws on each field (column), in each layer.

        Args:
            batches: what `forward` takes, `(ids, values)` or `(ids,)`.
        """
        was = self.training
        self.eval()
        total, rows = torch.zeros(()), 0
        for batch in batches:
            found = self.weights(*batch)
            total, rows = total + found.sum(0), rows + len(found)
        self.train(was)
        if not rows:
            raise OptionError("batches must hold at least one row; got none")
        return total / rows

    def _layers(self) -> Iterator[InteractingLayer]:
        return cast("Iterator[InteractingLayer]", iter(self.layers))

    @classmethod
    def example(cls) -> Self:
        fields = (TabularField("a", 5), TabularField("x"), TabularField("tags", 4, 3), TabularField("y"))
        return cls(fields, 6, layers=2, heads=2, units=3, mlp=(7,), spread=1.0)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(-1, 4, (batch, 4), generator=random)
        return ids, torch.randn(batch, 2, generator=random)


def _mlp(width: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    parts = list[nn.Module]()
    for into, out in zip([width, *hidden], hidden, strict=False):
        validate.count("mlp", out, 1)
        parts += [nn.Linear(into, out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(hidden[-1], 1))
