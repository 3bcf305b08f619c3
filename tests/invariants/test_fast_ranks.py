"""On two ranks too every fast path gives the losses and gradients of the plain one, document by document.

Fast is what two ranks do under each engine: packs or rows of one document, one or three to a batch, attention
by documents, logits in chunks. Plain is transformers' own forward pass on each document alone with eager
attention, in one process; a step is Σ weight · nll / Σ weight over the documents that both ranks had in it,
and plain gradient descent. So a step is right only if all steps before were.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from tests.invariants.fast_ranks import ENGINES, FORMS, MODELS, PAIRS, RATE, ROWS
from tests.processes import run_on_ranks
from tests.support import encode_rows, largest_deviation, run_alone, weighted_mean
from tests.training.cached_layouts import fill
from vlcpt import ModelConfig, load_model

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

KINDS = {"images", "videos"}
SECONDS = 0.5  # between the time steps of these clips: four frames of one second
RUNS = [(engine, model, form) for model, form in PAIRS for engine in ENGINES]


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder with the model as ``base`` and features of all media."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "base").symlink_to(tiny_model_dir)
    fill(folder / "features", str(tiny_model_dir))
    return folder


@pytest.fixture(scope="module")
def on_two(folder):
    """A function: what a run did on rank 0 and on rank 1."""
    done = run_on_ranks("tests.invariants.fast_ranks", str(folder))
    assert done.returncode == 0, done.stdout
    return lambda *run: [torch.load(folder / f"{' '.join(run)}.{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def samples(tiny_processor):
    """The documents by their tokens up to the last target: the place of each, and how it is encoded."""
    found = {}
    for number, sample in enumerate(encode_rows(ROWS, tiny_processor)):
        last = int((sample.labels != -100).nonzero()[-1])
        found[tuple(sample.input_ids[: last + 1].tolist())] = number, sample
    assert len(found) == len(ROWS)
    return found


@pytest.fixture(scope="module")
def plain(tiny_model_dir, samples):
    """A function: losses and gradients of steps with given documents, one by one in this process."""

    @cache
    def computed(name: str, steps: tuple[tuple[tuple[int, ...], ...], ...]):
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(tiny_model_dir), attn_implementation="eager", **MODELS[name]))
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        losses, gradients = [], []
        for step in steps:
            loss = weighted_mean([run_alone(model, samples[ids][1], SECONDS) for ids in step])
            # A step may have no media: zeros for the towers.
            found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            losses.append(float(loss.detach()))
            gradients.append(dict(zip(trained, found, strict=True)))
            with torch.no_grad():
                for parameter, gradient in zip(trained.values(), found, strict=True):
                    parameter -= RATE * gradient
        return losses, gradients

    return computed


def steps_of(ranks) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The documents of each step, on both ranks."""
    count = 1 + max(step for rank in ranks for step, _ in rank["batches"])
    return tuple(
        tuple(sorted(one for rank in ranks for at, batch in rank["batches"] if at == step for one in batch))
        for step in range(count)
    )


@pytest.mark.parametrize(("engine", "model", "form"), RUNS)
def test_losses_and_gradients_of_each_step_are_those_of_the_plain_path(
    on_two, plain, samples, engine, model, form
):
    ranks = on_two(engine, model, form)
    steps = steps_of(ranks)
    assert sorted(one for step in steps for one in step) == sorted(samples)
    assert len(steps) > 1

    losses, gradients = plain(model, steps)

    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
        for found, expected in zip(rank["gradients"], gradients, strict=True):
            assert largest_deviation(found, expected) < 1e-4


@pytest.mark.parametrize(("engine", "model", "form"), RUNS)
def test_a_rank_has_batches_without_the_media_of_the_others(on_two, samples, engine, model, form):
    """Where parameters are sharded or a tower trains, each rank has to call it nevertheless."""
    ranks = on_two(engine, model, form)
    kinds = [
        [
            {kind for ids in batch for kind in KINDS & ROWS[samples[ids][0]].keys()}
            for _, batch in one["batches"]
            if batch
        ]
        for one in ranks
    ]

    assert set().union(*kinds[0], *kinds[1]) == KINDS
    assert any(one != other for one, other in zip(*kinds, strict=False))


@pytest.mark.parametrize(("engine", "model", "form"), RUNS)
def test_the_run_is_the_one_that_its_name_says(on_two, engine, model, form):
    for rank in on_two(engine, model, form):
        assert rank["engine"] == ("DistributedDataParallel" if engine == "ddp" else "DeepSpeedEngine")
        assert rank["stage"] == (None if engine == "ddp" else int(engine[-1]))
        assert any(len(batch) > FORMS[form].batch for _, batch in rank["batches"]) == FORMS[form].packing
        assert (sum(rank["vision_calls"]) == 0) == FORMS[form].keeps
