# The public names of foveate.models; written by `make systems` from the catalogue.

from foveate.models.audio.ecapa_tdnn import ECAPATDNN as ECAPATDNN
from foveate.models.base.decoder import Decoder as Decoder
from foveate.models.base.hf_checkpoint import FoveateConfig as FoveateConfig
from foveate.models.base.hf_checkpoint import FoveateForCausalLM as FoveateForCausalLM
from foveate.models.base.hf_checkpoint import FoveatePreTrainedModel as FoveatePreTrainedModel
from foveate.models.base.image_encoder import ImageEncoder as ImageEncoder
from foveate.models.base.network import Network as Network
from foveate.models.base.network import Size as Size
from foveate.models.base.spec import Mixer as Mixer
from foveate.models.base.spec import Spec as Spec
from foveate.models.graph.generation_graph import GenerationGraph as GenerationGraph
from foveate.models.graph.generation_graph import Split as Split
from foveate.models.graph.generation_graph import generation_embeddings as generation_embeddings
from foveate.models.graph.generation_graph import split_nodes as split_nodes
from foveate.models.graph.hallucination_gat import HallucinationGAT as HallucinationGAT
from foveate.models.graph.ordinal_levels import LevelScores as LevelScores
from foveate.models.graph.ordinal_levels import level_scores as level_scores
from foveate.models.graph.ordinal_levels import ordinal_bits as ordinal_bits
from foveate.models.graph.ordinal_levels import ordinal_levels as ordinal_levels
from foveate.models.language.based import Based as Based
from foveate.models.language.based import GatedConv as GatedConv
from foveate.models.language.bilstm_attention_classifier import BiLSTMAttentionClassifier as BiLSTMAttentionClassifier
from foveate.models.language.bilstm_attention_classifier import TextRead as TextRead
from foveate.models.language.cls_attention_classifier import ClsAttentionClassifier as ClsAttentionClassifier
from foveate.models.language.cls_attention_classifier import ClsHeads as ClsHeads
from foveate.models.language.transnormer import GatedLightning as GatedLightning
from foveate.models.language.transnormer import LRPE as LRPE
from foveate.models.language.transnormer import SimpleRMSNorm as SimpleRMSNorm
from foveate.models.language.transnormer import TransNormerLLM as TransNormerLLM
from foveate.models.multimodal.mac import MAC as MAC
from foveate.models.multimodal.mac import Reasoned as Reasoned
from foveate.models.recommendation.autoint import AutoInt as AutoInt
from foveate.models.recommendation.fields import FieldEmbedding as FieldEmbedding
from foveate.models.recommendation.fields import TabularField as TabularField
from foveate.models.vision.biformer import BiFormer as BiFormer
from foveate.models.vision.catanet import CATANet as CATANet
from foveate.models.vision.catanet import ConvMLP as ConvMLP
from foveate.models.vision.catanet import ConvMLPBlock as ConvMLPBlock
from foveate.models.vision.convit import ConViT as ConViT
from foveate.models.vision.crossformer import CrossFormer as CrossFormer
from foveate.models.vision.dependency_vit import DependencyBlock as DependencyBlock
from foveate.models.vision.dependency_vit import DependencyViT as DependencyViT
from foveate.models.vision.dffreq import DFFreqDetector as DFFreqDetector
from foveate.models.vision.l2vit import L2ViT as L2ViT
from foveate.models.vision.maformer import MAFormer as MAFormer
from foveate.models.vision.mambaout import GatedCNNBlock as GatedCNNBlock
from foveate.models.vision.mambaout import MambaOut as MambaOut
from foveate.models.vision.mambaout import block_flops as block_flops
from foveate.models.vision.mambaout import is_long_sequence as is_long_sequence
from foveate.models.vision.mambaout import with_token_mixer as with_token_mixer
from foveate.models.vision.residual_attention import ResidualAttentionNet as ResidualAttentionNet
from foveate.models.vision.twins import TwinsPCPVT as TwinsPCPVT
from foveate.models.vision.twins import TwinsSVT as TwinsSVT

__all__ = [
    "AutoInt",
    "Based",
    "BiFormer",
    "BiLSTMAttentionClassifier",
    "CATANet",
    "ClsAttentionClassifier",
    "ClsHeads",
    "ConViT",
    "ConvMLP",
    "ConvMLPBlock",
    "CrossFormer",
    "DFFreqDetector",
    "Decoder",
    "DependencyBlock",
    "DependencyViT",
    "ECAPATDNN",
    "FieldEmbedding",
    "FoveateConfig",
    "FoveateForCausalLM",
    "FoveatePreTrainedModel",
    "GatedCNNBlock",
    "GatedConv",
    "GatedLightning",
    "GenerationGraph",
    "HallucinationGAT",
    "ImageEncoder",
    "L2ViT",
    "LRPE",
    "LevelScores",
    "MAC",
    "MAFormer",
    "MambaOut",
    "Mixer",
    "Network",
    "Reasoned",
    "ResidualAttentionNet",
    "SimpleRMSNorm",
    "Size",
    "Spec",
    "Split",
    "TabularField",
    "TextRead",
    "TransNormerLLM",
    "TwinsPCPVT",
    "TwinsSVT",
    "block_flops",
    "generation_embeddings",
    "is_long_sequence",
    "level_scores",
    "ordinal_bits",
    "ordinal_levels",
    "split_nodes",
    "with_token_mixer",
]
