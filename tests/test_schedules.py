"""The ramp of the unsupervised weights."""

import math

import pytest

from nnunetv2_semicml.training.schedules import sigmoid_rampup


def test_rampup():
    assert sigmoid_rampup(0, 10) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(5, 10) == pytest.approx(math.exp(-5 * 0.25))
    assert sigmoid_rampup(10, 10) == sigmoid_rampup(11, 10) == sigmoid_rampup(0, 0) == 1.0
