"""MAC, a network that answers questions in reasoning steps, with DAFT's control or its own.

Learning Dynamics of Attention: Human Prior for Interpretable Machine Reasoning (2019), arXiv 1905.11666, on
Compositional Attention Networks for Machine Reasoning (2018), arXiv 1803.03067.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core import masks, validate
from foveate.core.errors import OptionError, ShapeError, shown
from foveate.models.base.network import Network
from foveate.models.multimodal.mac_units import ControlUnit, DAFTControlUnit, ReadUnit
from foveate.nn.parts.linear_maps import xavier_linear
from foveate.nn.parts.ode import Solver, check_options


class Reasoned(NamedTuple):
    """A MAC network's answers and its way to them.

    Args:
        answers: the classes' scores.
        words: the attention of each of P steps to the question; `total_length_of_transition` takes it.
        places: the attention of each step to the image.
        evaluations: of DAFT's equation, over all steps, for each example; 0 for MAC.
    """

    answers: Float[Tensor, "b classes"]
    words: Float[Tensor, "p b s"]
    places: Float[Tensor, "p b n"]
    evaluations: Int[Tensor, " b"]


@final
class MAC(Network):
    """A network that answers a question about an image in P steps, each of which reads the question, then the image.

    A step's control is a mean of words under attention, the read unit attends to the image with control and memory, and
    `m_t = W [m_{t-1} ; r_t]`. With `daft` the control's logits flow on from step to step, see `DAFTAttention`;
    without it each step computes them from scratch. Time O(P (S d + N d²)). The wrong choice for questions of one hop,
    which one attention answers.

    Args:
        vocabulary: number of words; classes: number of answers.
        features: width of the image's features.
        dim: d, an even number.
        steps: P.
        daft: DAFT's control, or MAC's.
        stem: "grid" for features `(B, features, H, W)`, two 3x3 convolutions with ELU, as for CLEVR; "objects" for
            `(B, N, features)`, one linear map with ELU, as for GQA (where the release also normalises each feature over
            the objects).
        embed: width of a word's embedding.
        solver, tolerance, solver_steps: of DAFT's equation; "rk4" and "euler" take `solver_steps` a reasoning step.
        dropout: the shares that training drops of the image's features, of words, of the question, of what is read, and
            of the answer's layers.

    Raises:
        OptionError: an option out of range.

    As in DAFT's release, MAC's control has neither the control before nor a choice of earlier memories.
    """

    released_names = (
        (r"^conv\.", "stem."), (r"^embed\.", "embedding."), (r"^question_prep\.", "question."),
        (r"^mac\.mem_0$", "memory"),
        (r"^mac\.control\.attn_zero$", "control.steps.0.first_logit"),
        (r"^mac\.control\.dafts\.(\d+)\.attn\.", r"control.steps.\1.change."),
        (r"^mac\.control\.dafts\.(\d+)\.different_question_projs\.", r"control.steps.\1.question."),
        (r"^mac\.control\.attn\.", "control.attend."),
        (r"^mac\.control\.shared_question_proj\.", "control.shared."),
        (r"^mac\.control\.different_question_projs\.", "control.questions."),
        (r"^mac\.read\.proj_know\.", "read.knowledge."), (r"^mac\.read\.proj_mem\.", "read.memory."),
        (r"^mac\.read\.readMemProj\.", "read.interaction."), (r"^mac\.read\.inter2att\.", "read.attend."),
        (r"^mac\.write\.newMemory\.", "write."),
    )  # fmt: skip

    def __init__(
        self, vocabulary: int, classes: int = 28, features: int = 1024, dim: int = 512, steps: int = 12, *,
        daft: bool = True, stem: Literal["grid", "objects"] = "grid", embed: int = 300, solver: Solver = "dopri5",
        tolerance: float = 1e-3, solver_steps: int = 4,
        dropout: tuple[float, float, float, float, float] = (0.18, 0.15, 0.08, 0.15, 0.15),
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = dict(vocabulary=vocabulary, classes=classes, features=features, dim=dim, steps=steps, embed=embed)
        for name, value in sizes.items():
            validate.count(name, value, 1)
        if dim % 2:
            raise OptionError(f"dim={dim} must be even, for a recurrence in both directions")
        check_options(solver, tolerance, tolerance, solver_steps)
        if len(dropout) != 5:
            raise OptionError(f"dropout={shown(dropout)} must be five shares")
        for share in dropout:
            validate.between("dropout", share, 0, 1)
        of_image, of_words, of_question, of_read, of_answer = dropout
        self.steps, self.features, self.is_grid = steps, features, stem == "grid"
        self.stem = _grid_stem(features, dim, of_image) if self.is_grid else _object_stem(features, dim, of_image)
        self.embedding = nn.Embedding(vocabulary, embed)
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)
        self.lstm = nn.LSTM(embed, dim // 2, batch_first=True, bidirectional=True)
        self.control = DAFTControlUnit(dim, steps, solver, tolerance, solver_steps) if daft else ControlUnit(dim, steps)
        self.read, self.write = ReadUnit(dim, of_read), xavier_linear(2 * dim, dim)
        self.memory = nn.Parameter(torch.randn(1, dim))
        self.question = xavier_linear(dim, dim)
        self.classifier = nn.Sequential(
            nn.Dropout(of_answer), xavier_linear(2 * dim, dim), nn.ELU(), nn.Dropout(of_answer),
            xavier_linear(dim, classes),
        )  # fmt: skip
        self.word_drop, self.question_drop = nn.Dropout(of_words), nn.Dropout(of_question)

    def forward(
        self, image: Float[Tensor, "b ..."], words: Int[Tensor, "b s"], lengths: Int[Tensor, " b"] | None = None, *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b classes"]:  # fmt: skip
        """Return the scores of the answers; `reason` has the arguments."""
        return self.reason(image, words, lengths, mask=mask).answers

    def reason(
        self, image: Float[Tensor, "b ..."], words: Int[Tensor, "b s"], lengths: Int[Tensor, " b"] | None = None, *,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Reasoned:  # fmt: skip
        """Answer, and show the way to the answer.

        Args:
            image: features, `(B, features, H, W)` of a grid or `(B, N, features)` of objects.
            words: the question's words.
            lengths: of the questions, at least 1; None if all have S words.
            mask: True for real objects; None for all. A grid has none.

        Raises:
            ShapeError: an input of the wrong shape.
            OptionError: a mask for a grid.
        """
        knowledge, places = self._look(image, mask)
        context, query, real = self._listen(words, lengths, len(image))
        memory, logits = self.memory.expand(len(image), -1), None
        kept = F.dropout(torch.ones_like(memory), self.read.drop.p, self.training)  # one choice for all steps
        steps = list[tuple[Tensor, Tensor, Tensor]]()
        for step in range(self.steps):
            found = self.control(step, context, query, real, logits)
            logits = found.logits
            read, looked = self.read(kept * memory, knowledge, found.control, places)
            memory = self.write(torch.cat([memory, read], -1))
            steps.append((found.weights, looked, found.evaluations))
        weights, looked_at, evaluations = (torch.stack(each) for each in zip(*steps, strict=True))
        answers = self.classifier(torch.cat([memory, self.question(query)], -1))
        return Reasoned(answers, weights, looked_at, evaluations.sum(0))

    # -- for tests -----------------------------------------------------------------------------------------------------

    @classmethod
    def example(cls) -> Self:
        return cls(9, 5, 6, 8, 3, embed=7, tolerance=1e-6)

    @classmethod
    def example_inputs(cls, batch: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        image = torch.randn(batch, 6, 3, 4, generator=random)
        return image, torch.randint(9, (batch, 5), generator=random)

    # -- the inputs ----------------------------------------------------------------------------------------------------

    def _look(self, image: Tensor, mask: Tensor | None) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """Return the image's places and a mask of the real ones."""
        axes, channels = ("(B, features, H, W)", 1) if self.is_grid else ("(B, N, features)", 2)
        rank = 4 if self.is_grid else 3
        if not isinstance(image, Tensor) or image.dim() != rank or image.shape[channels] != self.features:
            raise ShapeError(f"image must be {axes} with features={self.features}; got {shown(image)}")
        if self.is_grid:
            if mask is not None:
                raise OptionError("mask must be None for a grid, whose places are all real")
            knowledge = self.stem(image).flatten(2).mT
            return knowledge, torch.ones(knowledge.shape[:2], dtype=torch.bool, device=image.device)
        real = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        if mask is not None:
            validate.bool_mask("mask", mask, "B, N", tuple(image.shape[:2]), image.device)
            real = mask.expand(image.shape[:2])
        return self.stem(image.masked_fill(~real[..., None], 0.0).mT).mT, real

    def _listen(
        self, words: Tensor, lengths: Tensor | None, batch: int
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b d"], Bool[Tensor, "b s"]]:
        """Return the question's words in their context, the question, and a mask of the real words."""
        if not isinstance(words, Tensor) or words.dtype != torch.long or words.dim() != 2 or len(words) != batch:
            raise ShapeError(f"words must be ids (B, S), B={batch} as the image's; got {shown(words)}")
        if lengths is None:
            lengths = torch.full((batch,), words.shape[1], device=words.device)
        if not isinstance(lengths, Tensor) or lengths.shape != (batch,) or lengths.is_floating_point():
            raise ShapeError(f"lengths must be whole numbers (B,)=({batch},); got {shown(lengths)}")
        if batch and not 0 < int(lengths.min()) <= int(lengths.max()) <= words.shape[1]:
            raise OptionError(f"lengths={shown(lengths.tolist())} must be in 1..S={words.shape[1]}")
        embedded = self.word_drop(self.embedding(words))
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, (last, _) = self.lstm(packed)
        context, _ = nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True, total_length=words.shape[1])
        query = self.question_drop(last.transpose(0, 1).flatten(1))
        return context, query, masks.padding(lengths, words.shape[1])[:, 0, 0]


def _grid_stem(features: int, dim: int, dropout: float) -> nn.Sequential:
    first, second = (_xavier(nn.Conv2d(width, dim, 3, padding=1)) for width in (features, dim))
    return nn.Sequential(nn.Dropout(dropout), first, nn.ELU(), nn.Dropout(dropout), second, nn.ELU())


def _object_stem(features: int, dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), _xavier(nn.Conv1d(features, dim, 1)), nn.ELU())


def _xavier(conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
