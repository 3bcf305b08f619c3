"""Two processes with ``vision_cache`` train as they do without, and where they cannot they say so."""

from pathlib import Path

import pytest
import torch

from tests.processes import run_on_ranks
from tests.training.cached_layouts import fill

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What each run did, by its name and whether it kept features: on rank 0 and on rank 1."""
    assert len(fill(folder / "cache of zero3", str(folder / "base"))) > 20
    names = ("ddp", "zero2", "zero3", "zero3, empty")
    ran = run_on_ranks("tests.training.cached_layouts", str(folder), *names)
    assert ran.returncode == 0, ran.stdout
    return {
        f"{name} {kind}": [torch.load(folder / f"{name}.{kind}.{rank}.pt") for rank in (0, 1)]
        for name in names
        for kind in ("plain", "kept")
    }


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_losses_and_the_evaluation_are_those_without(done, engine):
    for rank in (0, 1):
        plain, kept = (done[f"{engine} {kind}"][rank] for kind in ("plain", "kept"))
        assert len(plain["losses"]) == 6
        assert kept["losses"] == pytest.approx(plain["losses"], abs=1e-6)
        assert kept["evaluation"] == pytest.approx(plain["evaluation"], abs=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_the_first_gradient_is_that_without(done, engine):
    for rank in (0, 1):
        (plain,), (kept,) = (done[f"{engine} {kind}"][rank]["gradients"] for kind in ("plain", "kept"))
        assert plain.keys() == kept.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(kept[name], gradient, rtol=1e-5, atol=1e-7)


def test_ranks_call_the_tower_for_what_is_missing_and_under_zero3_never(done):
    assert sum(sum(one["vision_calls"]) for one in done["ddp kept"]) > 0
    assert [sum(one["vision_calls"]) for one in done["zero3 kept"]] == [0, 0]
    assert [one["filled"] for one in done["zero3 kept"]] == [(), ()]
    assert all(sum(one["vision_calls"]) > 0 for one in done["zero3 plain"])


def test_an_empty_cache_under_zero3_is_refused_before_training(done):
    for one in done["zero3, empty kept"]:
        assert "has no features of this vision tower" in one["error"]
        assert "vlcpt prepare CONFIG --vision_cache" in one["error"]


def test_a_cache_that_lacks_one_medium_under_zero3_ends_the_run_with_what_to_do(folder):
    first, *_ = fill(folder / "cache of zero3, one missing", str(folder / "base"))
    for path in first.parent.parent.rglob("*.safetensors"):
        if path != first:
            path.unlink()

    ran = run_on_ranks("tests.training.cached_layouts", str(folder), "zero3, one missing")

    assert ran.returncode
    assert "features are missing in" in ran.stdout, ran.stdout
