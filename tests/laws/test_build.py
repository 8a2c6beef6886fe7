"""The law of building: a model that is built for this machine computes what its program does, to the last bit."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.errors import AutopruneError
from autoprune.repack import ProgramModel, repack
from tests.laws.test_program import any_tiling, networks, told
from tests.repack.built import assert_same, built, needs_compiler


@pytest.mark.slow
@needs_compiler
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(network=networks(), threads=st.sampled_from([1, 2]), other=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_what_is_built_computes_what_the_program_does(
    network: tuple[nn.Module, Tensor], threads: int, other: int, seed: int, tmp_path: Path
) -> None:
    model, x = network
    rng, again = random.Random(seed), torch.randn(other, *x.shape[1:])
    fast = repack(model, x, form="program", threads=threads, cache=told(tmp_path, lambda: any_tiling(rng)))
    assert isinstance(fast, ProgramModel)
    shapes = list(dict.fromkeys([(tuple(x.shape),), (tuple(again.shape),)]))
    try:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))  # a process loads a library of one name once
        small = built(fast, folder, shapes, threads=threads)
    except AutopruneError as refusal:
        assert "which have no native form" in str(refusal)  # noqa: PT017  what torch runs is never built
        return
    with torch.inference_mode():
        for each in (x, again, x):
            assert_same(small(each.numpy()), fast(each))
