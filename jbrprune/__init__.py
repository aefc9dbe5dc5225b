"""Label-free structured pruning of timm models by Jacobian-based relevance (JBR)."""

from importlib.metadata import version

from jbrprune.checkpoint import load
from jbrprune.pruning import PruneResult, prune, sweep
from jbrprune.report import Report
from jbrprune.scores import Scores
from jbrprune.scoring import score
from jbrprune.structured import JBRImportance

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
]
