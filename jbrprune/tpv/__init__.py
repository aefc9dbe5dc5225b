"""Test prediction variance: what a perturbation of the weights does to the outputs, to first order and really."""

from jbrprune.tpv.covariances import Covariance, Diagonal, FiniteRank, Isotropic, Quantization, Removal, square_norms
from jbrprune.tpv.estimate import Estimate, Ratio, train_test_ratio
from jbrprune.tpv.estimators import empirical, trace_form
from jbrprune.tpv.noise import LabelNoise, Retraining, SGDNoise, Trajectory
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
    "square_norms",
    # validity
    "taylor_error",
    "Validity",
    "train_test_ratio",
    "Ratio",
    "TPVWarning",
]
