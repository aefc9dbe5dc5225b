"""Test prediction variance: what a perturbation of the weights does to the outputs, to first order and really."""

from jbrprune.tpv.agreement import Ratio, train_test_ratio
from jbrprune.tpv.covariances import Covariance, Diagonal, FiniteRank, Isotropic, Quantization
from jbrprune.tpv.estimate import Estimate
from jbrprune.tpv.estimators import empirical, trace_form
from jbrprune.tpv.gradients import Gradients
from jbrprune.tpv.labels import LabelNoise, Retraining
from jbrprune.tpv.removal import Removal
from jbrprune.tpv.sgd import SGDNoise, Trajectory
from jbrprune.tpv.validity import TPVWarning, Validity, taylor_error

__all__ = [
    # estimators
    "trace_form",
    "empirical",
    "Estimate",
    # perturbations
    "Isotropic",
    "Quantization",
    "Removal",
    "SGDNoise",
    "Trajectory",
    "LabelNoise",
    "Retraining",
    # for perturbations of one's own
    "Covariance",
    "Diagonal",
    "FiniteRank",
    "Gradients",
    # validity
    "taylor_error",
    "Validity",
    "train_test_ratio",
    "Ratio",
    "TPVWarning",
]
