# The public names of foveate.tasks; written by `make systems` from the catalogue.

from foveate.tasks.base.scores import SCORES as SCORES
from foveate.tasks.base.task import Example as Example
from foveate.tasks.base.task import Task as Task
from foveate.tasks.base.token_task import TokenTask as TokenTask
from foveate.tasks.base.tokens import CHARACTERS as CHARACTERS
from foveate.tasks.base.tokens import Tokens as Tokens
from foveate.tasks.base.training_task import TrainingTask as TrainingTask
from foveate.tasks.files.benchmarks.nolima import NoLiMa as NoLiMa
from foveate.tasks.files.prompts import Prompts as Prompts
from foveate.tasks.library.completion import Completion as Completion
from foveate.tasks.library.loss import LongText as LongText
from foveate.tasks.library.questions import LibraryQuestions as LibraryQuestions
from foveate.tasks.library.ranking import Ranking as Ranking
from foveate.tasks.library.traces import Traces as Traces
from foveate.tasks.parts.token_prompts import TokenPrompts as TokenPrompts
from foveate.tasks.registry import TASKS as TASKS
from foveate.tasks.registry import named as named
from foveate.tasks.rules.registry import RULES as RULES
from foveate.tasks.text.continuation import Continuation as Continuation
from foveate.tasks.text.counting import Counting as Counting
from foveate.tasks.text.needle import Needle as Needle
from foveate.tasks.text.passkeys import Passkeys as Passkeys
from foveate.tasks.text.retrieval import Retrieval as Retrieval
from foveate.tasks.text.ruler import Ruler as Ruler
from foveate.tasks.text.tracing import Tracing as Tracing
from foveate.tasks.thirteen.documents import Documents as Documents
from foveate.tasks.thirteen.needles import Needles as Needles
from foveate.tasks.thirteen.tasks import Thirteen as Thirteen
from foveate.tasks.thirteen.variables import Variables as Variables
from foveate.tasks.thirteen.words import CommonWords as CommonWords
from foveate.tasks.thirteen.words import FrequentWords as FrequentWords
from foveate.tasks.training.copying import Copying as Copying
from foveate.tasks.training.digits import Digits as Digits
from foveate.tasks.training.language import Language as Language
from foveate.tasks.training.mqar import MQAR as MQAR
from foveate.tasks.training.planar import convex_hull as convex_hull
from foveate.tasks.training.planar import planar_batch as planar_batch
from foveate.tasks.training.planar import shortest_tour as shortest_tour
from foveate.tasks.training.planar import tour_length as tour_length

__all__ = [
    "CHARACTERS",
    "CommonWords",
    "Completion",
    "Continuation",
    "Copying",
    "Counting",
    "Digits",
    "Documents",
    "Example",
    "FrequentWords",
    "Language",
    "LibraryQuestions",
    "LongText",
    "MQAR",
    "Needle",
    "Needles",
    "NoLiMa",
    "Passkeys",
    "Prompts",
    "RULES",
    "Ranking",
    "Retrieval",
    "Ruler",
    "SCORES",
    "TASKS",
    "Task",
    "Thirteen",
    "TokenPrompts",
    "TokenTask",
    "Tokens",
    "Traces",
    "Tracing",
    "TrainingTask",
    "Variables",
    "convex_hull",
    "named",
    "planar_batch",
    "shortest_tour",
    "tour_length",
]
