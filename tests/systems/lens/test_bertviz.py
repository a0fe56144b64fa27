"""Views of captured attention: neurons sum to the model's weights, and lines are its weights and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartModel, T5Config, T5Model

import foveate
from foveate.core.errors import FoveateError
from foveate.host import apply
from foveate.lens import AttentionView, ablate, attention_view, top_heads
from foveate.lens.views.edges import Edge
from foveate.lens.views.stack import Products, Stack
from tests.conftest import ClaimFixture
from tests.lens.models import eager_maps, image, text, tiny
from tests.support.constructed import VOCAB, induction_lm
from tests.support.lab import lab, lab_ids
from tests.support.tensors import assert_near

MARKUP = "<script>alert(1)</script>&amp;"
SMALL = dict(vocab_size=50, d_model=32, pad_token_id=0, decoder_start_token_id=1)


def bart() -> Any:
    torch.manual_seed(0)
    return BartModel(BartConfig(
        **SMALL, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.4, eos_token_id=None, forced_eos_token_id=None,
    )).eval()  # fmt: skip


def t5() -> Any:
    torch.manual_seed(0)
    model = T5Model(T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=2, num_heads=4, eos_token_id=None)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(0.5 if parameter.dim() > 1 else 1.0)
    return model


# -- neurons -----------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "a random decoder with grouped heads": lambda: (tiny("llama"), text()),
    "a window": lambda: (tiny("mistral"), text()),
    "a window and a soft cap": lambda: (tiny("gemma2"), text()),
    "an encoder": lambda: (tiny("bert"), text()),
    "a ViT": lambda: (tiny("vit"), image()),
    "a trained decoder": lambda: (lab()[0], {"input_ids": lab_ids("The cat sat.")}),
}


@pytest.mark.parametrize("case", CASES)
def test_neurons_sum_to_the_models_weights(case: str) -> None:
    """Against the model's own eager weights, which come from another code path."""
    model, inputs = CASES[case]()
    view = attention_view(model, inputs)
    for layer, maps in enumerate(eager_maps(model, inputs)):
        n = maps.shape[-1]
        for head in range(maps.shape[1]):
            assert_near(view.stack().map(layer, head), maps[0, head], 1e-5, f"layer {layer}, head {head}")
            for query in (0, n // 2, n - 1):
                found = view.neuron(layer, head, query)
                row = torch.zeros(n)
                row[found.keys] = found.prob
                assert_near(row, maps[0, head, query], 1e-5, f"layer {layer}, head {head}, query {query}")
                assert_near(found.qk, found.q * found.k, 1e-6)
                assert float(found.prob.sum()) == pytest.approx(1, abs=1e-5)


def test_a_neuron_table_by_hand() -> None:
    q = torch.tensor([[[1.0, 2.0], [0.5, -1.0]]])
    k = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    scores = torch.tensor([[3.0, 3.0], [1.5, -0.5]]) * 2**-0.5
    causal = scores.masked_fill(torch.tensor([[False, True], [False, False]]), float("-inf")).softmax(-1)
    view = AttentionView([causal[None]], ["a", "b"], q=[q], k=[k])
    first, second = view.neuron(0, 0, 0), view.neuron(0, 0, 1)
    assert first.keys.tolist() == [0] and first.prob.tolist() == [1.0] and first.tokens == ["a"]
    assert second.qk.tolist() == [[1.5, 0.0], [0.5, -1.0]]
    assert_near(second.logit, torch.tensor([1.5, -0.5]) * 2**-0.5, 1e-6)
    assert_near(second.prob, causal[1], 1e-6)
    assert second.strongest(1, 1) == [(1, -1.0)] and second.strongest(0) == [(0, 1.5), (1, 0.0)]
    assert second.text == "b" and (second.layer, second.head, second.query) == (0, 0, 1)
    batched = AttentionView([causal[None, None]], ["a", "b"], q=[q[None]], k=[k[None]])
    assert_near(batched.neuron(0, 0, 1).prob, causal[1], 1e-6)


def test_neurons_with_a_bias_and_a_sink() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 6, 4, generator=draw)
    bias, sinks = torch.randn(2, 6, 6, generator=draw), torch.randn(2, generator=draw)
    logits = (q @ k.mT) * 0.3 + bias
    whole = torch.cat([logits, sinks[:, None, None].expand(2, 6, 1)], -1).softmax(-1)[..., :-1]
    words = list("abcdef")
    products = Products(q, k, 0.3, bias, None, sinks)
    stack = Stack({(0, head): whole[head] for head in range(2)}, words, words, range(6), products={0: products})
    view = AttentionView.of({"": stack})
    for head in range(2):
        assert_near(view.neuron(0, head, 3).prob, whole[head, 3], 1e-6)


