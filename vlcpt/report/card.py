"""The model card: what a model is, how it was made and how to load it, without private facts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from vlcpt import __version__
from vlcpt.eval_names import measured_in
from vlcpt.report.plot import plot_differences
from vlcpt.report.screen import Sheet
from vlcpt.report.verdict import verdict
from vlcpt.run_files import read_log, read_mapping, record_of

# Only these keys of config.yaml are shown; the others may hold paths, names or addresses.
# fmt: off
_SHOWN = (
    "learning_rate", "vision_learning_rate", "merger_learning_rate", "embedding_learning_rate",
    "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "replay_share", "untagged", "train_eos",
    "on_overlong", "min_pixels", "max_pixels", "fps", "max_frames", "dtype", "bf16", "fp16", "seed",
    "data_seed",
)
# fmt: on
_SOURCES = ("train_data", "replay_data", "eval_data", "retention_data")
_COUNTS = {
    "documents used": ("documents", "used"),
    "documents dropped": ("documents", "dropped"),
    "targets": ("tokens", "targets"),
    "context tokens": ("tokens", "context"),
    "media tokens": ("tokens", "media"),
    "tokens read": ("tokens", "read"),
}
PLOT = "evaluation.png"  # beside the card
Results = Mapping[str, Mapping[str, object]]
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
_OTHER = "loss, other images"
_MEASURES = {
    "targets": "targets",
    "loss": "loss",
    "perplexity": "perplexity",
    "bits/byte": "bits_per_byte",
    "base's loss": "base_loss",
    _OTHER: "shuffled_images_loss",
    "loss, blank images": "blank_images_loss",
}


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run; empty where its files are not there.

    ``said``, ``differences`` and ``plot`` are of an evaluation that was made with its base or other images.
    """

    trained: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    data: Sheet | None = None
    evaluation: Sheet | None = None
    said: tuple[str, ...] = ()
    differences: Sheet | None = None
    plot: bytes | None = field(default=None, repr=False)
    base: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


def read_run(checkpoint: Path, evaluation: Path | None = None) -> RunFacts:
    """Read what a run left beside its model, or above a checkpoint.

    Args:
        checkpoint: The run's folder, or a ``checkpoint-N`` in it.
        evaluation: What ``vlcpt eval --output`` wrote; else ``eval.json`` in the run's folder or
            its own last evaluation is shown.

    Raises:
        ValueError: If ``evaluation`` is no such file.

    Example:
        >>> read_run(Path("nowhere")) == RunFacts()
        True
    """
    folder, step = record_of(checkpoint)
    config = read_mapping(folder / "config.yaml")
    names = _names(config)
    log = [entry for _, entry in read_log(folder, step)]
    settings = [(key, _value(config[key])) for key in _SHOWN if _was_used(key, config)]
    if log:
        settings.append(("steps done", f"{log[-1]['step']}"))
    found: object = None
    if evaluation is not None:
        found = read_mapping(evaluation)
    elif step is None:  # what is known of the end is not known of a checkpoint
        found = read_mapping(folder / "eval.json")
    results, retention = _evaluated(found, names)
    if results or evaluation is not None:
        measured = _results(results)
        if measured is None:
            raise ValueError(
                f"{evaluation or folder / 'eval.json'} is not what `vlcpt eval --output` writes. Measure the "
                "checkpoint with it first."
            )
    else:
        is_best = config.get("load_best_model_at_end") and step is None
        measured = _logged_evaluation(log, names, config.get("metric_for_best_model") if is_best else None)
    base = config.get("model_name_or_path")
    said = verdict(results, retention)
    return RunFacts(
        trained=tuple(_trained(config, read_mapping(checkpoint / "adapter_config.json"))),
        settings=tuple(settings),
        data=_data(read_mapping(folder / "ledger.json"), names),
        evaluation=measured,
        said=tuple(one.text for one in said.sentences if one.kind != "change"),
        differences=said.table,
        plot=plot_differences(results),
        base=base if isinstance(base, str) and not (folder / base).exists() else None,
        min_pixels=_pixels(config.get("min_pixels")),
        max_pixels=_pixels(config.get("max_pixels")),
    )


def _pixels(value: object) -> int | None:
    """A limit that becomes code in the card, so nothing but a number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _was_used(key: str, config: Mapping[str, object]) -> bool:
    """Whether a setting had an effect: a run is as long as its steps or its epochs say."""
    steps = config.get("max_steps")
    by_steps = isinstance(steps, int) and steps > 0
    if key in ("max_steps", "num_train_epochs"):
        return key in config and by_steps == (key == "max_steps")
    return config.get(key) is not None


def _trained(config: Mapping[str, object], adapter: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Each tower with how it trained."""
    if not config:
        return
    tuning, chosen = config.get("tuning"), config.get("lora_towers")
    for tower in ("vision", "merger", "language"):
        how = "frozen"
        if config.get(f"train_{tower}", tower == "language"):
            has_adapters = tuning != "full" and (not isinstance(chosen, list) or tower in chosen)
            how = _lora(tuning == "qlora", config, adapter) if has_adapters else "in full"
        yield f"{tower} tower" if tower != "merger" else tower, how
    if config.get("train_embeddings"):
        yield "embeddings and output head", "in full"


