"""The catalogue's examples run unchanged, with only public names, and make something other than NaN."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import foveate
from foveate.core.catalog import systems
from foveate.ops import GTA
from tests.lens.models import text, tiny
from tests.support.clip import clip_vision
from tests.support.constructed import induction_lm, recall
from tests.support.lab import lab

EXAMPLES = {row.key: row.example for row in systems() if row.example}
B, N, HEADS, HEAD_DIM = 2, 12, 8, 64


def tensors() -> dict[str, Any]:
    q, k, v = torch.randn(3, B, HEADS, N, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    return {"q": q, "k": k, "v": v, "B": B, "N": N, "heads": HEADS, "head_dim": HEAD_DIM}


def of_a_model() -> dict[str, Any]:
    ids = text()["input_ids"]
    return {"model": tiny("llama").eval(), "ids": ids[:, :8], "input_ids": ids}


RECALL = recall(1, length=64, answer=3, away=8)
DOCUMENTS = {"documents": ["Bees live in hives.", "Ants dig."], "question": "Who digs?"}
#: The names in an example besides `torch` and `foveate`.
GIVEN: dict[str, dict[str, Any]] = {
    "aaren": {"query": torch.randn(1, HEADS, 1, HEAD_DIM)},
    "act_calibration": {"examples": [text()["input_ids"][:1]], "score": lambda model, example: 0.0},
    "acmil": {"bag": torch.randn(1, N, 384), "label": torch.tensor([1])},
    "attention_sorting": DOCUMENTS,
    "attn_rank": DOCUMENTS,
    "efficient_probing": {"tokens": torch.randn(B, N, 768)},
    "retrieval_heads": {"model": induction_lm(), "ids": RECALL[0], "needle": RECALL[1][0]},
    "show_attend_tell": {"annotations": torch.randn(2, 9, 512), "captions": torch.tensor([[-1, 3, 5], [-1, 2, 2]])},
    "second_order_lens": {"clip": clip_vision(), "images": torch.randn(3, 3, 24, 24), "texts": torch.randn(6, 20)},
    "gta": {
        "camera_to_world": GTA.example_input("poses", B, HEADS, N).float(),
        "places": GTA.example_input("coords", B, HEADS, N).float(),
    },
}


@pytest.mark.parametrize("key", EXAMPLES)
def test_it_runs(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"torch": torch, "foveate": foveate, **tensors(), **of_a_model(), **GIVEN.get(key, {})}
    if "tokenizer" in EXAMPLES[key]:
        names["model"], names["tokenizer"] = lab()
    if "pipe" in EXAMPLES[key]:
        from tests.support.diffusion_models import pipeline

        names["pipe"] = pipeline()
    given = set(names)
    tree = ast.parse(EXAMPLES[key])
    if isinstance(last := tree.body[-1], ast.Expr):  # what a prompt would show
        tree.body[-1] = ast.copy_location(ast.Assign([ast.Name("shown", ast.Store())], last.value), last)
    exec(compile(ast.fix_missing_locations(tree), key, "exec"), names)
    made = {name: value for name, value in names.items() if name not in given and name != "__builtins__"}
    assert made or capsys.readouterr().out or "with " in EXAMPLES[key], "the example shows nothing"
    for name, value in made.items():
        for x in pytree.tree_leaves(value):
            assert not (isinstance(x, torch.Tensor) and x.numel() and x.is_floating_point() and x.isnan().all()), name