def test_a_map_that_is_no_softmax_of_its_products_is_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 5, 8, generator=draw)
    maps = (q @ k.mT * 8**-0.5).softmax(-1)
    assert_near(AttentionView([maps], list("abcde"), q=[q], k=[k]).neuron(0, 0, 2).prob, maps[0, 2], 1e-6)
    with pytest.raises(FoveateError, match="not the softmax of its products"):
        AttentionView([maps], list("abcde"), q=[q], k=[k], scale=1.0).neuron(0, 0, 2)


def decaying(n: int = 60, d: int = 8, order: Tensor | None = None) -> AttentionView:
    """A causal head whose neuron 0 carries position, so that near keys weigh more; `order` shuffles its tokens.

    The keys' other neurons have the same numbers in other orders, so that only their order tells neuron 0 apart.
    """
    draw = torch.Generator().manual_seed(0)
    places = torch.stack([torch.arange(n), *(torch.randperm(n, generator=draw) for _ in range(d - 1))], 1)
    q, k = 1 + 0.1 * torch.randn(n, d, generator=draw), places / 12
    if order is not None:
        q, k = q[order], k[order]
    scores = (q @ k.T * d**-0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    return AttentionView([scores.softmax(-1)[None]], [str(at) for at in range(n)], q=[q[None]], k=[k[None]])


def test_a_planted_distance_neuron_is_found(claim: ClaimFixture) -> None:
    found = decaying().neuron_distance(0, 0)
    assert int(found.abs().argmax()) == 0 and float(found[0]) < -0.4
    draw = torch.Generator().manual_seed(1)
    shuffled = torch.stack([decaying(order=torch.randperm(60, generator=draw)).neuron_distance(0, 0) for _ in range(8)])
    assert float((shuffled.abs().argmax(1) == 0).double().mean()) < 0.4
    claim(
        "size of the correlation between distance and the product of the neuron that carries position",
        ours=float(found[0].abs()), baseline=float(shuffled[:, 0].abs().mean()), better="higher", margin=0.25,
        baseline_name="the same head over shuffled tokens", seed=0,
    )  # fmt: skip


def test_neuron_measures_match_a_loop() -> None:
    view = decaying(12)
    stack = view.stack()
    q, k = stack.products[0].q[0].double(), stack.products[0].k[0].double()
    pairs = [(i, j) for i in range(12) for j in range(i + 1)]
    products = torch.stack([q[i] * k[j] for i, j in pairs])
    far = torch.tensor([float(i - j) for i, j in pairs], dtype=torch.float64)
    expected = torch.stack([torch.corrcoef(torch.stack([column, far]))[0, 1] for column in products.T])
    assert_near(view.neuron_distance(0, 0), expected.float(), 1e-5)
    assert_near(view.neuron_strength(0, 0), products.abs().mean(0).float(), 1e-5)
    steady = AttentionView([torch.ones(1, 2, 2) / 2], ["a", "b"], q=[torch.ones(1, 2, 1)], k=[torch.ones(1, 2, 1)])
    assert steady.neuron_distance(0, 0).tolist() == [0.0]


# -- lines -------------------------------------------------------------------------------------------------------------


def test_lines_are_the_weights() -> None:
    view = attention_view(tiny("llama"), text())
    maps = eager_maps(tiny("llama"), text())
    heads, threshold = (1, 3), 0.05
    lines = view.head(1, heads).edges(threshold)
    expected = {
        (i, j, h) for h in heads for i in range(24) for j in range(24) if float(maps[1][0, h, i, j]) > threshold
    }  # fmt: skip
    assert {(line.query, line.key, line.head) for line in lines} == expected and len(lines) == len(expected)
    for line in lines:
        assert line.weight == pytest.approx(float(maps[1][0, line.head, line.query, line.key]), abs=1e-5)
    assert all(line.key <= line.query for line in view.head(0).edges()), "a line that breaks causality"
    assert {line.query for line in view.head(1).edges(query=7)} == {7}
    assert_near(view.head(1, heads).summed(), maps[1][0, list(heads)].sum(0).clamp_max(1.0), 1e-5)
    assert float(view.head(1).summed().max()) == 1.0


def test_a_cell_of_the_model_view_is_the_head_view_of_that_head() -> None:
    view = attention_view(tiny("bert"), text())
    whole = view.head(1).edges(0.03)
    drawing = view.model().svg(threshold=0.03)
    for head in range(4):
        cell = view.model().cell(1, head)
        assert cell.edges(0.03) == view.head(1, [head]).edges(0.03) == [line for line in whole if line.head == head]
        body = re.search(rf'<g [^>]*data-layer="1" data-head="{head}">(.*?)</g>', drawing)
        assert body is not None
        shown = [float(opacity) for opacity in re.findall(r'stroke-opacity="([\d.]+)" stroke-width', body[1])]
        assert shown == pytest.approx([line.weight for line in cell.edges(0.03)], abs=1e-4)
    assert drawing.count("<g ") == 8


def test_segments() -> None:
    inputs = text() | {"token_type_ids": (torch.arange(24) >= 10).long().expand(2, 24)}
    view = attention_view(tiny("bert"), inputs)
    assert view.stack().boundary == 10
    head = view.head(0, [2])
    every = head.edges()
    parts = {name: head.edges(segments=name) for name in ("A->A", "A->B", "B->A", "B->B")}  # type: ignore[arg-type]
    assert all(line.query < 10 <= line.key for line in parts["A->B"]) and parts["A->B"]
    assert all(line.key < 10 <= line.query for line in parts["B->A"]) and parts["B->A"]
    assert sorted(line for some in parts.values() for line in some) == sorted(every)
    assert [len(some) for some in parts.values()] == [100, 140, 140, 196]
    given = attention_view(tiny("bert"), text(), boundary=4)
    assert given.stack().boundary == 4
    mixed = text() | {"token_type_ids": (torch.arange(24) == 10).long().expand(2, 24)}
    assert attention_view(tiny("bert"), mixed).stack().boundary is None, "a second segment has to reach the end"


def test_the_head_drawing() -> None:
    view = attention_view(tiny("llama"), text(), tokens=[MARKUP, "\n\x1b", *[f"w{at}" for at in range(22)]])
    head = view.head(0, [0, 1])
    drawing = head.svg(threshold=0.02)
    shown = [float(opacity) for opacity in re.findall(r'stroke-opacity="([\d.]+)"', drawing)]
    assert shown == pytest.approx([line.weight for line in head.edges(0.02)], abs=1e-4)
    assert "<script" not in drawing and "&lt;script&gt;" in drawing and "\x1b" not in drawing and "␛" in drawing
    assert len(set(re.findall(r'stroke="(hsl[^"]+)"', drawing))) == 2, "a colour for each head"
    ends = re.findall(r'<line x1="170" y1="([\d.]+)" x2="330" y2="([\d.]+)"', drawing)
    first = head.edges(0.02)[0]
    assert [float(each) for each in ends[0]] == [18 * (first.query + 0.5) + 4, 18 * (first.key + 0.5) + 4]
    many = AttentionView([torch.full((1, 300, 300), 0.9)], ["x"] * 300)
    with pytest.raises(FoveateError, match="raise threshold="):
        many.head(0).svg()


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bart, t5])
def test_an_encoder_decoder_has_three_parts(make: Callable[[], Any]) -> None:
    model, inputs = make(), text("right")
    inputs |= {"decoder_input_ids": torch.randint(2, 50, (2, 9), generator=torch.Generator().manual_seed(2))}
    view = attention_view(model, inputs, item=0)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    assert list(view.stacks) == ["encoder", "decoder", "cross"]
    for part, maps in (
        ("encoder", out.encoder_attentions), ("decoder", out.decoder_attentions), ("cross", out.cross_attentions),
    ):  # fmt: skip
        stack = view.stack(part)
        rows, columns = ({"encoder": 17, "decoder": 9, "cross": 9}[part], {"decoder": 9}.get(part, 17))
        assert stack.layers == [0, 1] and (len(stack.queries), len(stack.keys)) == (rows, columns)
        for layer in range(2):
            for head in range(4):
                assert_near(stack.map(layer, head), maps[layer][0, head, :rows, :columns], 1e-5, part)
                found = view.neuron(layer, head, 4, part)
                assert_near(found.prob, maps[layer][0, head, 4, found.keys], 1e-5, part)
    assert {line.key for line in view.head(0, part="cross").edges()} == set(range(17))
    with pytest.raises(FoveateError, match='unknown part "decodr"; did you mean "decoder"'):
        view.head(0, part="decodr")
    with pytest.raises(FoveateError, match="same text"):
        view.neuron_distance(0, 0, "cross")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_is_left_out(kind: str, side: str) -> None:
    model, inputs = tiny(kind), text(side)
    view = attention_view(model, inputs, tokens=[f"w{at}" for at in range(24)])
    real = inputs["attention_mask"][0].bool()
    assert view.stack().keys == [f"w{at}" for at in range(24) if real[at]]
    for layer, maps in enumerate(eager_maps(model, inputs)):
        for head in range(4):
            assert_near(view.stack().map(layer, head), maps[0, head][real][:, real], 1e-5)
    assert view.neuron(1, 0, 12).prob.sum() == pytest.approx(1, abs=1e-5)
    other = attention_view(model, inputs, item=1)
    assert len(other.stack().keys) == 24
    assert_near(other.stack().map(0, 0), eager_maps(model, inputs)[0][1, 0], 1e-5)


