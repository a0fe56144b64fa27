"""ACMIL: multiple instance learning whose attention does not settle on a few instances.

Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification (2023), arXiv 2311.07125; its
attention is in `acmil_branches`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.checked import Checked
from foveate.core.errors import ShapeError, shown
from foveate.nn.base.pool import real_tokens
from foveate.nn.pool.acmil_branches import GatedBranches, HeadBranches, WeightedHeads


class ACMILOut(NamedTuple):
    """Logits of the slide and of each branch (none if there is one branch), and the weights of the branches' maps.

    Weights are `(B, M, N)`, or `(B, H, M, N)` for `attention="heads"`.
    """

    slide_logits: Float[Tensor, "b classes"]
    branch_logits: Float[Tensor, "b m classes"]
    weights: Float[Tensor, "*b m n"]


class ACMILLoss(NamedTuple):
    """The loss and its three parts, which add up to it."""

    total: Float[Tensor, ""]
    slide: Float[Tensor, ""]
    branches: Float[Tensor, ""]
    diversity: Float[Tensor, ""]


@final
class ACMIL(Checked, nn.Module):
    """A classifier of bags, such as the patches of a slide, with several branches of attention.

    `h = relu(W x)`; each branch pools h and has its own classifier; the slide's classifier reads h with the mean of the
    branches' maps. Training hides some of each branch's favourite instances, and `acmil_loss` keeps the branches apart,
    so that attention spreads over more of the telling instances and overfits small sets of bags less. Evaluation hides
    nothing and uses the slide's logits. With one branch and `k=0` it is gated attention-based multiple instance
    learning (ABMIL). The wrong choice where the label depends on how instances stand to each other.

    Args:
        in_dim: width of an instance's features.
        classes: the number of classes.
        hidden: width of h.
        branches: M.
        k, mask_ratio: see `stochastic_topk_mask`. The authors found `mask_ratio=0` better on some data: try both.
        attention: "gated" for a gated trunk, "heads" for multi-head attention in each branch.
        gate_hidden: width of the gated trunk.
        heads, dropout: see `HeadBranches`; "gated" has neither.
        generator: draws what training hides and drops.
    """

    def __init__(
        self, in_dim: int, classes: int = 2, *, hidden: int = 128, branches: int = 5, k: int = 10,
        mask_ratio: float = 0.6, attention: Literal["gated", "heads"] = "gated", gate_hidden: int = 128, heads: int = 8,
        dropout: float = 0.1, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in {"in_dim": in_dim, "classes": classes, "hidden": hidden, "branches": branches}.items():
            validate.count(name, value, 1)
        self.in_dim, self.branches = in_dim, branches
        self.reduce = nn.Linear(in_dim, hidden, bias=False)
        masking: dict[str, Any] = {"k": k, "mask_ratio": mask_ratio, "generator": generator}
        self.pool: GatedBranches | HeadBranches
        self.bag: WeightedHeads | None = None
        if attention == "gated":
            self.pool = GatedBranches(hidden, branches, hidden=gate_hidden, **masking)
        else:
            self.pool = HeadBranches(hidden, branches, heads=heads, dropout=dropout, **masking)
            self.bag = WeightedHeads(hidden, heads, dropout, generator)
        classifiers = branches if branches > 1 else 0  # a single branch is the slide
        self.branch_heads = nn.ModuleList(nn.Linear(hidden, classes) for _ in range(classifiers))
        self.slide_head = nn.Linear(hidden, classes)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "#b #n"] | None = None) -> ACMILOut:
        """Classify bags.

        Args:
            x: instances `(B, N, in_dim)`.
            mask: True for real instances; None for all.

        Raises:
            ShapeError: malformed instances or mask.
            OptionError: training without a generator.
        """
        x, mask = real_tokens(x, mask, self.in_dim)
        x = F.relu(self.reduce(x))
        vectors, weights = self.pool.read(x, mask)
        if self.bag is None:
            slide = vectors.mean(1)  # the mean map reads the mean of what the maps read
        else:
            weights = weights.unflatten(1, (self.branches, -1)).transpose(1, 2)
            slide = self.bag(x, weights.mean(2))
        own = [head(vectors[:, m]) for m, head in enumerate(self.branch_heads)]
        slide_logits = self.slide_head(slide)
        return ACMILOut(slide_logits, torch.stack(own, 1) if own else slide_logits[:, None][:, :0], weights)


def acmil_loss(out: ACMILOut, y: Int[Tensor, " b"]) -> ACMILLoss:
    """Return ACMIL's loss: cross entropy of the slide, mean cross entropy of the branches, and their maps' similarity.

    Branches and diversity are 0 if there is one branch.

    Args:
        out: a network's output.
        y: the label of each bag.
    """
    if not isinstance(y, Tensor) or y.shape != out.slide_logits.shape[:1]:
        raise ShapeError(f"y must be the labels (B={len(out.slide_logits)},); got {shown(y)}")
    slide, count = F.cross_entropy(out.slide_logits, y), out.branch_logits.shape[1]
    if count == 0:
        return ACMILLoss(slide, slide, slide.new_zeros(()), slide.new_zeros(()))
    branches = F.cross_entropy(out.branch_logits.flatten(0, 1), y.repeat_interleave(count))
    diversity = branch_similarity(out.weights)
    return ACMILLoss(slide + branches + diversity, slide, branches, diversity)


def branch_similarity(weights: Float[Tensor, "*b m n"]) -> Float[Tensor, ""]:
    """Return the mean cosine of the maps of two branches, over all pairs: 1 for equal maps, 0 for disjoint ones."""
    unit = F.normalize(weights, dim=-1)
    count = weights.shape[-2]
    first, second = torch.triu_indices(count, count, offset=1, device=weights.device)
    return (unit @ unit.mT)[..., first, second].mean()


def top_share(weights: Float[Tensor, "*b n"], k: int = 10) -> Float[Tensor, "*b"]:
    """Return the share of a map's weight on its k heaviest instances, the paper's measure of concentration."""
    validate.count("k", k, 1)
    return weights.topk(min(k, weights.shape[-1]), -1).values.sum(-1)
