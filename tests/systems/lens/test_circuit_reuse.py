"""Path patching against hooks by hand and against circuits that were planted; overlap; the repair of a selector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import foveate
from foveate.core.errors import FoveateError, OptionError
from foveate.lens import SetAttention, circuit_overlap, direct_effects, head_outputs, path_patch
from foveate.lens.circuits.circuit_reuse import PathEffects
from foveate.lens.circuits.circuit_tasks import coloured_object_prompts, indirect_object_prompts
from tests.conftest import ClaimFixture
from tests.lens.models import tiny
from tests.support import host_models
from tests.support.constructed import KEYS, induction_lm, recall
from tests.support.selecting import COPY, PREVIOUS_HEAD, SELECT_A, SELECT_B, TASK_A, TASK_B, select, selecting_lm

N = 10


def texts(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    clean, corrupt, answers = torch.randint(2, 50, (3, 4, N), generator=torch.Generator().manual_seed(seed))
    return clean, corrupt, answers[:, :2]


def gap(lm: Any, ids: Tensor, answers: Tensor) -> float:
    with torch.no_grad():
        both = lm(ids).logits[:, -1].double().gather(1, answers)
    return float((both[:, 0] - both[:, 1]).mean())


def test_with_one_layer_the_effect_is_the_difference_of_direct_effects() -> None:
    lm = tiny("llama", num_hidden_layers=1)
    lm.model.layers[0].mlp.down_proj.weight.data.zero_()
    lm.lm_head.weight.data.mul_(300.0)
    lm.model.norm = nn.Identity()  # a norm would make the last residual's effect no sum
    clean, corrupt, answers = texts()
    corrupt[:, -1] = clean[:, -1]
    found = path_patch(lm, clean, corrupt, answers)
    heads = [direct_effects(lm, ids, answers).heads for ids in (clean, corrupt)]
    direct = (heads[1] - heads[0]).double()
    expected = (direct[..., 0] - direct[..., 1]).mean(0)
    assert expected.abs().min() > 1e-3
    assert torch.allclose(found.changes, expected, atol=1e-4)
    assert torch.allclose(found.effects.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
@pytest.mark.parametrize("receivers", [None, [(2, 1)]])
def test_equal_texts_have_no_effects(name: str, receivers: Any) -> None:
    clean, _, answers = texts()
    for component in ("q", "k", "v", "z") if receivers else ("q",):
        found = path_patch(
            host_models.model(name), clean, clean, answers, receivers=receivers, component=component, positions="all"
        )
        assert found.changes.abs().max() < 1e-5
        assert not found.effects.any()


Change = Callable[[Tensor], Tensor]


def run_by_hand(
    lm: LlamaForCausalLM, ids: Tensor, answers: Tensor, heads: dict[int, Change], made: dict[nn.Module, Change]
) -> float:
    """The logit difference with changed inputs of output projections `(B, N, H, D)` and changed outputs of modules."""
    with ExitStack() as stack:
        for layer, change in heads.items():
            handle = lm.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
                lambda _, given, change=change: (change(given[0].unflatten(-1, (4, -1)).clone()).flatten(2),)
            )
            stack.callback(handle.remove)
        for module, change in made.items():
            handle = module.register_forward_hook(lambda _, given, out, change=change: change(out.clone()))
            stack.callback(handle.remove)
        return gap(lm, ids, answers)


def put(rows: slice | int, columns: Any, value: Tensor) -> Change:
    def change(x: Tensor) -> Tensor:
        x[:, rows, columns] = value[:, rows, columns]
        return x

    return change


def path_by_hand(
    lm: LlamaForCausalLM, sender: tuple[int, int], clean: Tensor, corrupt: Tensor, answers: Tensor, rows: slice,
    component: str, columns: slice, mlps: bool,
) -> float:  # fmt: skip
    """The change along the path from a sender into channels of a projection of the last layer."""
    layers = lm.model.layers
    outputs, altered = ({at: z.transpose(1, 2) for at, z in head_outputs(lm, ids).items()} for ids in (clean, corrupt))
    sent = {at: z.clone() for at, z in outputs.items()}
    sent[sender[0]][:, :, sender[1]] = altered[sender[0]][:, :, sender[1]]
    seen: dict[nn.Module, Tensor] = {}
    frozen: dict[nn.Module, Change] = {}
    if mlps:
        run_by_hand(
            lm, clean, answers, {}, {layer.mlp: lambda x, m=layer.mlp: seen.setdefault(m, x) for layer in layers}
        )
        frozen = {layer.mlp: put(rows, slice(None), seen[layer.mlp]) for layer in layers}
    patches = {at: put(rows, slice(None), z) for at, z in sent.items()}
    if component == "final":
        return run_by_hand(lm, clean, answers, patches, frozen) - gap(lm, clean, answers)
    receiver, arrived = getattr(layers[2].self_attn, f"{component}_proj"), []
    run_by_hand(lm, clean, answers, patches, frozen | {receiver: lambda x: arrived.append(x) or x})
    changed = run_by_hand(lm, clean, answers, {}, {receiver: put(rows, columns, arrived[0])})
    return changed - gap(lm, clean, answers)


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("positions", ["one", "all"])
@pytest.mark.parametrize("component", ["q", "k", "v", "final"])
def test_effects_are_those_of_hooks_by_hand(component: str, positions: Any, mlps: bool) -> None:
    """Query heads 2 and 3 share the second key/value head. A last layer's query matters at the last token alone."""
    lm, (clean, corrupt, answers) = host_models.model("llama"), texts()
    at = -1 if component in ("final", "q") else -3
    rows = slice(None) if positions == "all" else slice(at, at + 1 or None)
    columns = slice(16, 32) if component == "q" else slice(8, 16)
    receivers = None if component == "final" else [(2, 2), (2, 3)]
    found = path_patch(
        lm, clean, corrupt, answers, receivers=receivers, component="q" if receivers is None else component,
        position=at, positions=positions, freeze_mlps=mlps,
    )  # fmt: skip
    for sender in ((0, 1), (1, 2)):
        expected = path_by_hand(lm, sender, clean, corrupt, answers, rows, component, columns, mlps)
        assert abs(expected) > 1e-4
        assert float(found.changes[sender]) == pytest.approx(expected, rel=1e-2, abs=2e-5)
    if receivers is not None:
        assert not found.changes[2].any()
    assert found.clean == pytest.approx(gap(lm, clean, answers), abs=1e-5)
    assert found.corrupt == pytest.approx(gap(lm, corrupt, answers), abs=1e-5)


