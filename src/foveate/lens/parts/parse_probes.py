"""Probes that parse from attention: how much syntax the heads of a frozen encoder hold together.

What Does BERT Look At? An Analysis of BERT's Attention (2019), arXiv 1906.04341.

Two things follow the release where the paper is silent: the root is a candidate of its own, whose features are the
weights to and from the two special tokens; and the map from word vectors to weights has a bias. In the release the
zeros that stand for the root's vector come after the last candidate, though its features come first; here both come
first. Weights start at zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import validate
from foveate.core.errors import OptionError, ShapeError
from foveate.lens.parts.parsed_sentence import ParsedSentence


class ParseProbe(nn.Module):
    """A classifier that gives each word a distribution over its possible heads: the root, then all words."""

    @abstractmethod
    def forward(self, sentence: ParsedSentence) -> Float[Tensor, "w c"]:
        """Return logits of each word's head: column 0 is the root, column `j` is word `j`."""

    def fit(self, sentences: Iterable[ParsedSentence], epochs: int = 1, lr: float = 0.002) -> Self:
        """Train on gold heads with Adam, a sentence a step; the loss is the sum of cross-entropies.

        Args:
            sentences: training sentences; the order is kept.
            epochs: passes over them.
            lr: the learning rate.
        """
        validate.count("epochs", epochs, 1)
        texts = list(sentences)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for _ in range(epochs):
            for sentence in texts:
                logits = self(sentence)
                loss = F.cross_entropy(logits, _gold(sentence).to(logits.device), reduction="sum")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self

    @torch.no_grad()
    def predict(self, sentence: ParsedSentence) -> Int[Tensor, " w"]:
        """Return the most probable head of each word: 0 for the root, 1 for the first word."""
        return self(sentence).argmax(-1)

    def accuracy(self, sentences: Iterable[ParsedSentence], ignored: Collection[str] = ("punct",)) -> float:
        """Return the unlabelled attachment score: the share of words whose head is right.

        Args:
            sentences: sentences that the probe was not trained on.
            ignored: relations that do not count.
        """
        hits = count = 0
        for sentence in sentences:
            right = (self.predict(sentence).cpu() == _gold(sentence)).tolist()
            counted = [hit for hit, name in zip(right, sentence.relations, strict=True) if name not in ignored]
            hits, count = hits + sum(counted), count + len(counted)
        if not count:
            raise OptionError("sentences must hold a word whose relation is not ignored; got none")
        return hits / count


@final
class AttentionProbe(ParseProbe):
    """A probe whose logits are a weighted sum of all heads' weights, in both directions.

    Without word vectors each head has one weight for each direction. With them, these weights are a linear function of
    the two words' vectors.

    Args:
        n_maps: the number of heads in all layers together.
        words: the width of the word vectors; None for attention alone.
    """

    def __init__(self, n_maps: int, words: int | None = None) -> None:
        super().__init__()
        validate.count("n_maps", n_maps, 1)
        self.n_maps, self.words = n_maps, words
        self.root = nn.Parameter(torch.ones(2))  # the share of the first and of the last token
        if words is None:
            self.weights = nn.Parameter(torch.zeros(2 * n_maps))
        else:
            validate.count("words", words, 1)
            self.dense = nn.Linear(2 * words, 2 * n_maps)
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    def forward(self, sentence: ParsedSentence) -> Float[Tensor, "w c"]:
        maps = self._maps(sentence.attention)
        if self.words is None:
            return torch.einsum("k,kij->ij", self.weights, maps)
        return torch.einsum("ijk,kij->ij", self.dense(word_pairs(sentence, self.words).to(maps)), maps)

    def _maps(self, attention: Float[Tensor, "l h t t"]) -> Float[Tensor, "k w c"]:
        """Return the weights from and to each word, with the root's column before the words'."""
        maps = attention.flatten(0, 1).to(self.root)
        if len(maps) != self.n_maps:
            raise ShapeError(f"attention has {len(maps)} heads in all layers; this probe has n_maps={self.n_maps}")
        both = torch.cat([maps, maps.mT])
        root = self.root[0] * both[:, 1:-1, :1] + self.root[1] * both[:, 1:-1, -1:]
        return torch.cat([root, both[:, 1:-1, 1:-1]], -1)


@final
class StructuralProbe(ParseProbe):
    """A probe that sees no attention: word vectors and distances, through one hidden layer. The baseline.

    Args:
        words: the width of the word vectors.
        hidden: the width of the hidden layer.
        seed: of the initial weights.
    """

    def __init__(self, words: int, hidden: int = 256, seed: int = 0) -> None:
        super().__init__()
        validate.count("words", words, 1)
        validate.count("hidden", hidden, 1)
        self.words = words
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(nn.Linear(2 * words + 8, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, sentence: ParsedSentence) -> Float[Tensor, "w c"]:
        pairs = word_pairs(sentence, self.words)
        features = torch.cat([pairs, distance_features(len(sentence.heads)).to(pairs)], -1)
        return self.mlp(features.float())[..., 0]


def word_pairs(sentence: ParsedSentence, width: int) -> Float[Tensor, "w c d2"]:
    """Return the vectors of each word and its candidate, side by side; zeros for the root."""
    if sentence.vectors is None or sentence.vectors.shape[1] != width:
        got = "none" if sentence.vectors is None else f"width {sentence.vectors.shape[1]}"
        raise ShapeError(f"vectors must have the probe's width {width}; got {got}")
    own = sentence.vectors
    n = len(own)
    pairs = torch.cat([own[:, None].expand(n, n, -1), own[None].expand(n, n, -1)], -1)
    return F.pad(pairs, (0, 0, 1, 0))


def distance_features(n: int) -> Float[Tensor, "w c 8"]:
    """Return what is known of each pair without its words.

    The features are how far the candidate is behind and before the word, as a share of the sentence; whether it is at
    the offsets 0, -1, 1, -2 and 2; and whether it is the root.
    """
    place = torch.arange(n)
    offset = place[None] - place[:, None]
    far = [offset.clamp_min(0) / n, (-offset).clamp_min(0) / n]
    at = [(offset == near).float() for near in (0, -1, 1, -2, 2)]
    words = torch.stack([*far, *at, torch.zeros(n, n)], -1)
    root = torch.zeros(n, 1, 8)
    root[..., -1] = 1.0
    return torch.cat([root, words], 1)


def _gold(sentence: ParsedSentence) -> Int[Tensor, " w"]:
    return torch.tensor(list(sentence.heads))
