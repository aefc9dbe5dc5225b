"""Label-free structured pruning of timm models by Jacobian-based relevance (JBR)."""

from importlib.metadata import version

from jbrprune.budgets.budget import Floors
from jbrprune.checkpoint.checkpoint import load, save
from jbrprune.checkpoint.export import export
from jbrprune.criteria.relevance import PRESETS, Relevance
from jbrprune.criteria.scores import Scores
from jbrprune.criteria.weight_relevance import WeightScores
from jbrprune.data import distributed
from jbrprune.integrations import JBRImportance, to_semi_structured
from jbrprune.prediction.predict import Degradation, degradation, predict
from jbrprune.pruning.api import PruneResult, create, info, prune, score, sparsify, sweep
from jbrprune.report.records import Report
from jbrprune.sparsity.masks import make_permanent

__version__ = version("jbrprune")

__all__ = [
    # the calls
    "prune",
    "sparsify",
    "sweep",
    "create",
    "info",
    "Floors",
    "PruneResult",
    "Report",
    "save",
    "load",
    "export",
    # the criterion
    "score",
    "Relevance",
    "PRESETS",
    "Scores",
    "JBRImportance",
    # what it would cost
    "predict",
    "degradation",
    "Degradation",
    # single weights
    "WeightScores",
    "make_permanent",
    "to_semi_structured",
    # many processes
    "distributed",
]
