"""``vlcpt eval``: a checkpoint measured on held-out and retention data."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from torch import nn
from transformers import ProcessorMixin

from vlcpt.config.precision import autocast_type, slow_products
from vlcpt.config.schema import SourceLike, as_sources
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import Configs, load_config
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.plan.plan import Track
from vlcpt.data.rows.open import SourceConfig
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_file, write_json
from vlcpt.model.loading import check_evaluated, load_for_evaluation, load_processor
from vlcpt.model.patch_embedding import choose_form, embed_patches
from vlcpt.model.tuning import base_model
from vlcpt.report.screen import WARNING, Screen, say
from vlcpt.report.terminal import continuation_lines, one_line, results_table
from vlcpt.report.verdict import CommandPaths, Verdict, verdict
from vlcpt.run_files import record_of
from vlcpt.runs.data import (
    RunData,
    quiet_libraries,
    retention_names,
    show_unmeasured,
    shown,
    with_native_model,
)
from vlcpt.runs.tokens import write_tokens
from vlcpt.training.continuations import Continuation, continue_documents
from vlcpt.training.evaluate import EvalOptions, score_sets
from vlcpt.training.ranks import RankWatch, first_rank_only, require_equal, together
from vlcpt.training.scores import SetResult, SetScores

T = TypeVar("T")
SAMPLES = 2  # documents of each held-out set that a run continues at its end
Measured = CPTDataset | Mapping[str, CPTDataset] | SourceLike | Sequence[SourceLike]
"""What Python callers may measure: data sets, one or by name, or sources as ``eval_data`` has them."""


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, SetResult]):
    """What ``vlcpt eval`` found: by name of a set its numbers. Printed, it is what the command shows.

    Args:
        sets: For each set what ``--output`` writes.
        retention: The sets that hold what the model knew before.
        samples: Documents that the model continued, by set.
        paths: What the commands in the verdict's advice name.
    """

    sets: Mapping[str, SetResult]
    retention: tuple[str, ...] = ()
    samples: Mapping[str, Sequence[Continuation]] = field(default_factory=dict)
    _data: Mapping[str, CPTDataset] = field(default_factory=dict, repr=False)
    _scores: Mapping[str, SetScores] = field(default_factory=dict, repr=False)
    paths: CommandPaths = field(default=CommandPaths(), repr=False)

    def __getitem__(self, name: str) -> SetResult:
        return self.sets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    @property
    def verdict(self) -> Verdict:
        """What the numbers say."""
        return verdict(self.sets, self.retention, self.paths)

    def documents(self) -> list[dict[str, object]]:
        """Each document of each set with its losses, the worst first, as ``--per_document`` writes them."""
        found: list[dict[str, object]] = []
        for name, scores in self._scores.items():
            for number in range(len(scores.sums)):
                document = self._data[name].documents[number]
                has_media = bool(document.images or document.videos)
                if (own := scores.document(number, has_media=has_media)) is not None:
                    found.append({**own, "set": name, "source": str(document.source), "id": document.id})
        return sorted(found, key=lambda one: -float(str(one["loss"])))

    def as_json(self) -> dict[str, object]:
        """What ``--output`` writes."""
        found: dict[str, object] = {"sets": dict(self.sets), "retention": [*self.retention]}
        return found | ({"samples": self.samples} if self.samples else {})

    def show(self, console: Console) -> None:
        """Print the verdict, the numbers and the continued documents."""
        console.print(self.verdict, soft_wrap=not console.is_terminal)
        console.print()
        console.print(results_table(self.sets))
        for name, found in self.samples.items():
            for line in continuation_lines(name, found):
                console.print(line, soft_wrap=not console.is_terminal)

    def __str__(self) -> str:
        text = StringIO()
        self.show(Screen(file=text, width=100, color_system=None))
        return text.getvalue()

    __repr__ = __str__


def evaluate(
    model: str | PathLike[str] | nn.Module,
    eval_data: Measured | None = None,
    retention_data: Measured | None = None,
    *,
    config: str | PathLike[str] | None = None,
    processor: ProcessorMixin | None = None,
    base: nn.Module | None = None,
    samples: int = 0,
    batch_size: int = 1,
) -> Evaluation:
    """Measure a model or a checkpoint, as ``vlcpt eval`` does.

    Args:
        model: A checkpoint, a run's folder, or a model that is loaded.
        eval_data: Held-out documents: a :class:`vlcpt.CPTDataset`, several by name, or sources as in the
            configuration. Without it and ``retention_data``, those of the configuration.
        retention_data: Documents of what the model knew before.
        config: The configuration of a checkpoint; default: the one that its run wrote. A model that is loaded
            has none, and is measured on data sets, in the type of its weights.
        processor: That of a model that is loaded.
        base: For a loaded model without adapters to switch off; without it nothing is compared.
        samples: How many documents of each held-out set are continued.
        batch_size: That of a model that is loaded; no number depends on it.

    Raises:
        ConfigError: If there is nothing to measure, or no configuration.

    Example:
        >>> from vlcpt import CPTDataset, ModelConfig, load_model, load_processor
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> held_out = CPTDataset([{"text": "one two three"}] * 8, processor, max_length=64)
        >>> found = evaluate(load_model(ModelConfig(base_path())), held_out, processor=processor)
        >>> found["eval_data"]["intervals"]["learnt"]  # a new adapter adds nothing
        [0.0, 0.0]
    """
    held, kept = _sets(eval_data, "eval_data"), _sets(retention_data, "retention_data")
    if isinstance(model, nn.Module):
        if processor is None or held is None or kept is None or not (held or kept):
            raise ConfigError(
                "a model that is loaded is measured on data sets: give evaluate() a CPTDataset, or several "
                "by name, and the processor."
            )
        subject = _Subject(model, base, processor, EvalOptions(batch_size))
        return _evaluation(subject, {**held, **kept}, tuple(kept), samples)
    checkpoint = Path(model)
    path = Path(config) if config is not None else record_of(checkpoint)[0] / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give evaluate() the checkpoint's configuration: config=….")
    configs, paths = load_config(path), CommandPaths.of(path, checkpoint)
    if held is not None and kept is not None and (held or kept):
        subject = _subject(configs, checkpoint, Console(quiet=True), RankWatch(configs.training))
        return replace(_evaluation(subject, {**held, **kept}, tuple(kept), samples), paths=paths)
    if eval_data is not None or retention_data is not None:
        data = replace(configs.data, eval_data=_sources(eval_data), retention_data=_sources(retention_data))
        configs = replace(configs, data=data)
    return eval_run(configs, checkpoint, console=Console(quiet=True), samples=samples, paths=paths)


def _sets(given: Measured | None, name: str) -> dict[str, CPTDataset] | None:
    """Data sets by name; None where sources are given instead."""
    if given is None:
        return {}
    if isinstance(given, CPTDataset):
        return {name: given}
    if isinstance(given, Mapping):
        found = {name: one for name, one in given.items() if isinstance(one, CPTDataset)}
        return found if len(found) == len(given) else None
    return None


def _sources(given: Measured | None) -> tuple[SourceConfig, ...]:
    """Sources as a configuration has them."""
    return as_sources(given or ())  # type: ignore[arg-type]


def eval_run(
    configs: Configs,
    checkpoint: Path,
    output: Path | None = None,
    console: Console | None = None,
    *,
    samples: int = 0,
    per_document: Path | None = None,
    tokens: Path | None = None,
    paths: CommandPaths | None = None,
) -> Evaluation:
    """Measure a checkpoint on ``eval_data`` and ``retention_data``.

    Under a launcher all ranks measure their share, each with the whole model, and get all numbers; the first
    one alone writes, prints and continues documents.

    Args:
        output: Where the numbers are written.
        samples: How many documents of each held-out set are continued.
        per_document: Where a line for each document is written.
        tokens: Where the documents are written with what its image gives each target: a name that ends in
            ``.html`` or ``.jsonl``.
        paths: What the commands in its advice name; by default the checkpoint alone is known.
    """
    if not configs.data.eval_data and not configs.data.retention_data:
        raise ConfigError("eval_data and retention_data are missing: there is nothing to measure. Add one.")
    training = configs.training
    is_main = training.process_index == 0
    console = (console or Screen()) if is_main else Console(quiet=True)
    watch = RankWatch(training)
    with watch.watched():
        found = _measure(configs, checkpoint, console, watch, samples, keeps_targets=tokens is not None)
        found = replace(found, paths=paths or CommandPaths.of(checkpoint=checkpoint))

        def write() -> None:
            if output and is_main:
                write_json(output, found.as_json(), "what was measured")
            if per_document and is_main:
                lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in found.documents())
                write_file(per_document, "".join(lines), "the documents that were measured")
            if tokens and is_main:
                processor = load_processor(configs.model.model_name_or_path)
                write_tokens(tokens, configs, checkpoint, found._data, found._scores, processor, console)

        found.show(console)
        together(write)
    for name, dataset in found._data.items():
        if count := len(dataset.failures):
            say(console, f"{name}: {count} documents could not be read, and are not measured.", WARNING)
        if dataset.has_media and not dataset.can_shuffle:
            say(
                console,
                f"{name}: no loss with another document's images or videos: only one document has one.",
            )
    for path in filter(None, (output, per_document, tokens)):
        say(console, f"written to {path}")
    if isinstance(console, Screen) and console.brief:
        say(console, one_line(found.sets), is_result=True)
    return found


def evaluate_trained(
    model: nn.Module,
    sets: Mapping[str, CPTDataset],
    processor: ProcessorMixin,
    configs: Configs,
    console: Console,
    watch: RankWatch,
    *,
    before: Mapping[str, float],
) -> Evaluation:
    """Measure a model that a run has just trained, as ``vlcpt eval`` would; all ranks together.

    Args:
        model: It must be whole on each rank.
        sets: Those of the run.
        before: The loss of each set before step 1: the base of a model that was trained in full, for which
            what was learnt has no interval then.
    """
    subject = _Subject(model, None, processor, _options(configs.training, console, watch))
    with watch.watched():
        found = _evaluation(subject, sets, retention_names(configs.data), samples=SAMPLES)
    for name, one in found.sets.items():
        if one["base_loss"] is None:
            one["base_loss"] = before.get(name)
    return found


@dataclass(frozen=True)
class _Subject:
    """A model that is measured, its base where that is another one, and how."""

    model: nn.Module
    base: nn.Module | None
    processor: ProcessorMixin
    options: EvalOptions


def _evaluation(
    subject: _Subject,
    sets: Mapping[str, CPTDataset],
    retention: tuple[str, ...],
    samples: int,
    *,
    keeps_targets: bool = False,
) -> Evaluation:
    """What the sets gave."""
    model, processor, options = subject.model, subject.processor, subject.options
    scores = score_sets(model, sets, processor, options, base=subject.base, keeps_targets=keeps_targets)
    continued: dict[str, list[Continuation]] = {}
    if samples and options.rank == 0:
        # Of held-out documents, where there are any: what the model knew before is nothing new to see.
        wanted = [name for name in sets if name not in retention] or [*sets]
        continued = {
            name: continue_documents(model, sets[name], processor, samples, options) for name in wanted
        }
    results = {name: one.result() for name, one in scores.items()}
    return Evaluation(results, retention, continued, sets, scores)


def _measure(
    configs: Configs,
    checkpoint: Path,
    console: Console,
    watch: RankWatch,
    samples: int,
    *,
    keeps_targets: bool = False,
) -> Evaluation:
    """Read the sets, load the model, and measure."""
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    check_evaluated(configs.model, str(checkpoint))
    watch.at(0, "reading the data")
    sets = _read_sets(configs, processor, console)
    show_unmeasured(sets, console)
    if (slow := slow_products(configs.training)) is not None:
        say(console, slow, WARNING)
    watch.at(0, "loading the model")
    subject = _subject(configs, checkpoint, console, watch, processor)
    kept = retention_names(configs.data)
    return _evaluation(subject, sets, kept, samples, keeps_targets=keeps_targets)


def _subject(
    configs: Configs,
    checkpoint: Path,
    console: Console,
    watch: RankWatch,
    processor: ProcessorMixin | None = None,
) -> _Subject:
    """A checkpoint and its base, as training would compute them."""
    training = configs.training
    loaded: list[tuple[nn.Module, nn.Module | None]] = []
    together(lambda: loaded.append(_load(configs, checkpoint)))
    ((model, base),) = loaded
    dtype = autocast_type(training) or base_model(model).lm_head.weight.dtype
    # One choice for both models and all ranks: rounding is another in the other form.
    patches = first_rank_only(
        training, lambda: choose_form(model, training.patch_embedding, training.device, dtype)
    )
    for one in filter(None, (model, base)):
        embed_patches(one, patches.form)
    if patches.reason:
        say(console, patches.reason)
    known = processor or load_processor(configs.model.model_name_or_path)
    return _Subject(model, base, known, _options(training, console, watch))


def _options(training: CPTConfig, console: Console, watch: RankWatch) -> EvalOptions:
    """How sets are scored in the arithmetic of training, each rank its share."""
    return EvalOptions(
        batch_size=training.per_device_eval_batch_size,
        num_workers=training.workers,
        timeout=training.dataloader_timeout,
        autocast=autocast_type(training),
        loss_chunk=training.loss_chunk,
        pixel_bytes=training.pixel_bytes,
        track=_reported(shown(console), watch),
        rank=training.process_index,
        ranks=training.world_size,
    )


def _read_sets(configs: Configs, processor: ProcessorMixin, console: Console) -> dict[str, CPTDataset]:
    """The sets, planned by one rank of each machine for all of its own.

    Raises:
        ValueError: If ranks have not found the same.
    """
    training = configs.training
    if training.world_size == 1:
        return RunData(configs, processor, shown(console)).evaluations()
    sets: dict[str, CPTDataset] = {}
    # A folder that no run has: output_dir may be that of one that goes on.
    token = first_rank_only(training, lambda: secrets.token_hex(16))
    plans = Path(tempfile.gettempdir(), f"vlcpt-{token}")
    try:
        together(lambda: sets.update(RunData(configs, processor, shown(console), plans).evaluations()))
    finally:
        shutil.rmtree(plans, ignore_errors=True)
    for name, one in sets.items():
        require_equal(one.digest, f"the plan of {name}")
    return sets


def _load(configs: Configs, checkpoint: Path) -> tuple[nn.Module, nn.Module | None]:
    """The model and, where that is another one, its base, on this rank's device."""
    _forget_sharding(configs.training)
    model, base = load_for_evaluation(with_native_model(configs).model, str(checkpoint))
    for one in (model, base):
        # 4-bit weights are put on their device while they load.
        if one is not None and not getattr(one, "is_quantized", False):
            nn.Module.to(one, configs.training.device)  # transformers hides the type of its own
    return model, base


def _forget_sharding(training: CPTConfig) -> None:
    """Let models load whole, also where the run that is measured trains with DeepSpeed.

    Its configuration, once made, has transformers partition each model that is loaded (ZeRO-3), and only an
    engine could put that together again.
    """
    if training.deepspeed is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _reported(track: Track, watch: RankWatch) -> Track:
    """What shows the progress, each batch of it a sign of life to the other ranks."""

    def tracked(sequence: Iterable[T], description: str) -> Iterator[T]:
        for one in track(sequence, description):
            watch.at(0, description)
            yield one

    return tracked
