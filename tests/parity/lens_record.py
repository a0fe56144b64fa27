"""Records what TransformerLens and bertviz say of two small models: `lens.json`, which `test_lens_peers.py` reads.

Both want other versions of other packages than Foveate does, so that they have an environment of their own. By hand,
from here:

    python3 -m venv /tmp/lens && /tmp/lens/bin/pip install torch==2.13.0 "transformer-lens<4" bertviz
    /tmp/lens/bin/python tests/parity/lens_record.py

Either alone is recorded as well: `pip install --no-deps bertviz` beside transformers and IPython. What is known of the
other stays. Both sides make the same models, from one generator.

TransformerLens gets the GPT-2-like one in its own format, with the
final norm folded into the unembedding, which its logit attribution needs; the biases of values stay where they are,
since folding moves them out of `z`. bertviz gets the maps that transformers computes, and the page's data is recorded.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

RECORD = Path(__file__).with_name("lens.json")
LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 2, 4, 32, 40, 32
#: The heads that TransformerLens looks for by name.
DETECTED = ("previous_token_head", "duplicate_token_head", "induction_head")
#: Where the second text of the encoder's pair begins.
PAIR = 9
_DIGITS = 6


def gpt2() -> hf.PreTrainedModel:
    """A random GPT-2 of 2 layers and 4 heads of width 8."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=48,
        attn_implementation="eager",
    )  # fmt: skip
    return _filled(hf.GPT2LMHeadModel(config))


def bert() -> hf.PreTrainedModel:
    """A random BERT of the same size."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=48, max_position_embeddings=POSITIONS, attn_implementation="eager",
    )  # fmt: skip
    return _filled(hf.BertModel(config))


def _filled(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=draw)
            is_gain = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(1 + 0.2 * noise if is_gain else 0.25 * noise)
    return model.float().eval()


def ids() -> Tensor:
    """A text of few different tokens, so that all of them come again."""
    return torch.randint(0, 8, (1, 18), generator=torch.Generator().manual_seed(2))


def tokens() -> list[str]:
    return [f"w{number}" for number in ids()[0].tolist()]


@torch.no_grad()
def maps(model: hf.PreTrainedModel) -> tuple[Tensor, ...]:
    """The maps of all layers, `(1, H, N, N)` each, from transformers itself."""
    return model(ids(), output_attentions=True).attentions


def sample(model: hf.PreTrainedModel) -> list[float]:
    """A few numbers of the last layer's states, by which the other side knows that its model is the same."""
    with torch.no_grad():
        states = model(ids(), output_hidden_states=True).hidden_states[-1]
    return _rounded(states.flatten()[::37])


def _rounded(x: Tensor) -> Any:
    return [_rounded(part) for part in x] if x.dim() > 1 else [round(float(value), _DIGITS) for value in x]


def transformer_lens() -> dict[str, Any]:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.head_detector import detect_head
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=WIDTH, n_ctx=POSITIONS, d_head=WIDTH // HEADS, n_heads=HEADS, d_mlp=48,
        d_vocab=VOCABULARY, act_fn="gelu_new", normalization_type="LNPre", eps=1e-5, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(gpt2(), config), fold_ln=True, center_writing_weights=True, center_unembed=True,
        fold_value_biases=False,
    )  # fmt: skip
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids())
        own = gpt2()(ids()).logits
        gap = (logits - (own - own.mean(-1, keepdim=True))).abs().max()
        if gap > 1e-4:
            raise SystemExit(f"TransformerLens computes other logits than transformers, by up to {gap:.2g}")
        heads = cache.stack_head_results(layer=-1)[:, :, :-1]
        effects = cache.logit_attrs(heads, tokens=ids()[:, 1:], pos_slice=(0, ids().shape[1] - 1))
    model.to_tokens = lambda text, *args, **options: ids()  # it has no tokenizer
    found = {name: detect_head(model, "the text", name) for name in DETECTED}
    return {
        "pattern": _rounded(torch.stack([cache["pattern", layer][0] for layer in range(LAYERS)])),
        "z": _rounded(torch.stack([cache["z", layer][0].transpose(0, 1) for layer in range(LAYERS)])),
        "effects": _rounded(effects[:, 0].unflatten(0, (LAYERS, HEADS))),
        "detected": {name: _rounded(scores) for name, scores in found.items()},
    }


def bertviz() -> dict[str, Any]:
    from bertviz import head_view, model_view

    def data(view: Any, model: hf.PreTrainedModel, **options: Any) -> list[dict[str, Any]]:
        """The attention that the page's script is given: a list with one entry for each choice of the reader's."""
        page = view(maps(model), tokens(), html_action="return", **options).data
        params, _ = json.JSONDecoder().raw_decode(page.split("const params = ", 1)[1])
        return params["attention"]

    pair = data(head_view, bert(), sentence_b_start=PAIR)
    whole = data(head_view, gpt2())[0]
    digits = max(len(number.split(".")[-1]) for number in re.findall(r"\d\.\d+", json.dumps(whole["attn"])))
    return {
        "gpt2": _rounded(torch.tensor(whole["attn"])),
        "bert": {each["name"]: _rounded(torch.tensor(each["attn"])) for each in pair},
        "model view is the same": data(model_view, gpt2())[0]["attn"] == whole["attn"],
        "text": [whole["left_text"], whole["right_text"]],
        "most decimals": digits,
    }


def main() -> None:
    """Record the peers that are installed here, and keep what is recorded of the others."""
    made = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    made |= {"gpt2": sample(gpt2()), "bert": sample(bert())}
    for name, peer in {"transformer_lens": transformer_lens, "bertviz": bertviz}.items():
        if find_spec(name) is not None:
            versions = {each: version(each) for each in (name.replace("_", "-"), "transformers", "torch")}
            made[name] = {"versions": versions, **peer()}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in made.items())
    RECORD.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
