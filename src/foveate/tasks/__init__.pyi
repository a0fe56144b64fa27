# The public names of foveate.tasks; written by `make systems` from the catalogue.

from foveate.tasks.base.scores import SCORES as SCORES
from foveate.tasks.base.task import Example as Example
from foveate.tasks.base.task import Task as Task
from foveate.tasks.base.training_task import TrainingTask as TrainingTask
from foveate.tasks.files.prompts import Prompts as Prompts
from foveate.tasks.parts.token_prompts import TokenPrompts as TokenPrompts
from foveate.tasks.registry import TASKS as TASKS
from foveate.tasks.registry import named as named
from foveate.tasks.text.continuation import Continuation as Continuation
from foveate.tasks.text.counting import Counting as Counting
from foveate.tasks.text.needle import Needle as Needle
from foveate.tasks.text.passkeys import Passkeys as Passkeys
from foveate.tasks.text.retrieval import Retrieval as Retrieval
from foveate.tasks.text.ruler import Ruler as Ruler
from foveate.tasks.text.tracing import Tracing as Tracing
from foveate.tasks.training.copying import Copying as Copying
from foveate.tasks.training.digits import Digits as Digits
from foveate.tasks.training.language import Language as Language
from foveate.tasks.training.mqar import MQAR as MQAR
from foveate.tasks.training.planar import convex_hull as convex_hull
from foveate.tasks.training.planar import planar_batch as planar_batch
from foveate.tasks.training.planar import shortest_tour as shortest_tour
from foveate.tasks.training.planar import tour_length as tour_length

__all__ = [
    "Continuation",
    "Copying",
    "Counting",
    "Digits",
    "Example",
    "Language",
    "MQAR",
    "Needle",
    "Passkeys",
    "Prompts",
    "Retrieval",
    "Ruler",
    "SCORES",
    "TASKS",
    "Task",
    "TokenPrompts",
    "Tracing",
    "TrainingTask",
    "convex_hull",
    "named",
    "planar_batch",
    "shortest_tour",
    "tour_length",
]
