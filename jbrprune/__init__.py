"""Label-free structured pruning of timm models by Jacobian-based relevance (JBR)."""

from importlib.metadata import version

from jbrprune.core import distributed
from jbrprune.criterion.parameters import make_permanent
from jbrprune.criterion.scores import Scores
from jbrprune.criterion.weights import WeightScores
from jbrprune.degradation import Degradation, degradation
from jbrprune.files.checkpoint import load
from jbrprune.prediction import predict
from jbrprune.pruning import PruneResult, prune, sweep
from jbrprune.reporting.report import Report
from jbrprune.scoring import score
from jbrprune.sparse.semi_structured import to_semi_structured
from jbrprune.sparse.unstructured import JBRUnstructured, jbr_global_unstructured, jbr_unstructured
from jbrprune.structure.structured import JBRImportance

__version__ = version("jbrprune")

__all__ = [
    # the one call
    "prune",
    "sweep",
    "PruneResult",
    "Report",
    "load",
    # the criterion
    "score",
    "Scores",
    "JBRImportance",
    # what it would cost
    "predict",
    "degradation",
    "Degradation",
    # single weights
    "WeightScores",
    "JBRUnstructured",
    "jbr_unstructured",
    "jbr_global_unstructured",
    "make_permanent",
    "to_semi_structured",
    # many processes
    "distributed",
]
