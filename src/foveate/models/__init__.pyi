# The public names of foveate.models; written by `make systems` from the catalogue.

from foveate.models.base.decoder import Decoder as Decoder
from foveate.models.base.hf_checkpoint import FoveateConfig as FoveateConfig
from foveate.models.base.hf_checkpoint import FoveateForCausalLM as FoveateForCausalLM
from foveate.models.base.hf_checkpoint import FoveatePreTrainedModel as FoveatePreTrainedModel
from foveate.models.base.image_encoder import ImageEncoder as ImageEncoder
from foveate.models.base.spec import Mixer as Mixer
from foveate.models.base.spec import Spec as Spec
from foveate.models.language.based import Based as Based
from foveate.models.language.based import GatedConv as GatedConv
from foveate.models.language.cls_attention_classifier import ClsAttentionClassifier as ClsAttentionClassifier
from foveate.models.language.cls_attention_classifier import ClsHeads as ClsHeads
from foveate.models.language.transnormer import GatedLightning as GatedLightning
from foveate.models.language.transnormer import LRPE as LRPE
from foveate.models.language.transnormer import SimpleRMSNorm as SimpleRMSNorm
from foveate.models.language.transnormer import TransNormerLLM as TransNormerLLM
from foveate.models.vision.dependency_vit import DependencyBlock as DependencyBlock
from foveate.models.vision.dependency_vit import DependencyViT as DependencyViT
from foveate.models.vision.l2vit import L2ViT as L2ViT
from foveate.models.vision.mambaout import GatedCNNBlock as GatedCNNBlock
from foveate.models.vision.mambaout import MambaOut as MambaOut
from foveate.models.vision.mambaout import block_flops as block_flops
from foveate.models.vision.mambaout import is_long_sequence as is_long_sequence
from foveate.models.vision.mambaout import with_token_mixer as with_token_mixer

__all__ = [
    "Based",
    "ClsAttentionClassifier",
    "ClsHeads",
    "Decoder",
    "DependencyBlock",
    "DependencyViT",
    "FoveateConfig",
    "FoveateForCausalLM",
    "FoveatePreTrainedModel",
    "GatedCNNBlock",
    "GatedConv",
    "GatedLightning",
    "ImageEncoder",
    "L2ViT",
    "LRPE",
    "MambaOut",
    "Mixer",
    "SimpleRMSNorm",
    "Spec",
    "TransNormerLLM",
    "block_flops",
    "is_long_sequence",
    "with_token_mixer",
]
