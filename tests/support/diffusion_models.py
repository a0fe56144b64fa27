"""Tiny random diffusion models of diffusers, their inputs, and a tokenizer with its text encoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="pip install foveate[diffusion]")

#: Width and length of an encoded prompt.
CONTEXT, LENGTH = 20, 12

_TRANSFORMER = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, patch_size=2)

_MAKE = {
    "unet": lambda: diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT, attention_head_dim=2, norm_num_groups=4,
    ),
    "dit": lambda: diffusers.DiTTransformer2DModel(
        **_TRANSFORMER, in_channels=4, num_embeds_ada_norm=10, norm_num_groups=4
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        **_TRANSFORMER, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=CONTEXT,
        norm_num_groups=4, use_additional_conditions=False,
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        **{**_TRANSFORMER, "patch_size": 1}, in_channels=4, out_channels=4, caption_channels=CONTEXT,
        cross_attention_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=8,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        **_TRANSFORMER, in_channels=4, out_channels=4, joint_attention_dim=CONTEXT, caption_projection_dim=16,
        pooled_projection_dim=6, pos_embed_max_size=8,
    ),
}  # fmt: skip

#: Every model here, and those with cross-attention to the prompt.
MODELS = tuple(_MAKE)
CROSSING = ("unet", "pixart", "sana")


@cache
def model(name: str) -> nn.Module:
    """One model a name, in evaluation mode. Tests share it, so that a test which leaves a trace breaks the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _MAKE[name]().eval()
        for parameter in made.parameters():  # releases begin with zeros in the last layers, which would hide a change
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return made


def inputs(name: str, batch: int = 2, seed: int = 0, masked: bool = False) -> dict[str, Any]:
    """Inputs of a model. `masked` hides the ends of the prompts, where the model takes such a mask."""
    draw = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 4, 8, 8, generator=draw)
    text = torch.randn(batch, LENGTH, CONTEXT, generator=draw)
    time = torch.full((batch,), 3)
    if name == "dit":
        return {"hidden_states": sample, "timestep": time, "class_labels": torch.arange(batch)}
    given = {"sample" if name == "unet" else "hidden_states": sample, "timestep": time, "encoder_hidden_states": text}
    if name == "sd3":
        given["pooled_projections"] = torch.randn(batch, 6, generator=draw)
    if masked:
        given["encoder_attention_mask"] = torch.arange(LENGTH) < LENGTH - 5 + torch.arange(batch)[:, None] % 3
    return given


def call(name: str, **options: Any) -> Tensor:
    """One forward pass."""
    return model(name)(**inputs(name, **options), return_dict=False)[0]


def pipeline() -> Any:
    """A whole Stable Diffusion of these sizes."""
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = vae, text_encoder(), words(), model("unet"), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    made = diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@cache
def words() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of words, and of pieces for "cubes" and "balls", with a token before and one behind the text."""
    known = "<pad> <s> </s> <unk> a red blue green cube ball ##s and on the left , .".split()
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=LENGTH,
    )  # fmt: skip


@cache
def text_encoder() -> hf.CLIPTextModel:
    """A random encoder whose last states are as wide as the models' context."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = hf.CLIPTextConfig(
            vocab_size=len(words()), hidden_size=CONTEXT, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return hf.CLIPTextModel(config).eval()