def test_outputs_as_receivers_are_the_same_as_all_their_inputs() -> None:
    """Into a head's output at the last token the paths are those into its queries, keys and values together."""
    lm, (clean, corrupt, answers) = host_models.model("llama"), texts()
    found = path_patch(lm, clean, corrupt, answers, receivers=[(1, 0)], component="z")
    altered, outputs = head_outputs(lm, corrupt), head_outputs(lm, clean)
    sent = outputs[0].transpose(1, 2).clone()
    sent[:, -1, 3] = altered[0].transpose(1, 2)[:, -1, 3]
    z: list[Tensor] = []
    run_by_hand(
        lm, clean, answers, {0: put(slice(-1, None), slice(None), sent), 1: lambda x: z.append(x.clone()) or x}, {}
    )
    expected = run_by_hand(lm, clean, answers, {1: put(slice(-1, None), 0, z[0])}, {}) - gap(lm, clean, answers)
    assert abs(expected) > 1e-4
    assert float(found.changes[0, 3]) == pytest.approx(expected, abs=2e-5)


def swapped_keys(ids: Tensor) -> Tensor:
    """The same prompts with the keys in front of the two values exchanged, and the question as it is."""
    other = ids.clone()
    for row, words in enumerate(ids.tolist()):
        places = [at for at, word in enumerate(words[:-1]) if word in KEYS][:2]
        other[row, places] = ids[row, places[::-1]]
    return other