def _lora(in_4_bits: bool, config: Mapping[str, object], adapter: Mapping[str, object]) -> str:
    # An adapter has its own shape, whatever the configuration says.
    own = {"r": "lora_r"} | {key: key for key in ("lora_alpha", "lora_dropout", "use_dora", "use_rslora")}
    found = {key: adapter.get(key, config.get(name)) for key, name in own.items()}
    kind = ("DoRA" if found["use_dora"] else "LoRA") + (" on 4-bit weights" if in_4_bits else "")
    extra = ", rank-stabilised" if found["use_rslora"] else ""
    alpha, dropout = _value(found["lora_alpha"]), _value(found["lora_dropout"])
    return f"{kind}, r {found['r']}, alpha {alpha}, dropout {dropout}{extra}"


def _names(config: Mapping[str, object]) -> set[str]:
    """The names that the user gave to sources; by default they have the names of their files."""
    entries = [config.get(key) for key in _SOURCES]
    sources = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
    return {str(one["name"]) for one in sources if isinstance(one, dict) and one.get("name")}


def _label(name: str, number: int, names: Set[str]) -> str:
    return name if name in names else f"source {number}"


def _data(ledger: Mapping[str, object], names: Set[str]) -> Sheet | None:
    sources, total = ledger.get("sources"), ledger.get("total")
    if not isinstance(sources, dict) or not isinstance(total, dict):
        return None
    accounts = [(_label(name, place, names), one) for place, (name, one) in enumerate(sources.items(), 1)]
    if len(accounts) > 1:
        accounts.append(("total", total))
    try:
        rows = [
            (label, [_count(one[part][key]) for part, key in _COUNTS.values()]) for label, one in accounts
        ]
    except (KeyError, TypeError):
        return None  # another program's file
    return Sheet("data", [*_COUNTS], rows)


def _count(found: object) -> str:
    if isinstance(found, dict):  # by reason
        reasons = ", ".join(f"{count:,} {reason}".replace("_", " ") for reason, count in found.items())
        return f"{sum(found.values()):,}" + (f" ({reasons})" if reasons else "")
    return f"{found:,}"


def _logged_evaluation(log: list[dict[str, object]], names: Set[str], best: object) -> Sheet | None:
    """What the run last measured; or at the best step by the metric ``best``, if that model was kept."""
    measured = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    step = measured[-1]["step"] if measured else None
    if best:
        scores = [
            (entry[str(best)], entry["step"]) for entry in measured if isinstance(entry.get(str(best)), float)
        ]
        step = min(scores)[1] if scores else None
    found = {key: value for entry in measured if entry["step"] == step for key, value in entry.items()}
    results = {
        _label(name, place, names): {str(number): value for number, value in one.items()}
        for place, (name, one) in enumerate(measured_in(found).items(), 1)
    }
    return _results(results, f", measured at step {step}")


def _evaluated(found: object, names: Set[str]) -> tuple[Results, list[str]]:
    """The sets of what ``vlcpt eval --output`` writes, as the card calls them, and those of retention."""
    sets = found.get("sets") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(sets, dict):
        return {}, []
    kept = found.get("retention")
    labels = {
        name: _label(name, place, names)
        for place, (name, one) in enumerate(sets.items(), 1)
        if isinstance(one, dict)
    }
    retention = [label for name, label in labels.items() if isinstance(kept, list) and name in kept]
    return {label: sets[name] for name, label in labels.items()}, retention


def _results(sets: Results, note: str = "") -> Sheet | None:
    shown = {
        label: key
        for label, key in _MEASURES.items()
        if any(one.get(key) is not None for one in sets.values())
    }
    rows = [(label, [_measure(one.get(key)) for key in shown.values()]) for label, one in sets.items()]
    note += "; other images: of the next document" if _OTHER in shown else ""
    return Sheet("evaluation", [*shown], rows, note) if shown else None


