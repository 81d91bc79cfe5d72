"""The published architectures have their published sizes, and the benchmark of memory runs on all of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import largest
from benchmarks.sizes_models import ARCHITECTURES, TINY, parameters
from benchmarks.sizes_update import benched, opened, pieces, settings, with_student
from chainrule.footprint import count, flash_attention
from chainrule.meters import LiveBytes
from chainrule.methods import DRaFTLV, Method, ShortFT

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "method", "memory"),
    [
        ("tiny-sd", DRaFTLV(1), "recompute"), ("tiny-sd3", ShortFT(k=2, stage=1), "keep"),
        *(pytest.param(*more, marks=pytest.mark.heavy) for more in (
            ("tiny-sd", DRaFTLV(1), "blocks"), ("tiny-sd3", DRaFTLV(1), "keep"), ("tiny-sd3", ShortFT(k=2, stage=1), "recompute"),
        )),
    ],
)  # fmt: skip
def test_what_is_counted_is_what_the_measured_update_holds(name: str, method: Method, memory: str) -> None:
    """To the byte: both are the trainer's update, one without numbers."""
    bare, judge = opened(TINY[name], META, torch.float32)
    with with_student(bare, method, 3) as taught:
        found = count(taught, method, judge, settings(3, memory), (2,))
    real, judge = opened(TINY[name], CPU, torch.float32)
    with benched(real, judge, method, 3) as bench, flash_attention():
        bench.forget()
        with LiveBytes(CPU) as meter:
            bench.update(2, memory, 3)
        assert bench.fixed() == found.fixed
    assert meter.peak == pytest.approx(found.peaks[2], rel=0.01)


def test_pieces_are_counted_with_and_without_recomputing() -> None:
    found = pieces(*opened(TINY["tiny-sd3"], META, torch.bfloat16))
    assert found["call without gradient"] < found["call, blocks recomputed"] <= found["call"]
    assert found["decode and reward, layers recomputed"] < found["decode and reward"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_their_published_sizes(name: str) -> None:
    found = parameters(ARCHITECTURES[name])
    for part, said in ARCHITECTURES[name].published.items():
        number = said.removesuffix(" billion")
        millions = float(number) * (1000 if number != said else 1)
        assert found[part] / 1e6 == pytest.approx(millions, rel=0.015 if number != said else 1e-3), part


@pytest.mark.parametrize("guess", [1, 5, 9, 40])
@pytest.mark.parametrize("most", [0, 1, 7, 64])
def test_the_largest_batch_is_found_from_any_guess(guess: int, most: int) -> None:
    assert largest(lambda n: n <= most, guess, 64) == most
