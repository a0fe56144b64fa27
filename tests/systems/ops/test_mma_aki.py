"""Modality-mutual attention: its mask by hand, in pretrained models, in decoding, and its claim on counting cells."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask
from transformers import DynamicCache

import foveate
from foveate.core import masks
from foveate.core.errors import OptionError, ShapeError, UnsupportedModel
from foveate.host import apply
from foveate.nn import Block, MultiHeadAttention
from foveate.ops import modality_mutual_mask, modality_mutual_rule
from foveate.steer import ModalityMutual
from tests.conftest import ClaimFixture
from tests.support.host_models import model, tokens
from tests.support.tensors import assert_near, gradients, qkv
from tests.support.vision_models import PICTURE, prompt, vision_model

pytestmark = pytest.mark.filterwarnings("ignore")

BEFORE, AFTER = 3, 6
IMAGE, QUESTION = range(BEFORE, BEFORE + PICTURE), range(BEFORE + PICTURE, BEFORE + PICTURE + 4)
LENGTH = BEFORE + PICTURE + AFTER


# -- the mask ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [[(2, 5)], [(0, 3), (4, 6)], [(6, 6)], []])
@pytest.mark.parametrize("question", [(6, 10), (7, 8), (8, 8)])
def test_image_tokens_see_the_question_and_nothing_else_that_is_later(
    images: list[tuple[int, int]], question: tuple[int, int]
) -> None:
    mask = modality_mutual_mask(12, images, question)
    assert mask.shape == (1, 1, 12, 12)
    for i in range(12):
        for j in range(12):
            of_image = any(start <= i < stop for start, stop in images)
            assert bool(mask[0, 0, i, j]) == (j <= i or (of_image and question[0] <= j < question[1]))
    count = sum(stop - start for start, stop in images) * (question[1] - question[0])
    assert int(mask.sum()) == 12 * 13 // 2 + count


@pytest.mark.parametrize(("images", "question"), [([(1, 4)], None), ([(1, 4)], (5, 5)), ([], (5, 9))])
def test_without_image_or_question_it_is_the_causal_mask(images: Any, question: Any) -> None:
    assert torch.equal(modality_mutual_mask(9, images, question)[0, 0], masks.causal(9, 9))


def test_an_empty_sequence_has_an_empty_mask() -> None:
    assert modality_mutual_mask(0, [], None).shape == (1, 1, 0, 0)


def test_text_before_the_image_needs_no_further_pairs() -> None:
    """The paper's other order: question first."""
    assert torch.equal(modality_mutual_mask(9, [(4, 8)], (1, 4))[0, 0], masks.causal(9, 9))


def test_sequences_differ_and_padding_is_hidden() -> None:
    image, question, pad = (torch.zeros(2, 8, dtype=torch.bool) for _ in range(3))
    image[0, 1:3], image[1, 3:5], question[0, 4:6], question[1, 5:8], pad[1, :3] = True, True, True, True, True
    mask = modality_mutual_mask(8, image, question, pad)
    one = modality_mutual_mask(8, [(1, 3)], (4, 6))
    other = modality_mutual_mask(5, [(0, 2)], (2, 5))
    assert mask.shape == (2, 1, 8, 8)
    assert torch.equal(mask[:1], one)
    assert torch.equal(mask[1:, :, 3:, 3:], other)
    assert not mask[1, ..., :3].any()


@pytest.mark.parametrize("batch", [1, 2])
def test_the_rule_is_the_mask(batch: int) -> None:
    random = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (batch, 10), generator=random)
    rule = modality_mutual_rule(kind == 1, kind == 2)
    made = create_mask(rule, 2, 1, 10, 10, device="cpu")
    assert torch.equal(made, modality_mutual_mask(10, kind == 1, kind == 2).expand(2, -1, -1, -1))


def test_no_image_token_learns_of_the_answer() -> None:
    """Two layers deep: image rows depend on each token of the question, on earlier text, and on no token behind it."""
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, 4).double() for _ in range(2)]
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    mask = modality_mutual_mask(12, [(2, 5)], (6, 9))

    def reached(rows: slice) -> list[bool]:
        out = x
        for layer in layers:
            out = out + layer(out, mask=mask)
        return gradients(out[:, rows], [x])[0][0].any(-1).tolist()

    assert reached(slice(2, 5)) == [True] * 9 + [False] * 3
    assert reached(slice(0, 2)) == [True] * 2 + [False] * 10, "text before the image stays causal"
    assert reached(slice(6, 7)) == [True] * 9 + [False] * 3, "through the image's rows"


