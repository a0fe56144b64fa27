"""Variational attention: attention with a latent alignment, trained by the exact marginal, a bound, or softly.

Latent Alignment and Variational Attention (2018), arXiv 1807.03756.
"""

from __future__ import annotations

from typing import Literal, Self, TypedDict, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError
from foveate.nn.parts.packed_rnn import run_rnn
from foveate.ops.functional.additive_score import pair_score
from foveate.train.base.objective import Batch, Loss, Objective, inputs_of, labels_of
from foveate.train.objectives.latent_alignment import (
    Estimator,
    LatentObjective,
    check,
    latent_attention_loss,
    marginal_decode,
)


class _Options(TypedDict):
    """The arguments of `latent_attention_loss` that say how expectations are estimated."""

    estimator: Estimator
    samples: int
    temperature: float
    generator: torch.Generator | None


@final
class VariationalAttention(nn.Module):
    """Cross-attention with a word classifier, trainable with any of the objectives on the same parameters.

    It suits outputs that each depend on one input position. Exact training runs the output layer T times, sampled
    training `samples` times and once more for the baseline; the inference network adds two LSTMs, which prediction does
    not use. It is the wrong choice if an output mixes several inputs: soft attention does that better.

    Args:
        src_dim, tgt_dim: widths of memory and query.
        attn_dim: the width inside the prior's tanh, and of the inference network's LSTMs in each direction.
        vocab: number of words.
        objective, estimator, samples, temperature, generator: see `latent_attention_loss`.
        score: the prior's score: "mlp" is `v . tanh(W x + U q)`, "general" is `q W x`.

    As in the release, q is a bilinear score of the two LSTMs' states. The release's source LSTM reads word embeddings;
    this one reads the memory. The paper's relaxed (Dirichlet) alignments are in no release and are left out.
    """

    def __init__(
        self, src_dim: int, tgt_dim: int, attn_dim: int, vocab: int, *, objective: LatentObjective = "elbo",
        estimator: Estimator = "enum", samples: int = 1, temperature: float = 1.0,
        score: Literal["mlp", "general"] = "mlp", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in {"src_dim": src_dim, "tgt_dim": tgt_dim, "attn_dim": attn_dim, "vocab": vocab}.items():
            validate.count(name, value, 1)
        validate.one_of("score", score, ("mlp", "general"))
        check(objective, estimator, samples, temperature)
        if (estimator != "enum") != (generator is not None):
            need = "must be given" if generator is None else "must be None"
            raise OptionError(f'generator {need} with estimator="{estimator}"')
        self.objective = objective
        self.options = _Options(estimator=estimator, samples=samples, temperature=temperature, generator=generator)
        self.src_dim, self.tgt_dim, self.vocab = src_dim, tgt_dim, vocab
        self.query = nn.Linear(tgt_dim, attn_dim if score == "mlp" else src_dim, bias=False)
        self.memory = nn.Linear(src_dim, attn_dim, bias=False) if score == "mlp" else None
        self.v = nn.Parameter(torch.empty(attn_dim).uniform_(-(attn_dim**-0.5), attn_dim**-0.5))
        self.join, self.words = nn.Linear(src_dim + tgt_dim, tgt_dim), nn.Linear(tgt_dim, vocab)
        self.inference = InferenceNetwork(src_dim, vocab, attn_dim) if objective == "elbo" else None

    def prior_logits(self, query: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Float[Tensor, "b s t"]:
        """Return the logits of the prior `p(z | x, query)` over positions, which does not know the output."""
        projected = self.query(query)
        logits = projected @ memory.mT if self.memory is None else pair_score(projected, self.memory(memory), self.v)
        return _mask_padding(logits, lengths)

    def context(self, query: Tensor, memory: Tensor, lengths: Tensor | None = None) -> Float[Tensor, "b s d"]:
        """Return soft attention's context; a decoder feeds it back, so that its state stays deterministic."""
        memory = self._masked_memory(query, memory, lengths)
        return torch.softmax(self.prior_logits(query, memory, lengths), -1) @ memory

    def log_probs(self, query: Tensor, context: Float[Tensor, "... s d"]) -> Float[Tensor, "... s v"]:
        """Return the log-probabilities of the words, given the context."""
        query = query.expand(*context.shape[:-1], self.tgt_dim)
        return torch.log_softmax(self.words(torch.tanh(self.join(torch.cat([query, context], -1)))), -1)

    def forward(
        self, query: Float[Tensor, "b s e"], memory: Float[Tensor, "b t d"], target: Int[Tensor, "b s"], *,
        lengths: Int[Tensor, " b"] | None = None, target_lengths: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b s"]:  # fmt: skip
        """Return the loss of each output; 0 past `target_lengths`."""
        memory = self._masked_memory(query, memory, lengths)
        if target.shape != query.shape[:2]:
            raise ShapeError(f"target must be {tuple(query.shape[:2])}; got {tuple(target.shape)}")
        prior = self.prior_logits(query, memory, lengths)
        post = None if self.inference is None else self.inference(memory, target, lengths, target_lengths)

        def loglik(weights: Tensor) -> Tensor:
            found = self.log_probs(query, weights @ memory)
            return found.gather(-1, target[..., None].expand(*found.shape[:-1], 1)).squeeze(-1)

        loss = latent_attention_loss(prior, loglik, post_logits=post, objective=self.objective, **self.options)
        if target_lengths is None:
            return loss
        return loss.masked_fill(_padding(target_lengths, target.shape[1]), 0.0)

    def predict(
        self, query: Tensor, memory: Tensor, *, lengths: Tensor | None = None, top_k: int | None = None
    ) -> Float[Tensor, "b s v"]:
        """Return the words' log-probabilities: by soft attention if that is the objective, else marginalised.

        `top_k` limits the marginal to the prior's likeliest positions.
        """
        if self.objective == "soft":
            return self.log_probs(query, self.context(query, memory, lengths))
        memory = self._masked_memory(query, memory, lengths)
        prior = self.prior_logits(query, memory, lengths)
        if top_k is not None:
            validate.count("top_k", top_k, 1)
        prior, best = prior.topk(prior.shape[-1] if top_k is None else min(top_k, prior.shape[-1]), -1)
        rows = torch.arange(len(memory), device=memory.device)[:, None, None]
        return marginal_decode(prior, self.log_probs(query[:, :, None], memory[rows, best]))

    def _masked_memory(self, query: Tensor, memory: Tensor, lengths: Tensor | None) -> Tensor:
        """Check the shapes, and return the memory with zeros at padding."""
        for name, x, width in (("query", query, self.tgt_dim), ("memory", memory, self.src_dim)):
            if x.dim() != 3 or x.shape[-1] != width:
                raise ShapeError(f"{name} must be (B, N, {width}); got {tuple(x.shape)}")
        return memory if lengths is None else memory.masked_fill(_padding(lengths, memory.shape[1])[..., None], 0.0)


@final
class InferenceNetwork(nn.Module):
    """The posterior `q(z | x, y)`: a bilinear score of bidirectional LSTM states of memory and target."""

    def __init__(self, src_dim: int, vocab: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.source = nn.LSTM(src_dim, hidden, batch_first=True, bidirectional=True)
        self.target = nn.LSTM(hidden, hidden, batch_first=True, bidirectional=True)
        self.w = nn.Linear(2 * hidden, 2 * hidden, bias=False)

    def forward(
        self, memory: Tensor, target: Tensor, lengths: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Float[Tensor, "b s t"]:
        source = run_rnn(self.source, memory, lengths)
        return _mask_padding(self.w(run_rnn(self.target, self.embed(target), target_lengths)) @ source.mT, lengths)


@final
class VariationalObjective(Objective):
    """The loss of a `VariationalAttention` as an objective: the mean over the real outputs of a batch.

    The network holds the options. A batch holds the arguments of its call by name, and its target under "labels".
    Evaluation takes the negative log-likelihood of predictions.
    """

    def __init__(self) -> None:
        super().__init__()

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        inputs = inputs_of(batch)
        each = model(target=labels_of(batch), **inputs)
        return Loss(_mean(each, inputs.get("target_lengths")))

    def plain(self, model: nn.Module, batch: Batch) -> Loss:
        inputs, target = inputs_of(batch), labels_of(batch)
        ends = inputs.pop("target_lengths", None)
        outputs = cast(VariationalAttention, model).predict(**inputs)
        return Loss(_mean(-outputs.gather(-1, target[..., None]).squeeze(-1), ends), outputs=outputs)

    @classmethod
    def example(cls) -> tuple[Self, nn.Module, Batch]:
        random = torch.Generator().manual_seed(0)
        net = VariationalAttention(3, 4, 5, 6, estimator="reinforce", generator=random)
        batch = {
            "query": torch.randn(2, 3, 4, generator=random), "memory": torch.randn(2, 7, 3, generator=random),
            "labels": torch.tensor([[0, 3, 5], [2, 2, 1]]), "lengths": torch.tensor([7, 4]),
            "target_lengths": torch.tensor([2, 3]),
        }  # fmt: skip
        return cls(), net, batch


def _mean(each: Float[Tensor, "b s"], ends: Int[Tensor, " b"] | None) -> Float[Tensor, ""]:
    """Return the mean over the outputs before each end."""
    return each.mean() if ends is None else each[~_padding(ends, each.shape[1])].mean()


def _mask_padding(logits: Float[Tensor, "b s t"], lengths: Tensor | None) -> Float[Tensor, "b s t"]:
    if lengths is None:
        return logits
    return logits.masked_fill(_padding(lengths, logits.shape[-1])[:, None], masks.NEG_INF)


def _padding(lengths: Int[Tensor, " b"], size: int) -> Bool[Tensor, "b n"]:
    """Mark the positions after each sequence's end."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]
