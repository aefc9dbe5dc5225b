"""What width does to TPV: nets of three linear layers, from 16 to 512 units, on three sets of data.

TPV on the training and test inputs under noise on every weight, 8-bit quantization, and (one output, so on synthetic
data only) label noise; beside the test loss, which the paper says label-noise TPV tracks. Noise on every weight has
the same standard deviation at every width, so that wider nets get more noise in all; the third column of panels
divides by the mean squared norm of the weights, which makes it relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from frame import Places, Settings, Study, curve, main, panels, rank_correlation, spread
from kernel import spectrum
from matplotlib.figure import Figure
from torch import nn
from training import entropy_and_accuracy, fit, images, mlp, outputs, squared, synthetic

from jbrprune.tpv import Isotropic, Quantization, trace_form

WIDTHS = (16, 32, 64, 128, 256, 512)
SIDES = {"digits": 8, "fashion_mnist": 16}
PENALTIES = {"label_noise": 1e-2, "repeated_noise": 0.0}
