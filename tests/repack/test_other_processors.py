"""The kernels of bytes on other processors, equal to numpy to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.repack import test_byte_windows, test_dot_kernels
from tests.repack.processors import EMULATED
from tests.repack.test_dot_kernels import Ending, check_convolution, check_rows

pytestmark = pytest.mark.emulated
processors = pytest.mark.parametrize("name", EMULATED)


@processors
@pytest.mark.parametrize("ending", test_dot_kernels.ENDINGS, ids=str)
def test_a_convolution_is_equal_to_numpy(ending: Ending, name: str) -> None:
    rng = np.random.default_rng(ending.rows)
    for _ in range(4):
        check_convolution(rng, ending, EMULATED[name])


@processors
@pytest.mark.parametrize("ending", test_dot_kernels.ROWS_ENDINGS, ids=str)
def test_rows_are_equal_to_numpy(ending: Ending, name: str) -> None:
    rng = np.random.default_rng(ending.rows)
    for _ in range(6):
        check_rows(rng, ending, EMULATED[name])


@processors
def test_the_largest_bytes_and_weights_do_not_saturate(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        check_convolution(rng, Ending(8, "floats", mixed=True), EMULATED[name], extreme=True)
    check_rows(rng, Ending(16, "floats", "floats"), EMULATED[name], extreme=True)


@processors
@pytest.mark.parametrize("phases", [False, True])
def test_depthwise_convolutions_are_equal_to_numpy(name: str, phases: bool) -> None:
    test_byte_windows.check_depthwise(EMULATED[name], phases, count=8)
