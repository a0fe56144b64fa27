"""The training recipe of GridQA: some 12 seconds on one thread, kept in a folder of the user's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, GPT2Config, LlavaConfig, LlavaForConditionalGeneration

from foveate.core import validate
from foveate.labs.grid_qa.questions import BLANK, CELLS, IMAGE, PAD, PATCH, PIXELS, VOCAB, Questions, draw, embedded

#: `progress(step, steps, note)`.
Progress = Callable[[int, int, str], None]

_SHIPPED = Path(__file__).parent / "checkpoint"


@dataclass(frozen=True)
class GridRecipe:
    """All settings of the training.

    Args:
        prior: whether to train on after that, on pictures whose asked cells mostly have their usual colour, and of
            which some cells are hidden, so that the model guesses the usual colour where it sees little.
        blank: whether one cell of every picture is empty: a constant token, with a spike in the first channel of its
            embedding.
        spike: the spike, in units of a word's standard deviation.
        seed: of weights and questions.
        steps, biased_steps: optimiser steps without and with the prior.
        usual: the share of asked cells with their usual colour, while the prior is learnt.
        hidden: the share of hidden cells, while the prior is learnt.
        batch, rate: batch size and learning rate.
    """

    prior: bool = False
    blank: bool = False
    seed: int = 0
    steps: int = 550
    biased_steps: int = 350
    usual: float = 0.85
    hidden: float = 0.3
    batch: int = 64
    rate: float = 3e-3
    spike: float = 30.0

    @property
    def total(self) -> int:
        return self.steps + self.biased_steps * self.prior

    @property
    def name(self) -> str:
        """A name for files: the kind, the seed, and a digest of the other settings."""
        kind = "-".join(word for word, chosen in (("prior", self.prior), ("blank", self.blank)) if chosen) or "plain"
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{kind}-{self.seed}-{digest[:8]}"


def load(recipe: GridRecipe | None = None, folder: Path | None = None) -> LlavaForConditionalGeneration:
    """Return the model of a recipe: the shipped one, the one in a folder, or a newly trained one, which is kept there.

    Args:
        recipe: the settings; the default is `GridRecipe()`.
        folder: holds trained models; None is `foveate/labs` in the user's cache.
    """
    recipe = recipe or GridRecipe()
    shipped = _SHIPPED / f"{recipe.name}.safetensors"
    if shipped.exists():
        return _loaded(recipe, shipped)
    path = (_folder() if folder is None else folder) / f"grid_qa-{recipe.name}-torch{torch.__version__}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            made = path.with_suffix(".part")
            save_file(_weights(train(recipe)), made)
            made.replace(path)
    return _loaded(recipe, path)


def train(recipe: GridRecipe | None = None, progress: Progress | None = None) -> LlavaForConditionalGeneration:
    """Train a model on one thread and return it. The result depends on the machine in its last bits.

    Args:
        recipe: the settings.
        progress: called after each step.
    """
    recipe = recipe or GridRecipe()
    validate.count("steps", recipe.steps, 1)
    with _one_thread():
        model, generator = build(recipe).train(), torch.Generator().manual_seed(recipe.seed)
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.requires_grad_(False)
        optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=recipe.rate)
        for step in range(recipe.total):
            loss = _loss(model, recipe, step >= recipe.steps, generator)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if progress is not None:
                progress(step + 1, recipe.total, f"loss {loss.item():.3f}")
    return model.eval()


def build(recipe: GridRecipe | None = None) -> LlavaForConditionalGeneration:
    """Build the untrained model: a decoder of 3 layers, 64 channels and 4 heads behind a view of the cells."""
    recipe = recipe or GridRecipe()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=PIXELS,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.07, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=CELLS,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlavaForConditionalGeneration(config)
        model.generation_config.pad_token_id = PAD
        _align(model, recipe, torch.Generator().manual_seed(recipe.seed))
    return model.eval()


@torch.no_grad()
def _align(model: LlavaForConditionalGeneration, recipe: GridRecipe, generator: torch.Generator) -> None:
    """Give the model weights from which it learns soon.

    Words, positions, colours and shapes have embeddings of one scale. The projector gives a cell the sum of its
    colour and its shape, as one that was aligned before would: its second map is fitted by least squares.
    """
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    for table in (decoder.wte, decoder.wpe):
        nn.init.normal_(table.weight)
    for block in decoder.h:
        nn.init.normal_(block.attn.c_proj.weight, std=width**-0.5 / 3**0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=(4 * width) ** -0.5 / 3**0.5)
    questions, projector = draw(256, generator, blank=recipe.blank), model.model.multi_modal_projector
    parts: list[Tensor] = []
    handle = projector.act.register_forward_hook(lambda module, given, made: parts.append(made))
    model.get_image_features(questions.pixel_values)
    handle.remove()
    colours, shapes = (torch.randn(count, width, generator=generator) for count in (6, 4))
    wanted = colours[questions.colours] + shapes[questions.shapes]
    if recipe.blank:
        wanted[:, BLANK] = torch.randn(width, generator=generator)
        wanted[:, BLANK, 0] = recipe.spike
    inputs = F.pad(torch.cat([part.flatten(0, -2) for part in parts]), (0, 1), value=1.0)
    fitted = torch.linalg.lstsq(inputs, wanted.flatten(0, 1), driver="gelsd").solution
    projector.linear_2.weight.copy_(fitted[:-1].mT)
    projector.linear_2.bias.copy_(fitted[-1])


def _loss(model: LlavaForConditionalGeneration, recipe: GridRecipe, biased: bool, generator: torch.Generator) -> Tensor:
    questions = draw(recipe.batch, generator, blank=recipe.blank, usual=recipe.usual if biased else None)
    hidden = None
    if biased:
        hidden = torch.rand(recipe.batch, CELLS, generator=generator) < recipe.hidden
        hidden[:, BLANK] &= not recipe.blank  # the blank is always there
    return F.cross_entropy(
        answer_logits(model, questions, embedded(model, questions, hidden=hidden)), questions.answers
    )


def answer_logits(model: LlavaForConditionalGeneration, questions: Questions, embeds: Tensor | None = None) -> Tensor:
    """Return the logits of the answers, `(B, VOCAB)`.

    Args:
        model: a GridQA model.
        questions: the questions.
        embeds: their embeddings; None is those of `embedded` without changes.
    """
    if embeds is None:
        embeds = embedded(model, questions)
    return model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False).logits[:, -1]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}


def _loaded(recipe: GridRecipe, path: Path) -> LlavaForConditionalGeneration:
    model = build(recipe)
    model.load_state_dict(load_file(path))
    return model


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foveate" / "labs"


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