def test_a_vit_shows_patches() -> None:
    view = attention_view(tiny("vit"), image(), item=1)
    stack = view.stack()
    assert stack.grid == (4, 4) and stack.keys[:3] == ["[CLS]", "0,0", "0,1"] and stack.keys[-1] == "3,3"
    assert stack.image is not None and stack.image.shape == (3, 32, 32)
    assert float(stack.image.min()) == 0.0 and float(stack.image.max()) == 1.0
    assert_near(stack.map(1, 2), eager_maps(tiny("vit"), image())[1][1, 2], 1e-5)


def test_generated_tokens_are_read_and_known() -> None:
    model, tokenizer = lab()
    ids = lab_ids("The cat")
    view = attention_view(model, ids, tokenizer=tokenizer, generate=4)
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    stack = view.stack()
    assert stack.prompt == ids.shape[1] and len(stack.keys) == whole.shape[1] > ids.shape[1]
    assert "".join(stack.keys).startswith("<bos>The cat")
    assert_near(stack.map(2, 1), eager_maps(model, {"input_ids": whole})[2][0, 1], 1e-4)
    pair = bart()
    assert not pair.can_generate()
    with pytest.raises(FoveateError, match="generates no text"):
        attention_view(pair, text(), generate=2)


def test_outputs_of_other_methods_are_what_is_shown() -> None:
    model = induction_lm(matching=[(1, 0)])
    half = 1 + torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(0))[:10]
    ids = torch.cat([torch.zeros(1).long(), half, half])[None]
    with apply(model, ablate([(0, 0)])):
        view = attention_view(model, ids)
    assert (view.stack().map(1, 0) - attention_view(model, ids).stack().map(1, 0)).abs().max() > 0.1


