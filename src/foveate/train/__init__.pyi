# The public names of foveate.train; written by `make systems` from the catalogue.

from foveate.train.base.initialiser import Initialiser as Initialiser
from foveate.train.base.objective import Loss as Loss
from foveate.train.base.objective import Objective as Objective
from foveate.train.distillation.attention_mimicry import attention_entropy as attention_entropy
from foveate.train.distillation.attention_mimicry import distill as distill
from foveate.train.distillation.attention_mimicry import distillation_loss as distillation_loss
from foveate.train.distillation.attention_mimicry import monotonicity as monotonicity
from foveate.train.init.mimetic_init import Projections as Projections
from foveate.train.init.mimetic_init import mimetic_init as mimetic_init
from foveate.train.init.mimetic_init import mimetic_products as mimetic_products
from foveate.train.init.mimetic_init import projections as projections
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
from foveate.train.objectives.latent_alignment import kl as kl
from foveate.train.objectives.latent_alignment import latent_attention_loss as latent_attention_loss
from foveate.train.objectives.latent_alignment import marginal_decode as marginal_decode
from foveate.train.objectives.latent_alignment import relaxed as relaxed
from foveate.train.objectives.supervised_contrastive import pretrain_embedder as pretrain_embedder
from foveate.train.objectives.supervised_contrastive import supcon_loss as supcon_loss
from foveate.train.objectives.variational_attention import InferenceNetwork as InferenceNetwork
from foveate.train.objectives.variational_attention import VariationalAttention as VariationalAttention

__all__ = [
    "History",
    "InferenceNetwork",
    "Initialiser",
    "Job",
    "Loss",
    "Objective",
    "Outcome",
    "Projections",
    "Schedule",
    "Spread",
    "StateSpaceLayer",
    "Training",
    "Trainings",
    "VariationalAttention",
    "attention_entropy",
    "distill",
    "distillation_loss",
    "evaluate",
    "fit",
    "fit_levels",
    "kl",
    "latent_attention_loss",
    "load",
    "marginal_decode",
    "mimetic_init",
    "mimetic_init_linear_attention",
    "mimetic_init_ssm",
    "mimetic_products",
    "monotonicity",
    "pretrain_embedder",
    "projections",
    "relaxed",
    "save",
    "spec",
    "state_spaces",
    "supcon_loss",
    "training_task",
]