def _measure(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _value(value)


def _value(value: object) -> str:
    """A setting or a measured number.

    Example:
        >>> _value(1e-4), _value(1234.5678), _value(True), _value(32.0), _value(None)
        ('0.0001', '1235', 'yes', '32', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)


# What an entity stands for: HTML, and mathematics, which begins at $$ or \\( and no backslash prevents.
_AS_ENTITY = {"<": "&lt;", "$": "&#36;", "\\": "&#92;"}
# What a backslash keeps as it is: emphasis, code, links, cells; entities; addresses, which become links; what
# begins a list, a heading or a quotation.
_MARKED = re.compile(
    r"[*`~\[\]|]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|(?<=\w)@(?=\w)|(?<=:)/(?=/)|(?<=www)\."
    r"|^(?:>|#(?=[#\s]|$)|[-+=](?=[-+=\s]|$)|\d{1,9}[.)](?=\s|$))",
    re.IGNORECASE,
)
# A licence's address that can be a link as it is.
_ADDRESS = re.compile(r"https?://[\w.-]+(/[\w./~%?#=+,-]*)?", re.ASCII)


@dataclass(frozen=True)
class Licence:
    """The licence of a model.

    Args:
        id: As the Hub spells it, e.g. ``apache-2.0``; None where it is not known.
        link: That of a licence that the Hub has no name for.

    Example:
        >>> Licence("cc-by-4.0").metadata(None)
        {'license': 'cc-by-4.0'}
        >>> Licence().metadata("org/base")["license_link"]
        'https://huggingface.co/org/base'
    """

    id: str | None = None
    link: str | None = None

    def metadata(self, base_model: str | None) -> dict[str, str]:
        """The fields of the card's header; an unstated licence says so, and where the base's is."""
        if self.id and not self.link:
            return {"license": self.id}
        if self.id:
            return {"license": "other", "license_name": self.id, "license_link": str(self.link)}
        found = {"license": "other", "license_name": "unknown"}
        link = self.link or (f"https://huggingface.co/{base_model}" if base_model else None)
        return found | ({"license_link": link} if link else {})

    def sentence(self) -> Markup:
        """One sentence for the card, in Markdown."""
        stated = escaped(self.id or "not stated")
        if self.link:
            is_plain = _ADDRESS.fullmatch(self.link)
            stated = Markup(f"{stated} ({Markup(f'<{self.link}>') if is_plain else escaped(self.link)})")
        return Markup(f"{stated}. The licences of the base model and of the data hold besides.")


def model_card(
    kind: Literal["adapter", "model"],
    repo_id: str,
    run: RunFacts,
    *,
    base_model: str | None,
    base_revision: str | None = None,
    revision: str | None = None,
    has_processor: bool = True,
    licence: Licence,
) -> str:
    """The README.md of a repository: metadata that the Hub reads, then Markdown for people.

    Every value is escaped, or quoted in code: names of sources come from whoever wrote the configuration.

    Args:
        base_model: Hub id of the base; an adapter has one always.
        has_processor: Whether the processor is among the files, or is the base's.

    Example:
        >>> card = model_card("model", "me/mine", RunFacts(), base_model=None, licence=Licence("mit"))
        >>> card.splitlines()[:4]
        ['---', 'library_name: transformers', 'license: mit', 'pipeline_tag: image-text-to-text']
    """
    metadata = ModelCardData(
        base_model=base_model,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["vlcpt", "continued-pretraining", "qwen2.5-vl", *(["lora"] if kind == "adapter" else [])],
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if base_model else None,
        **licence.metadata(base_model),  # type: ignore[arg-type]
    )
    environment = jinja2.Environment(
        autoescape=True, finalize=escaped, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quoted"] = quoted
    template = environment.from_string((files("vlcpt.report") / "templates/card.md.jinja").read_text("utf-8"))
    body = template.render(
        kind=kind,
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        has_processor=has_processor,
        run=run,
        licence=licence.sentence(),
        plot=PLOT,
        versions={"vlcpt": __version__, **{name: version(name) for name in _PACKAGES}},
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def escaped(value: object) -> Markup:
    """A value that Markdown shows as it is: one line, no markup, no link, no control characters.

    What has no meaning in Markdown stays, so that the text of the card can be read, too.

    Example:
        >>> str(escaped("a_b: it's 2.5 > 1, *new* <c> -> -0.007"))
        "a_b: it's 2.5 > 1, \\\\*new\\\\* &lt;c> -> -0.007"
    """
    if isinstance(value, Markup):  # the template's own
        return value
    line = "".join(one if one.isprintable() else "\ufffd" for one in " ".join(str(value).split()))
    # A character at a time: an entity holds what would be escaped.
    marked = {found.end() - 1 for found in _MARKED.finditer(line)}
    shown = (_AS_ENTITY.get(one) or f"\\{one}" * (place in marked) or one for place, one in enumerate(line))
    return Markup("".join(shown))


def quoted(value: object) -> Markup:
    """A value as a string of the card's Python code."""
    return Markup(json.dumps(str(value)))
