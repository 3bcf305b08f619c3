"""In which order packs are read: each once an epoch, the same steps on any ranks, kept by a resume."""

import json

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from tests.processes import run_on_ranks
from tests.support import make_trainer
from tests.training.balanced_rank import PER_STEP, ROWS, STEPS, train
from vlcpt import CPTConfig, CPTDataset, CPTTrainer
from vlcpt.data.plan.balance import PackCost
from vlcpt.errors import ConfigError
from vlcpt.training.checkpoints.files import verify
from vlcpt.training.order import PackOrder, StepSampler

# Ranks, batch size, accumulation.
LAYOUTS = [(1, 16, 1), (1, 1, 16), (2, 1, 8), (2, 4, 2), (4, 2, 2), (16, 1, 1)]
COST = PackCost(token=1, pair=0.01, target=1, media=2, frame_pair=0.1)


def packs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs and kinds."""
    rng = np.random.default_rng(0)
    return rng.integers(900, 1100, count), rng.integers(0, 3, count)


def of_ranks(layout: tuple[int, int, int], count: int, epoch: int = 0) -> list[np.ndarray]:
    """The packs of each rank, by accelerate's own division: (batches, packs of a batch)."""
    ranks, batch, accumulation = layout
    sampler = StepSampler(*packs(count), ranks=ranks, batch=batch, accumulation=accumulation, seed=3)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, batch, drop_last=False)
    return [np.array(list(BatchSamplerShard(batches, ranks, rank))) for rank in range(ranks)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_has_the_same_packs_on_any_ranks(layout):
    """So a checkpoint of some ranks can be resumed on others, and a gradient depends on documents alone."""
    steps = [
        set(
            np.concatenate([rank[step * layout[2] : (step + 1) * layout[2]] for rank in found])
            .ravel()
            .tolist()
        )
        for found in [of_ranks(layout, 20 * 16)]
        for step in range(20)
    ]

    expected = of_ranks(LAYOUTS[0], 20 * 16)[0]
    assert steps == [set(one.tolist()) for one in expected]


@pytest.mark.parametrize("count", [1, 5, 16, 50, 333])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_has_each_pack_once(layout, count):
    ranks, batch, accumulation = layout
    sampler = StepSampler(*packs(count), ranks=ranks, batch=batch, accumulation=accumulation, seed=3)

    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_ranks_have_nearly_equally_much_to_do_in_a_step():
    costs, _ = packs(20 * 16)

    found = np.stack([costs[rank].sum(axis=1) for rank in of_ranks((16, 1, 1), 20 * 16)])

    assert (found.mean(axis=0) / found.max(axis=0)).mean() > 0.98
    shuffled = costs.reshape(16, 20)
    assert (shuffled.mean(axis=0) / shuffled.max(axis=0)).mean() < 0.94


def test_an_epoch_has_its_own_order_whenever_it_is_read():
    first, second, again = (of_ranks((4, 1, 4), 100, epoch)[0].tolist() for epoch in (0, 1, 0))

    assert first == again
    assert first != second


@pytest.fixture(scope="module")
def dataset(tiny_processor):
    return CPTDataset(ROWS, tiny_processor, max_length=64)


@pytest.fixture
def order(tiny_model, tmp_path):
    """A function: the order of a configuration on so many ranks."""

    def make(ranks: int = 1, **settings: object) -> PackOrder:
        class Args(CPTConfig):
            world_size = ranks

        return PackOrder(tiny_model, Args(output_dir=str(tmp_path), use_cpu=True, **settings))

    return make


def test_packs_are_balanced_on_several_ranks_and_on_one_where_asked(order):
    assert order(2).state
    assert order(1, balance_ranks=True).state
    assert order(1).state is None
    assert order(2, balance_ranks=False).state is None


@pytest.mark.parametrize("other", [{"packing": False}, {"train_sampling_strategy": "sequential"}])
def test_another_order_that_was_asked_for_stays(order, other):
    assert order(2, **other).state is None


def test_one_rank_reads_what_it_read_before(order, dataset):
    assert order(1).packs(dataset) is dataset
    assert order(1).sampler(dataset) is None


def test_a_data_set_of_another_kind_is_read_in_the_order_of_trainer(order):
    given = [1, 2, 3]

    assert order(2).packs(given) is given
    assert order(2).sampler(given) is None


def test_balancing_that_was_asked_for_and_cannot_be_is_refused(tiny_model, tiny_processor, tmp_path):
    args = CPTConfig(str(tmp_path), use_cpu=True, balance_ranks=True)

    with pytest.raises(ConfigError, match=r"balance_ranks: true needs a CPTDataset with .*; found list\."):
        CPTTrainer(tiny_model, args, train_dataset=[1, 2, 3], processing_class=tiny_processor)


def test_a_resumed_run_keeps_the_order_of_its_checkpoint(order, dataset):
    two, one = order(2), order(1)
    facts = json.loads(json.dumps({"balance": two.state}))

    one.choose(facts)
    assert one.state == two.state
    assert one.packs(dataset).pack_sizes().tolist() == two.packs(dataset).pack_sizes().tolist()
    two.choose({"balance": None})
    assert two.state is None
    two.choose({})  # of a checkpoint from before there was a choice
    assert two.state is None
    two.choose(None)
    assert two.state == one.state


@pytest.mark.parametrize("then", [True, False, None])
def test_a_run_that_balances_goes_on_in_its_order(tiny_model_dir, tmp_path, then):
    """Whatever the configuration says then: the checkpoint decides."""
    whole = train(tmp_path / "run", str(tiny_model_dir), balance_ranks=True)

    resumed = train(tmp_path / "run", str(tiny_model_dir), balance_ranks=then, resumes=True)

    assert sorted(whole) == list(range(PER_STEP * STEPS))
    assert resumed == whole[len(whole) // 2 :]


def test_a_run_that_does_not_balance_goes_on_in_its_order(tiny_model_dir, tmp_path):
    whole = train(tmp_path / "run", str(tiny_model_dir))

    resumed = train(tmp_path / "run", str(tiny_model_dir), balance_ranks=True, resumes=True)

    assert resumed == whole[len(whole) // 2 :]


def test_the_loader_of_a_trainer_reads_in_this_order(tiny_model, tiny_processor, dataset, tmp_path):
    trainer = make_trainer(
        tiny_model, dataset, tiny_processor, tmp_path, balance_ranks=True, gradient_accumulation_steps=4
    )

    loader = trainer.get_train_dataloader()

    order = trainer._order
    assert order.state
    expected = StepSampler(
        *trainer.train_dataset.pack_costs(PackCost(**order.state), 4),
        ranks=1,
        batch=1,
        accumulation=4,
        seed=42,
    )
    expected.set_epoch(2)
    loader.set_epoch(2)
    assert [batch[0] for batch in loader.batch_sampler] == list(expected)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_two_ranks_read_what_the_plan_says_and_a_resume_goes_on_alike(
    tiny_model_dir, tmp_path, tiny_processor
):
    (tmp_path / "base").symlink_to(tiny_model_dir)

    done = run_on_ranks("tests.training.balanced_rank", str(tmp_path))

    assert done.returncode == 0, done.stdout
    cost = PackCost(**verify(tmp_path / f"run/checkpoint-{STEPS}").run["balance"])
    dataset = CPTDataset(ROWS, tiny_processor, max_length=64).balanced(cost)
    costs, kinds = dataset.pack_costs(cost, PER_STEP)
    expected = [*StepSampler(costs, kinds, ranks=2, batch=1, accumulation=PER_STEP // 2, seed=42)]
    for rank in (0, 1):
        whole, resumed = torch.load(tmp_path / f"read.{rank}.pt")
        assert whole == expected[rank::2]
        assert resumed == whole[len(whole) // 2 :]
    # One process goes on where the two stopped: with the same packs in each step.
    alone = np.array(train(tmp_path / "run", str(tmp_path / "base"), resumes=True))
    steps = np.array(expected).reshape(STEPS, PER_STEP)[STEPS // 2 :]
    assert np.sort(alone.reshape(-1, PER_STEP)).tolist() == np.sort(steps).tolist()
