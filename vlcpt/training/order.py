"""In which order a run reads its packs: at random, or so that its ranks have equally much to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from vlcpt.config.training import CPTConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.plan.balance import PackCost, order_of_steps, share_among_ranks
from vlcpt.errors import ConfigError
from vlcpt.training.cost import cost_of

logger = logging.getLogger(__name__)


class StepSampler(Sampler[int]):
    """Packs in another random order each epoch, those of a step of nearly one cost.

    Which packs a step has depends on their number alone; how they are divided among ranks, on the ranks too.

    Args:
        costs, kinds: For each pack, see :func:`~vlcpt.data.plan.balance.order_of_steps`.
        ranks: Processes that train.
        batch: Packs of a batch.
        accumulation: Batches of a rank in a step.
        seed: Decides the order, with the epoch.

    Example:
        >>> costs = np.array([1, 9, 1, 9])
        >>> sampler = StepSampler(costs, np.zeros(4, np.int64), ranks=2, batch=1, accumulation=1, seed=0)
        >>> costs[list(sampler)].tolist()
        [1, 1, 9, 9]
    """

    def __init__(
        self, costs: np.ndarray, kinds: np.ndarray, *, ranks: int, batch: int, accumulation: int, seed: int
    ) -> None:
        self._costs, self._kinds = costs, kinds
        self._ranks, self._batch, self._step = ranks, batch, ranks * batch * accumulation
        self._seed, self._epoch = seed, 0

    def __len__(self) -> int:
        return len(self._costs)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = order_of_steps(self._costs, self._kinds, self._step, rng)
        steps = order[: len(order) // self._step * self._step].reshape(-1, self._step)
        shared = share_among_ranks(self._costs[steps], self._ranks, self._batch)
        order[: steps.size] = np.take_along_axis(steps, shared, axis=1).ravel()
        # As numbers of Python, without a million of them at once.
        return map(int, order)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch from now on; accelerate calls it."""
        self._epoch = epoch


def require_packs(args: CPTConfig, dataset: object) -> None:
    """Refuse ``balance_ranks: true`` for data whose packs nobody knows.

    Args:
        args: The training configuration. Where balancing is its default, such data is read as Trainer would.
        dataset: That of the training; None: there is none.

    Raises:
        ConfigError: With what to do instead.

    Example:
        >>> require_packs(CPTConfig("out", use_cpu=True), [1, 2, 3])
        >>> require_packs(CPTConfig("out", use_cpu=True, balance_ranks=True), [1, 2, 3])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: balance_ranks: true needs a CPTDataset with packing, ...
    """
    if not args.balance_ranks or dataset is None or (isinstance(dataset, CPTDataset) and dataset.packing):
        return
    raise ConfigError(
        "balance_ranks: true needs a CPTDataset with packing, which knows what its packs cost; found "
        f"{type(dataset).__name__}. Remove balance_ranks, or train on a CPTDataset."
    )


class PackOrder:
    """Whether a run balances its packs, and by which cost: as its configuration says, or its checkpoint.

    The documents of a step depend on how many packs it has, not on ranks. So what several ranks began can be
    resumed on one, which alone would not balance, and the other way round.

    Args:
        model: The model that is trained.
        args: The training configuration.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: CPTConfig) -> None:
        self._args = args
        self._asked: PackCost | None = None
        balances = args.world_size > 1 if args.balance_ranks is None else args.balance_ranks
        if balances and args.packing and args.train_sampling_strategy == "random":
            self._asked = cost_of(model, recomputes=args.recomputes_activations)
            if args.vision_cache is not None:  # filled, it spares the tower
                self._asked = replace(self._asked, media=0.0, frame_pair=0.0)
        self._cost = self._asked

    @property
    def state(self) -> dict[str, float] | None:
        """What a checkpoint keeps of it."""
        return None if self._cost is None else asdict(self._cost)

    def choose(self, facts: Mapping[str, object] | None) -> dict[str, float] | None:
        """Take the order of the run whose checkpoint has these facts; None: that of the configuration.

        Returns:
            Its :attr:`state`.
        """
        saved = None if facts is None else facts.get("balance")
        self._cost = PackCost(**saved) if isinstance(saved, dict) else None
        if facts is None:
            self._cost = self._asked
        if (self._cost is None) != (self._asked is None):
            how = "at random" if self._cost is None else "balanced"
            logger.info("balance_ranks: the order of packs stays that of the checkpoint, %s", how)
        return self.state

    def packs(self, dataset: object) -> object:
        """The data set with the packs of this order; any but a ``CPTDataset`` stays as it is."""
        return dataset.balanced(self._cost) if isinstance(dataset, CPTDataset) else dataset

    def sampler(self, dataset: object) -> StepSampler | None:
        """What reads the packs in this order; None where it is Trainer's own."""
        if self._cost is None or not (isinstance(dataset, CPTDataset) and dataset.packing):
            return None
        args = self._args
        ranks, batch, accumulation = args.world_size, args.train_batch_size, args.gradient_accumulation_steps
        return StepSampler(
            *dataset.pack_costs(self._cost, ranks * batch * accumulation),
            ranks=ranks,
            batch=batch,
            accumulation=accumulation,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
