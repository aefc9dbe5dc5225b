"""Label-free structured pruning of timm models by Jacobian-based relevance (JBR)."""

from importlib.metadata import version

from jbrprune.checkpoint import load
from jbrprune.degradation import Degradation, degradation
from jbrprune.parameters import make_permanent
from jbrprune.prediction import predict
from jbrprune.pruning import PruneResult, prune, sweep
from jbrprune.report import Report
from jbrprune.scores import Scores
from jbrprune.scoring import score
from jbrprune.semi_structured import to_semi_structured
from jbrprune.structured import JBRImportance
from jbrprune.unstructured import JBRUnstructured, jbr_global_unstructured, jbr_unstructured
from jbrprune.weights import WeightScores

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
]
