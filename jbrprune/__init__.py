
from importlib.metadata import version

from jbrprune.checkpoint import load
from jbrprune.pruning import PruneResult, prune
from jbrprune.report import Report
from jbrprune.scores import Scores
from jbrprune.scoring import score

__version__ = version("jbrprune")

__all__ = [
    # the one call
    "prune",
    "PruneResult",
    "Report",
    "load",
    # the criterion
    "score",
    "Scores",
]
