"""Two processes train as one does, under DDP and every ZeRO stage, whatever their batches hold."""

from pathlib import Path

import pytest
import torch

from tests.processes import run_on_ranks
from tests.support import largest_deviation
from tests.training.layouts import OFFLOADED, ROUNDED, RUNS, train

ALL = RUNS | ROUNDED | OFFLOADED

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What each run did, by its name: on rank 0 and on rank 1."""
    done = run_on_ranks("tests.training.layouts", str(folder), *ALL)
    assert done.returncode == 0, done.stdout
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in ALL}


@pytest.fixture(scope="module")
def on_one(folder: Path) -> dict[str, dict[str, object]]:
    """What one process does with the same rows, two a step; by what is trained."""
    alone = {name.partition(" ")[2]: name for name in ALL}
    base = str(folder / "base")
    return {
        what: train(ALL[name], folder / "one", base=base, processes=1, evaluates=name in RUNS)
        for what, name in alone.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_the_engine_is_the_one_asked_for(name, on_two):
    engine = name.partition(" ")[0]
    for rank in on_two[name]:
        assert rank["world"] == 2
        if engine == "ddp":
            assert rank["engine"] == "DistributedDataParallel"
        else:
            assert rank["engine"] == "DeepSpeedEngine"
            assert rank["stage"] == int(engine[4])


@pytest.mark.parametrize("name", RUNS)
def test_20_steps_with_every_mix_of_batches_have_the_losses_of_one_process(name, on_two, on_one):
    expected = on_one[name.partition(" ")[2]]["losses"]
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.5  # it learns, so that a wrong step would show in the next ones

    found = on_two[name][0]["losses"]

    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bfloat16_the_losses_are_near_those_of_one_process(name, on_two, on_one):
    expected = on_one[name.partition(" ")[2]]["losses"]

    assert len(expected) == 6
    assert on_two[name][0]["losses"] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", OFFLOADED)
def test_the_offloading_configs_train_as_the_others_do(name, on_two, on_one):
    """With torch's AdamW: DeepSpeed's own is compiled first, for minutes."""
    expected = on_one[name.partition(" ")[2]]["losses"]

    assert len(expected) == 6
    assert on_two[name][0]["losses"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_gradient_is_that_of_one_process(name, on_two, on_one):
    expected = on_one[name.partition(" ")[2]]["gradients"][0]
    for rank in on_two[name]:
        assert largest_deviation(rank["gradients"][0], expected) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_call_the_vision_tower_equally_often(name, on_two):
    first, second = (rank["vision_calls"] for rank in on_two[name])
    shared = "zero3" in name or bool(RUNS[name].model.keys() & {"train_vision", "train_merger"})

    assert len(first) == 20
    assert (first == second) == shared  # elsewhere the tower is frozen and whole on each rank
    if shared:
        assert set(first) == {2}  # once for images, once for videos


@pytest.mark.parametrize("name", RUNS)
def test_no_rank_holds_logits_of_more_than_a_chunk(name, on_two, on_one):
    assert on_one[name.partition(" ")[2]]["most_logits"] > 3
    assert {rank["most_logits"] for rank in on_two[name]} == {3}


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_counts_each_target_once_though_ranks_have_different_numbers_of_rows(name, on_two, on_one):
    expected = on_one[name.partition(" ")[2]]["evaluation"]
    assert expected["eval_targets"] > 10
    for rank in on_two[name]:
        assert rank["evaluation"]["eval_targets"] == expected["eval_targets"]
        assert rank["evaluation"]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.blank])
def test_reliance_is_that_of_one_process_though_ranks_have_other_media(name, on_two, on_one):
    expected = on_one[name.partition(" ")[2]]["evaluation"]
    assert abs(expected["eval_reliance"]) > 1e-3
    for rank in on_two[name]:
        assert rank["evaluation"]["eval_reliance"] == pytest.approx(expected["eval_reliance"], abs=1e-4)
