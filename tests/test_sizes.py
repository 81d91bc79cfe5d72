"""The bytes counted on the meta device are those that the same update takes with real numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes_count import largest
from benchmarks.sizes_models import ARCHITECTURES, TINY, parameters
from benchmarks.sizes_update import adapted, counted, open_bench
from chainrule.methods import DRaFTLV, Method, ShortFT

META, CPU = torch.device("meta"), torch.device("cpu")


def count(
    name: str, device: torch.device, method: Method, memory: str, dtype: torch.dtype, rehearse: bool = True
) -> tuple[int, int]:
    with adapted(*open_bench(TINY[name], device, dtype), method, steps=3) as bench:
        return counted(bench, 2, memory, rehearse=rehearse), sum(bench.fixed().values())


@pytest.mark.parametrize(
    ("name", "method", "memory"),
    [
        ("tiny-sd", DRaFTLV(1), "recompute"), ("tiny-sd3", ShortFT(k=2, stage=1), "keep"),
        *(pytest.param(*more, marks=pytest.mark.heavy) for more in (
            ("tiny-sd", DRaFTLV(1), "keep"), ("tiny-sd3", DRaFTLV(1), "keep"), ("tiny-sd3", ShortFT(k=2, stage=1), "recompute"),
        )),
    ],
)  # fmt: skip
def test_a_count_without_numbers_is_the_count_with_them(name, method, memory):
    assert count(name, META, method, memory, torch.float32) == count(name, CPU, method, memory, torch.float32, rehearse=False)


def test_in_bfloat16_too_but_for_the_statistics_of_norms():
    """A CPU holds those of a layer norm in bfloat16, a GPU and the meta device in float32."""
    here, there = (count("tiny-sd3", device, DRaFTLV(1), "recompute", torch.bfloat16)[0] for device in (CPU, META))
    assert here <= there < 1.01 * here


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_their_published_sizes(name):
    found = parameters(ARCHITECTURES[name])
    for part, said in ARCHITECTURES[name].published.items():
        number = said.removesuffix(" billion")
        millions = float(number) * (1000 if number != said else 1)
        assert found[part] / 1e6 == pytest.approx(millions, rel=0.015 if number != said else 1e-3), part


@pytest.mark.parametrize("guess", [1, 5, 9, 40])
@pytest.mark.parametrize("most", [0, 1, 7, 64])
def test_the_largest_batch_is_found_from_any_guess(guess, most):
    assert largest(lambda n: n <= most, guess, 64) == most