@pytest.mark.parametrize("op", ["softmax", "sigmoid_attention"])
def test_any_operator_takes_the_mask(op: str) -> None:
    q, k, v = qkv(9, heads=4, kv_heads=2)
    mask = modality_mutual_mask(9, [(1, 4)], (5, 7))
    out = foveate.attend(q, k, v, op, mask=mask)
    causal = foveate.attend(q, k, v, op, causal=True)
    assert_near(out[:, :, [0, 4, 5, 6, 7, 8]], causal[:, :, [0, 4, 5, 6, 7, 8]], 1e-12)
    assert not torch.allclose(out[:, :, 1:4], causal[:, :, 1:4])


def test_malformed_spans_are_refused() -> None:
    for images, question, says in (
        ([(2, 9)], (3, 4), r"image_spans: \(2, 9\) must be \(start, stop\) inside 0..8"),
        ([(2, 4)], (6, 5), r"question_span: \(6, 5\) must be"),
        ([(2, 4)], (3, 5), "question_span must not overlap image_spans"),
    ):
        with pytest.raises(OptionError, match=says):
            modality_mutual_mask(8, images, question)
    with pytest.raises(ShapeError, match=r"image_spans must be bool \(B, N=8\)"):
        modality_mutual_mask(8, torch.zeros(2, 7, dtype=torch.bool), (3, 5))
    with pytest.raises(ShapeError, match="pad must be bool"):
        modality_mutual_mask(8, [(2, 4)], (4, 5), torch.zeros(2, 8))
    with pytest.raises(ShapeError, match=r"image and question must be bool \(B, N\) alike"):
        modality_mutual_rule(torch.zeros(1, 4).bool(), torch.zeros(1, 5).bool())


# -- in a pretrained model ---------------------------------------------------------------------------------------------


def spans(padding: int = 0) -> dict[str, Tensor]:
    return {"question": torch.tensor(QUESTION) + padding}


def mutual(inputs: dict[str, Any], kind: str = "llava", question: Tensor | None = None, **more: Any) -> Any:
    with apply(vision_model(kind), ModalityMutual()) as run:
        run.spans["question"] = torch.tensor(QUESTION) if question is None else question
        return vision_model(kind)(**inputs, **more)


def by_mask(inputs: dict[str, Tensor], padding: int = 0, kind: str = "llava", length: int = LENGTH) -> Tensor:
    """Logits of the model by itself, which is given the whole mask."""
    shift, n = padding, length + padding
    pad = inputs["attention_mask"] == 0
    pad = F.pad(pad, (0, n - pad.shape[1]))
    image, question = (slice(span[0] + shift, span[-1] + 1 + shift) for span in (IMAGE, QUESTION))
    mask = modality_mutual_mask(n, [(image.start, image.stop)], (question.start, question.stop), pad)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = {**inputs, "attention_mask": bias}
    if padding:
        given["position_ids"] = (~pad).cumsum(1).sub(1).clamp_min(0)
    return vision_model(kind)(**given).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "idefics3", "internvl"])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_model_reads_its_prompt_under_the_mask(kind: str, padding: int) -> None:
    inputs = prompt(kind, before=BEFORE, after=AFTER, padding=padding)
    found = mutual(inputs, kind, spans(padding)["question"]).logits
    expected = by_mask(inputs, padding, kind)
    real = inputs["attention_mask"].bool()
    assert_near(found[real], expected[real], 1e-4)
    plain = vision_model(kind)(**inputs).logits
    first = padding + IMAGE[0]
    assert_near(found[1:, :first], plain[1:, :first], 1e-5)
    assert float((found[:, first:] - plain[:, first:]).abs().max()) > 1e-2


@torch.no_grad()
def test_a_prompt_without_image_or_question_is_read_as_usual() -> None:
    inputs = prompt("llava", before=BEFORE, after=AFTER)
    plain = vision_model("llava")(**inputs).logits
    assert torch.equal(mutual(inputs, question=torch.zeros(0, dtype=torch.long)).logits, plain)
    words = {"input_ids": tokens(2, 9) % 50 + 1}
    expected = vision_model("llava")(**words).logits
    with apply(vision_model("llava"), ModalityMutual()):
        assert torch.equal(vision_model("llava")(**words).logits, expected)
    assert torch.equal(vision_model("llava")(**inputs).logits, plain), "the model is as before"


