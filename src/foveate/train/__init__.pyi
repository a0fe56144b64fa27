# The public names of foveate.train; written by `make systems` from the catalogue.

from foveate.train.base.initialiser import Initialiser as Initialiser
from foveate.train.base.objective import Loss as Loss
from foveate.train.base.objective import Objective as Objective
from foveate.train.distillation.attention_mimicry import AttentionMimicry as AttentionMimicry
from foveate.train.distillation.attention_mimicry import attention_entropy as attention_entropy
from foveate.train.distillation.attention_mimicry import distill as distill
from foveate.train.distillation.attention_mimicry import distillation_loss as distillation_loss
from foveate.train.distillation.attention_mimicry import monotonicity as monotonicity
from foveate.train.distillation.sparsifiner_loss import SparsifinerReading as SparsifinerReading
from foveate.train.distillation.sparsifiner_loss import recorded_maps as recorded_maps
from foveate.train.distillation.sparsifiner_loss import sparsifiner_loss as sparsifiner_loss
from foveate.train.init.mimetic_init import MimeticInit as MimeticInit
from foveate.train.init.mimetic_init import Projections as Projections
from foveate.train.init.mimetic_init import mimetic_init as mimetic_init
from foveate.train.init.mimetic_init import mimetic_products as mimetic_products
from foveate.train.init.mimetic_init import projections as projections
from foveate.train.init.mimetic_init_ssm import MimeticInitSSM as MimeticInitSSM
from foveate.train.init.mimetic_init_ssm import StateSpaceLayer as StateSpaceLayer
from foveate.train.init.mimetic_init_ssm import mimetic_init_linear_attention as mimetic_init_linear_attention
from foveate.train.init.mimetic_init_ssm import mimetic_init_ssm as mimetic_init_ssm
from foveate.train.init.mimetic_init_ssm import state_spaces as state_spaces
from foveate.train.loop.checkpoint import load as load
from foveate.train.loop.checkpoint import save as save
from foveate.train.loop.job import Job as Job
from foveate.train.loop.job import Outcome as Outcome
from foveate.train.loop.levels import fit_levels as fit_levels
from foveate.train.loop.loop import History as History
from foveate.train.loop.loop import Schedule as Schedule
from foveate.train.loop.loop import Training as Training
from foveate.train.loop.loop import evaluate as evaluate
from foveate.train.loop.loop import fit as fit
from foveate.train.loop.network import spec as spec
from foveate.train.loop.network import training_task as training_task
from foveate.train.loop.seeds import Spread as Spread
from foveate.train.loop.seeds import Trainings as Trainings
from foveate.train.loop.subsampled_attention import SubsampledAttention as SubsampledAttention
from foveate.train.loop.subsampled_attention import self_ensemble as self_ensemble
from foveate.train.loop.trainers import fit_objective as fit_objective
from foveate.train.loop.trainers import lightning_module as lightning_module
from foveate.train.loop.trainers import objective_trainer as objective_trainer
from foveate.train.objectives.aam_softmax import AAMSoftmax as AAMSoftmax
from foveate.train.objectives.attention_at import AttentionAT as AttentionAT
from foveate.train.objectives.attention_at import along_differences as along_differences
from foveate.train.objectives.attention_at import gradient_correlation as gradient_correlation
from foveate.train.objectives.attention_at import token_differences as token_differences
from foveate.train.objectives.cutmix import CutMix as CutMix
from foveate.train.objectives.cutmix import Mixed as Mixed
from foveate.train.objectives.cutmix import cut_box as cut_box
from foveate.train.objectives.cutmix import cutmix as cutmix
from foveate.train.objectives.cutmix import cutmix_loss as cutmix_loss
from foveate.train.objectives.hard_attention import HardAttentionLoss as HardAttentionLoss
from foveate.train.objectives.latent_alignment import kl as kl
from foveate.train.objectives.latent_alignment import latent_attention_loss as latent_attention_loss
from foveate.train.objectives.latent_alignment import marginal_decode as marginal_decode
from foveate.train.objectives.latent_alignment import relaxed as relaxed
from foveate.train.objectives.score_bias import HostedScores as HostedScores
from foveate.train.objectives.score_bias import TakesScoreBias as TakesScoreBias
from foveate.train.objectives.score_bias import takes_score_bias as takes_score_bias
from foveate.train.objectives.supervised_contrastive import SupervisedContrastive as SupervisedContrastive
from foveate.train.objectives.supervised_contrastive import pretrain_embedder as pretrain_embedder
from foveate.train.objectives.supervised_contrastive import supcon_loss as supcon_loss
from foveate.train.objectives.variational_attention import InferenceNetwork as InferenceNetwork
from foveate.train.objectives.variational_attention import VariationalAttention as VariationalAttention
from foveate.train.objectives.variational_attention import VariationalObjective as VariationalObjective

__all__ = [
    "AAMSoftmax",
    "AttentionAT",
    "AttentionMimicry",
    "CutMix",
    "HardAttentionLoss",
    "History",
    "HostedScores",
    "InferenceNetwork",
    "Initialiser",
    "Job",
    "Loss",
    "MimeticInit",
    "MimeticInitSSM",
    "Mixed",
    "Objective",
    "Outcome",
    "Projections",
    "Schedule",
    "SparsifinerReading",
    "Spread",
    "StateSpaceLayer",
    "SubsampledAttention",
    "SupervisedContrastive",
    "TakesScoreBias",
    "Training",
    "Trainings",
    "VariationalAttention",
    "VariationalObjective",
    "along_differences",
    "attention_entropy",
    "cut_box",
    "cutmix",
    "cutmix_loss",
    "distill",
    "distillation_loss",
    "evaluate",
    "fit",
    "fit_levels",
    "fit_objective",
    "gradient_correlation",
    "kl",
    "latent_attention_loss",
    "lightning_module",
    "load",
    "marginal_decode",
    "mimetic_init",
    "mimetic_init_linear_attention",
    "mimetic_init_ssm",
    "mimetic_products",
    "monotonicity",
    "objective_trainer",
    "pretrain_embedder",
    "projections",
    "recorded_maps",
    "relaxed",
    "save",
    "self_ensemble",
    "sparsifiner_loss",
    "spec",
    "state_spaces",
    "supcon_loss",
    "takes_score_bias",
    "token_differences",
    "training_task",
]