def test_a_look_shows_its_kept_maps() -> None:
    model, inputs = tiny("llama"), text()
    maps = eager_maps(model, inputs)
    seen = foveate.look(model, inputs, keep_maps={(1, 2): [3, -1], (0, 1): slice(5, 7)})
    view = seen.view([f"w{at}" for at in range(24)], item=1)
    stack = view.stack()
    assert stack.places == [3, 5, 6, 23] and stack.queries == ["w3", "w5", "w6", "w23"] and len(stack.keys) == 24
    assert_near(stack.map(1, 2)[[0, 3]], maps[1][1, 2, [3, 23]], 1e-5)
    assert_near(stack.map(0, 1)[[1, 2]], maps[0][1, 1, 5:7], 1e-5)
    assert float(stack.map(0, 1)[[0, 3]].abs().max()) == 0.0
    assert view.head(1).edges() == view.head(1, [2]).edges()
    assert 'srcdoc="' in seen._repr_html_() and "<table" in seen._repr_html_()
    assert "srcdoc" not in foveate.look(model, inputs)._repr_html_()
    with pytest.raises(FoveateError, match="keep_maps must name a head"):
        foveate.look(model, inputs).view()
    with pytest.raises(FoveateError, match=r"item=2 must be in 0..1"):
        seen.view(item=2)