@torch.no_grad()
def test_decoding_after_the_prompt_is_the_whole_reading() -> None:
    """Eight tokens, one at a time from the cache, and all of them in one call under the mask."""
    inputs = prompt("llava", before=BEFORE, after=AFTER)
    later = tokens(2, 8, seed=4) % 50 + 1
    with apply(vision_model("llava"), ModalityMutual()) as run:
        run.spans["question"] = torch.tensor(QUESTION)
        cache = DynamicCache()
        steps = [vision_model("llava")(**inputs, past_key_values=cache).logits[:, -1:]]
        for t in range(8):
            ids, mask = later[:, t : t + 1], torch.ones(2, LENGTH + t + 1, dtype=torch.long)
            steps.append(vision_model("llava")(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], later], 1)}
    expected = by_mask(whole, length=LENGTH + 8)
    assert_near(torch.cat(steps, 1), expected[:, LENGTH - 1 :], 1e-5)


@torch.no_grad()
def test_only_the_prompt_is_read_under_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    called, attend = [], ModalityMutual.attend
    monkeypatch.setattr(ModalityMutual, "attend", lambda self, site: (called.append(site.phase), attend(self, site))[1])
    with apply(vision_model("llava"), ModalityMutual()) as run:
        run.spans["question"] = torch.tensor(QUESTION)
        vision_model("llava").generate(**prompt("llava", before=BEFORE, after=AFTER), max_new_tokens=4)
    assert called == ["prefill"] * vision_model("llava").config.text_config.num_hidden_layers


def spanned(**inputs: Any) -> Tensor:
    """Logits of a text model whose tokens 6 to 8 stand for an image and whose tokens 10 to 12 ask about it."""
    with torch.no_grad(), apply(model("llama"), ModalityMutual()) as run:
        run.spans["image"], run.spans["question"] = torch.arange(6, 9), torch.arange(10, 13)
        return model("llama")(**inputs).logits


