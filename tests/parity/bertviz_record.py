"""Records what BertViz's neuron view shows of a small BERT: `bertviz.json`, which `test_bertviz.py` reads.

BertViz computes queries and keys with a copy of BERT of its own, of 2019. It needs an environment of its own. By hand,
from here:

    python3 -m venv /tmp/bertviz && /tmp/bertviz/bin/pip install torch 'ipython<9' bertviz setuptools
    /tmp/bertviz/bin/python tests/parity/bertviz_record.py

Both sides have the same weights, from one generator.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = Path(__file__).with_name("bertviz.json")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VOCAB, POSITIONS = 20, 16
SENTENCES = "w3 w7 w4 w9", "w5 w7 w11"


class Words:
    """A tokenizer of words `w3`, whose ids are their numbers."""

    cls_token, sep_token = "[CLS]", "[SEP]"

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [{"[CLS]": 1, "[SEP]": 2}.get(token) or int(token[1:]) for token in tokens]


def weights() -> dict[str, Tensor]:
    """Return the weights of a BERT by their names, which are the same on both sides."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCAB, width),
        "embeddings.position_embeddings.weight": (POSITIONS, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    linear = {"attention.self.query": (width, width), "attention.self.key": (width, width),
              "attention.self.value": (width, width), "attention.output.dense": (width, width),
              "intermediate.dense": (inner, width), "output.dense": (width, inner)}  # fmt: skip
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    draw = torch.Generator().manual_seed(0)
    found = {name: 0.6 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    norms = ["embeddings.LayerNorm"]
    for layer in range(SIZES["num_hidden_layers"]):
        norms += [f"encoder.layer.{layer}.attention.output.LayerNorm", f"encoder.layer.{layer}.output.LayerNorm"]
    for name in norms:
        found |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    return found


def shown() -> dict[str, Any]:
    """Return what BertViz draws: for each pair of sentences its tokens, weights, queries and keys."""
    from bertviz.neuron_view import get_attention
    from bertviz.transformers_neuron_view import BertConfig, BertModel

    config = BertConfig(
        vocab_size_or_config_json_file=VOCAB, max_position_embeddings=POSITIONS, hidden_act="gelu", **SIZES
    )
    config.output_attentions = True
    model = BertModel(config)
    left = model.load_state_dict(weights(), strict=False)
    assert not left.unexpected_keys and not left.missing_keys, left
    with torch.no_grad():
        return get_attention(model.eval(), "bert", Words(), *SENTENCES, include_queries_and_keys=True)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


if __name__ == "__main__":
    record = {"versions": {name: version(name) for name in ("bertviz", "torch")}, "shown": rounded(shown())}
    RECORD.write_text(json.dumps(record, separators=(",", ":")) + "\n")