def test_the_keys_of_an_induction_head_lead_to_the_head_of_previous_tokens(claim: ClaimFixture) -> None:
    lm = induction_lm()
    ids, first = recall(12, length=32, distractors=1)
    clean, corrupt = ids, swapped_keys(ids)
    with torch.no_grad():
        answers = torch.cat([first, lm(corrupt).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert (answers[:, 0] != answers[:, 1]).all()
    given = lm, clean, corrupt, answers
    found = path_patch(*given, receivers=[(1, 0)], component="k", positions="all").effects
    other = path_patch(*given, receivers=[(1, 2)], component="k", positions="all").effects
    others = found.clone()
    others[0, 0] = 0.0
    assert found[0, 0] > 0.9
    assert others.abs().max() < 0.05
    claim(
        "effect of the previous-token head on the keys of the induction head", ours=found[0, 0],
        baseline=other.abs().max(), better="higher", margin=0.8, baseline_name="receivers without a task", seed=0,
    )  # fmt: skip


def planted_circuit(lm: LlamaForCausalLM, task: int) -> set[tuple[int, int]]:
    """Work back from the logits: copying heads, what their queries read, and what their keys read."""
    clean, corrupt, answers = select(task, 16)

    def strong(effects: PathEffects) -> set[tuple[int, int]]:
        return {(int(layer), int(head)) for layer, head in (effects.effects.abs() > 0.1).nonzero()}

    copying = strong(path_patch(lm, clean, corrupt, answers))
    selecting = strong(path_patch(lm, clean, corrupt, answers, receivers=copying, component="q"))
    keys = path_patch(lm, clean, swapped_keys(clean), answers, receivers=copying, component="k", positions="all")
    return copying | selecting | strong(keys)


def test_two_tasks_share_what_was_planted() -> None:
    lm = selecting_lm()
    one, other = planted_circuit(lm, TASK_A), planted_circuit(lm, TASK_B)
    assert one == {PREVIOUS_HEAD, SELECT_A, COPY}
    assert other == {PREVIOUS_HEAD, SELECT_B, COPY}
    assert circuit_overlap(one, other) == 0.5
    assert circuit_overlap(one, other, of="first") == pytest.approx(2 / 3)


def accuracy(lm: LlamaForCausalLM, ids: Tensor, answers: Tensor) -> float:
    with torch.no_grad():
        return float((lm(ids).logits[:, -1].argmax(-1) == answers[:, 0]).double().mean())


def test_set_attention_repairs_a_selector(claim: ClaimFixture) -> None:
    lm = selecting_lm(selects_b=False)
    weights = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    ids, _, answers = select(TASK_B, 64)
    before = accuracy(lm, ids, answers)
    with foveate.apply(lm, SetAttention([SELECT_B], torch.tensor([ids.shape[1] - 3]))):
        after = accuracy(lm, ids, answers)
    with foveate.apply(lm, SetAttention([(0, 3)], torch.tensor([ids.shape[1] - 3]))):
        elsewhere = accuracy(lm, ids, answers)
    assert before < 0.6 and after > 0.9 and elsewhere == before
    assert all(torch.equal(parameter, weights[name]) for name, parameter in lm.named_parameters())
    claim(
        "accuracy with the selecting head's attention set", ours=after, baseline=before, better="higher", margin=0.3,
        baseline_name="no intervention", seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_set_attention_is_the_given_mean_of_values(name: str) -> None:
    lm, ids = host_models.model(name), host_models.tokens()
    keys, weights = torch.tensor([[3, 7], [4, 9]]), torch.tensor([0.25, 0.75])
    plain = head_outputs(lm, ids)
    found: dict[str, Tensor] = {}

    class Values(foveate.host.Method):
        def read(self, site: Any, out: Tensor) -> None:
            if site.layer == 1:
                found.update(v=site.v[:, 2 // site.groups], out=out)

    with torch.no_grad(), foveate.apply(lm, SetAttention([(1, 2)], keys, weights.expand(2, 2)), Values()):
        lm(ids)
    for row in range(2):
        expected = weights @ found["v"][row, keys[row]]
        assert torch.allclose(found["out"][row, 2, -1], expected, atol=1e-5)
    assert torch.allclose(found["out"][:, 2, :-1], plain[1][:, 2, :-1], atol=1e-5)
    assert torch.allclose(found["out"][:, :2], plain[1][:, :2], atol=1e-5)


def test_set_attention_is_for_the_prompt_alone() -> None:
    lm, ids = host_models.model("llama"), host_models.tokens(1)
    with torch.no_grad(), foveate.apply(lm, SetAttention([(0, 0)], torch.tensor([2]))):
        first = lm(ids, use_cache=True)
        second = lm(ids[:, :1], past_key_values=first.past_key_values).logits
    with torch.no_grad(), foveate.apply(lm, SetAttention([(0, 0)], torch.tensor([2]), query=13)):
        whole = lm(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert torch.allclose(second, whole, atol=1e-4)


def test_overlap_by_role_and_the_largest_effects() -> None:
    one = {"mover": [(3, 1), (4, 0)], "inhibition": [(2, 2)]}
    other = {"mover": [(3, 1), (2, 2)], "inhibition": [(2, 1)]}
    assert circuit_overlap(one, other) == pytest.approx(1 / 5)
    assert circuit_overlap(one["mover"], other["mover"]) == pytest.approx(1 / 3)
    found = PathEffects(torch.tensor([[0.1, -3.0], [2.0, 0.0]]), 4.0, 2.0)
    assert torch.allclose(found.effects, torch.tensor([[-0.05, 1.5], [-1.0, 0.0]]))
    assert found.top() == [(0, 1)]
    assert found.top(0.5) == [(0, 1), (1, 0)]
    with pytest.raises(OptionError, match="no unit"):
        _ = PathEffects(torch.ones(1, 1), 2.0, 2.0).effects


def test_prompts_of_the_tasks() -> None:
    for prompt in indirect_object_prompts(20, seed=3):
        names = prompt.clean[5:].split(" went")[0].split(" and ")
        assert {prompt.answer.strip(), prompt.distractor.strip()} == set(names)
        assert prompt.clean.count(prompt.answer.strip()) == 1 and prompt.clean.count(prompt.distractor.strip()) == 2
        assert prompt.corrupt.count(prompt.answer.strip()) == 2
    for prompt in coloured_object_prompts(20, seed=3):
        for text, answer in ((prompt.clean, prompt.answer), (prompt.corrupt, prompt.distractor)):
            scene, asked = text.rsplit("there is ", 1)[1].split(". What color is the ")
            thing = asked.split("?")[0]
            assert f"{answer.strip().lower()} {thing}" in scene and answer.strip() != answer.strip().lower()
            solved = text.split("\n\n")[0]
            assert f"{solved.rsplit(' ', 1)[1].lower()} {solved.split('color is the ')[1].split('?')[0]}" in solved
        assert prompt.answer != prompt.distractor
    assert coloured_object_prompts(3, seed=1) == coloured_object_prompts(3, seed=1)


def bad_calls() -> Iterable[tuple[str, Callable[[], Any]]]:
    lm, (clean, corrupt, answers) = host_models.model("llama"), texts()
    yield "position", lambda: path_patch(lm, clean, corrupt, answers, position=2)
    yield "component", lambda: path_patch(lm, clean, corrupt, answers, component="o")  # type: ignore[arg-type]
    yield "receivers", lambda: path_patch(lm, clean, corrupt, answers, receivers=[])
    yield "head 9.0 must be in", lambda: path_patch(lm, clean, corrupt, answers, receivers=[(9, 0)])
    yield "clean and corrupt", lambda: path_patch(lm, clean, corrupt[:, 1:], answers)
    yield "answers", lambda: path_patch(lm, clean, corrupt, answers[:, :1])
    yield "weights", lambda: SetAttention([(0, 0)], torch.tensor([1, 2]), torch.tensor([0.2, 0.2]))
    yield "keys", lambda: SetAttention([(0, 0)], torch.tensor([1.0]))
    yield "at least one head", lambda: circuit_overlap([], [])
    yield "both", lambda: circuit_overlap([(0, 0)], {"mover": [(0, 0)]})


def test_what_does_not_fit_is_refused() -> None:
    for message, call in bad_calls():
        with pytest.raises(FoveateError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    lm, late = host_models.model("llama"), SetAttention([(0, 0)], torch.tensor([99]))
    with pytest.raises(OptionError, match="keys must be positions"), foveate.apply(lm, late):
        lm(host_models.tokens())