def bias_of(mask: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (torch.zeros(mask.shape) + bias).masked_fill(~mask, torch.finfo(torch.float32).min)


@torch.no_grad()
def test_an_earlier_turn_stays_as_it_was_read() -> None:
    ids, cache = tokens(2, 14), DynamicCache()
    model("llama")(ids[:, :5], past_key_values=cache)
    found = spanned(input_ids=ids[:, 5:], past_key_values=cache)
    mask = modality_mutual_mask(14, [(6, 9)], (10, 13)).expand(2, -1, -1, -1)
    assert_near(found, model("llama")(ids, attention_mask=bias_of(mask)).logits[:, 5:], 1e-5)


@torch.no_grad()
def test_padding_inside_a_span_stays_hidden() -> None:
    ids, real = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    real[0, 11:] = 0
    mask = modality_mutual_mask(14, [(6, 9)], (10, 13), real == 0)
    expected = model("llama")(ids, attention_mask=bias_of(mask)).logits
    found = spanned(input_ids=ids, attention_mask=real)
    assert_near(found[real.bool()], expected[real.bool()], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("question", [(10, 13), (2, 5)])
def test_a_bias_of_the_callers_own_is_kept(question: tuple[int, int]) -> None:
    """Pairs that the method adds get a bias of 0; a question before the image is seen as it was, with its bias."""
    ids, bias = tokens(2, 14), torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    causal = masks.causal(14, 14).expand(2, 1, -1, -1)
    mask = modality_mutual_mask(14, [(6, 9)], question).expand(2, -1, -1, -1)
    expected = model("llama")(ids, attention_mask=bias_of(mask, bias * causal)).logits
    with apply(model("llama"), ModalityMutual()) as run:
        run.spans["image"], run.spans["question"] = torch.arange(6, 9), torch.arange(*question)
        assert_near(model("llama")(ids, attention_mask=bias_of(causal, bias)).logits, expected, 1e-5)


@torch.no_grad()
def test_what_it_generates_is_that_of_whole_readings() -> None:
    inputs = prompt("llava", before=BEFORE, after=AFTER, padding=2)
    with apply(vision_model("llava"), ModalityMutual()) as run:
        run.spans["question"] = spans(2)["question"]
        said = vision_model("llava").generate(**inputs, max_new_tokens=5, do_sample=False)
    for length in range(5):
        seen = {**inputs, "input_ids": said[:, : LENGTH + 2 + length]}
        assert torch.equal(by_mask(seen, 2, length=LENGTH + length)[:, -1].argmax(-1), said[:, LENGTH + 2 + length])


def test_it_is_trained_like_any_model() -> None:
    """Image embeddings get a gradient from what they read of the question, and parameters a finite one."""
    net = copy.deepcopy(vision_model("llava")).train()
    inputs = prompt("llava", before=BEFORE, after=AFTER)
    grads = []
    for question in (torch.tensor(QUESTION), torch.zeros(0, dtype=torch.long)):
        net.zero_grad()
        with apply(net, ModalityMutual()) as run:
            run.spans["question"] = question
            net(**inputs).logits[:, -1].square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert grads[0].isfinite().all()
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) > 0.01


@torch.no_grad()
def test_a_question_in_another_call_is_refused() -> None:
    net, inputs = vision_model("llava"), prompt("llava", before=BEFORE, after=AFTER)
    with apply(net, ModalityMutual()) as run:
        run.spans["question"], cache = torch.tensor(QUESTION), DynamicCache()
        first = {**inputs, "input_ids": inputs["input_ids"][:, : QUESTION[1]]}
        net(**{**first, "attention_mask": torch.ones_like(first["input_ids"])}, past_key_values=cache)
        with pytest.raises(OptionError, match="needs images and question in one call"):
            net(input_ids=inputs["input_ids"][:, QUESTION[1] :], past_key_values=cache)
    with apply(net, ModalityMutual()), pytest.raises(OptionError, match='needs the span "question"'):
        net(**inputs)
    with apply(model("gemma2"), ModalityMutual()) as run:
        run.spans["image"], run.spans["question"] = torch.arange(2), torch.arange(4, 6)
        with pytest.raises(UnsupportedModel, match="soft cap"):
            model("gemma2")(tokens())


# -- the claim ---------------------------------------------------------------------------------------------------------

CELLS, COLOURS, SHAPES, WIDTH = 16, 3, 2, 64


def counting(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw cells `(B, 16, 2)` with a colour and a shape, a colour and a shape to count `(B, 2)`, and the answers."""
    cells, asked = (
        torch.stack([torch.randint(n, shape, generator=random) for n in (COLOURS, SHAPES)], -1)
        for shape in ((count, CELLS), (count,))
    )
    return cells, asked, (cells == asked[:, None]).all(-1).sum(1)


class Counter(nn.Module):
    """16 cells, the two words of a question, and an end where the answer is read; two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.words = (nn.ModuleList(nn.Embedding(n, WIDTH) for n in (COLOURS, SHAPES)) for _ in range(2))
        self.end, self.places = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(0.02 * torch.randn(CELLS + 3, WIDTH))
        self.blocks = nn.ModuleList(Block(MultiHeadAttention(WIDTH, 4)) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, CELLS + 1)

    def forward(self, cells: Tensor, asked: Tensor, mask: Tensor) -> Tensor:
        image = sum(table(cells[..., i]) for i, table in enumerate(self.cells))
        question = torch.stack([table(asked[:, i]) for i, table in enumerate(self.words)], 1)
        x = torch.cat([image, question, self.end.expand(len(cells), 1, -1)], 1) + self.places
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(self.norm(x[:, -1]))


@cache
def accuracy(mutual: bool, seed: int, steps: int) -> float:
    """Train a counter, and return its accuracy on new pictures and questions."""
    mask = modality_mutual_mask(CELLS + 3, [(0, CELLS)], (CELLS, CELLS + 2) if mutual else None)
    torch.manual_seed(seed)
    net, random = Counter(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        cells, asked, answers = counting(64, random)
        optimiser.zero_grad()
        F.cross_entropy(net(cells, asked, mask), answers).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    cells, asked, answers = counting(2000, torch.Generator().manual_seed(1000 + seed))
    with torch.no_grad():
        return float((net(cells, asked, mask).argmax(-1) == answers).double().mean())


def check_claim(claim: ClaimFixture, seeds: list[int], steps: int) -> None:
    ours, causal = (sum(accuracy(mutual, seed, steps) for seed in seeds) / len(seeds) for mutual in (True, False))
    claim(
        f"two layers learn to count cells of a colour and a shape in {steps} steps: accuracy, seeds {seeds}",
        ours=ours, baseline=causal, better="higher", margin=0.03, baseline_name="the causal mask", seed=seeds[0],
    )  # fmt: skip


def test_cells_that_know_the_question_are_counted_better(claim: ClaimFixture) -> None:
    check_claim(claim, [0], 400)


@pytest.mark.slow
def test_cells_that_know_the_question_are_counted_better_over_three_seeds(claim: ClaimFixture) -> None:
    check_claim(claim, [0, 1, 2], 600)
