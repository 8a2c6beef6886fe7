"""Full collections are put off while a model is repacked, and what was set before is set again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from autoprune.repack import repack
from autoprune.repack.garbage import NEVER, without_full_collections


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_full_collections_alone_are_put_off() -> None:
    with without_full_collections():
        assert gc.get_threshold() == (700, 10, NEVER)
        with without_full_collections():
            assert gc.get_threshold() == (700, 10, NEVER)
        assert gc.get_threshold() == (700, 10, NEVER)
    assert gc.get_threshold() == (700, 10, 10)


def test_the_last_thread_sets_what_was_before_the_first() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with without_full_collections():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with without_full_collections():
        thread.start()
        assert inside.wait(60)
    assert gc.get_threshold() == (700, 10, NEVER)
    leave.set()
    thread.join()
    assert gc.get_threshold() == (700, 10, 10)


def test_what_others_set_meanwhile_stays() -> None:
    with without_full_collections():
        gc.set_threshold(500, 5, 5)
    assert gc.get_threshold() == (500, 5, 5)


def test_an_error_sets_it_again_too() -> None:
    with pytest.raises(ValueError, match="no"), without_full_collections():
        raise ValueError("no")
    assert gc.get_threshold() == (700, 10, 10)


def test_a_model_is_repacked_without() -> None:
    seen = []

    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.get_threshold())
            return x + 1

    repack(Looking().eval(), torch.zeros(2, 3))
    assert set(seen) == {(700, 10, NEVER)}
    assert gc.get_threshold() == (700, 10, 10)