# -- the paper's use cases ---------------------------------------------------------------------------------------------


def test_a_pattern_search_finds_the_planted_head(claim: ClaimFixture) -> None:
    """All heads of the constructed decoder look at the token before, but for the one that looks for matches."""
    model = induction_lm(matching=[(1, 0)])
    half = 1 + torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(0))[:16]
    ids = torch.cat([torch.zeros(1).long(), half, half])[None]
    view = attention_view(model, ids)
    after = torch.zeros(33, 33, dtype=torch.bool)
    after[torch.arange(17, 33), torch.arange(2, 18)] = True  # the token behind the last place of the same token
    scores = view.pattern_scores(after)
    assert top_heads(scores, 1) == [(1, 0)]
    previous = torch.ones(33, 33, dtype=torch.bool).tril(-1) & ~torch.ones(33, 33, dtype=torch.bool).tril(-2)
    looks_back = view.pattern_scores(previous)
    assert float(looks_back[1, 0]) < 0.2 < float(looks_back[0].min())
    assert_near(looks_back[0, 1], view.stack().map(0, 1).diagonal(-1).mean(), 1e-6)
    others = scores.clone()
    others[1, 0] = 0.0
    claim(
        "attention that the head planted for induction puts on what stood behind the same token",
        ours=float(scores[1, 0]), baseline=float(others.max()), better="higher", margin=0.5,
        baseline_name="the best other head", seed=0,
    )  # fmt: skip


def test_attention_of_one_token_in_two_texts() -> None:
    model, ids = tiny("bert"), text()["input_ids"][:1]
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 50
    first, second = attention_view(model, ids), attention_view(model, other)
    found = second.pair_weights(9, 5) - first.pair_weights(9, 5)
    expected = [
        (b[0, :, 9, 5] - a[0, :, 9, 5])
        for a, b in zip(eager_maps(model, {"input_ids": ids}), eager_maps(model, {"input_ids": other}), strict=True)
    ]
    assert_near(found, torch.stack(expected), 1e-5)
    assert float(found.abs().max()) > 0.005
    some = AttentionView({(1, 2): torch.eye(3)}, list("abc")).pair_weights(0, 0)
    assert some.shape == (2, 3) and float(some[1, 2]) == 1.0 and int(some.isnan().sum()) == 5


# -- bad input ---------------------------------------------------------------------------------------------------------

EYE = torch.eye(3)[None]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AttentionView([], list("abc")), "at least one head"),
        (lambda: AttentionView([torch.eye(3)], list("abc")), "(H, T, S) or (1, H, T, S)"),
        (lambda: AttentionView([EYE[None].expand(2, 1, 3, 3)], list("abc")), "of one text"),
        (lambda: AttentionView([EYE], list("ab")), "must be (2, 2)"),
        (lambda: AttentionView([EYE], list("abc"), boundary=3), "boundary=3 must be in 1..2"),
        (lambda: AttentionView([EYE], list("abc"), queries=list("xyz"), boundary=1), "same text"),
        (lambda: AttentionView([EYE], list("abc"), q=[EYE]), "q and k must come together"),
        (lambda: AttentionView([EYE], list("abc"), q=[EYE], k=[EYE[..., :2]]), "q must be (H, N, D)"),
        (lambda: AttentionView([EYE], list("abc"), places=[0, 1, 3]), "0..2"),
        (lambda: AttentionView([EYE], list("abc")).head(1), "layer=1 must be one of the layers with a map: 0"),
        (lambda: AttentionView([EYE], list("abc")).head(0, [1]), "head=1 must be one of layer 0's heads"),
        (lambda: AttentionView([EYE], list("abc")).head(0, []), "at least one head"),
        (lambda: AttentionView([EYE], list("abc")).head(0).edges(2.0), "threshold="),
        (lambda: AttentionView([EYE], list("abc")).head(0).edges(query=3), "query=3 must be in 0..2"),
        (lambda: AttentionView([EYE], list("abc")).head(0).edges(segments="A->B"), "needs a second segment"),
        (lambda: AttentionView([EYE], list("abc")).head(0).edges(segments="A"), "segments='A' must be"),  # type: ignore[arg-type]
        (lambda: AttentionView([EYE], list("abc")).neuron(0, 0, 0), "neurons need q and k"),
        (lambda: AttentionView([EYE], list("abc"), q=[EYE], k=[EYE]).neuron(0, 0, 3), "query=3 must be in 0..2"),
        (lambda: AttentionView([EYE], list("abc")).pattern_scores(torch.eye(2).bool()), "pattern must be bool (3, 3)"),
        (lambda: AttentionView([EYE], list("abc")).pattern_scores(torch.zeros(3, 3).bool()), "at least one pair"),
        (lambda: AttentionView([EYE], list("abc")).pair_weights(0, 3), "key=3 must be in 0..2"),
        (lambda: AttentionView.of({}), "at least one stack"),
        (lambda: decaying(6).neuron(0, 0, 2).strongest(4), "key=4 must be a key that query 2 sees: [0, 1, 2]"),
        (lambda: attention_view(tiny("llama"), text(), item=2), "item=2 must be in 0..1"),
        (lambda: attention_view(tiny("llama"), text(), layers=[7]), "layers=[7] must be some"),
        (lambda: attention_view(tiny("llama"), text(), tokens=["a"]), "tokens must hold 24 texts"),
        (lambda: attention_view(tiny("llama"), {}), "inputs must hold input_ids"),
        (lambda: attention_view("llama", text()), "PreTrainedModel"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_maps_larger_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.lens.views.capture.MOST", 4 * 4 * 24 * 24)
    assert attention_view(tiny("llama"), text(), layers=[1]).stack().layers == [1]
    with pytest.raises(FoveateError, match=r"give layers=, or foveate.look\(..., keep_maps=...\)"):
        attention_view(tiny("llama"), text())


def test_an_edge_is_a_plain_tuple() -> None:
    assert AttentionView([EYE], list("abc")).head(0).edges() == [(0, 0, 0, 1.0), (1, 1, 0, 1.0), (2, 2, 0, 1.0)]
    assert Edge(0, 1, 2, 0.5).weight == 0.5
