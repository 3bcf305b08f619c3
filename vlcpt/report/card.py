"""The model card of what is pushed: what it is, how it was made and how to load it, and nothing private."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup

from vlcpt.report.run_facts import RunFacts, Table

# Characters that mean something in Markdown or HTML; the Hub shows their entities as they are.
_MARKDOWN = re.compile(r"[^\w\s.,;%+/()=–×·'-]")


@dataclass(frozen=True)
class Licence:
    """Under which licence a model is given away.

    Args:
        id: As the Hub spells it, e.g. ``apache-2.0``; None where nobody has said.
        link: Of a licence that the Hub has no name for.

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

    def told(self) -> str:
        """One sentence for the card."""
        stated = f"{self.id} ({self.link})" if self.link else self.id or "not stated"
        return f"{stated}. The licences of the base model and of the data hold besides."


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
    versions: Mapping[str, str],
) -> str:
    """The README.md of a repository: metadata that the Hub reads, then Markdown for people.

    Every value is escaped: names of data sources come from whoever wrote the configuration.

    Args:
        base_model: Hub id of the base; an adapter has one always.
        has_processor: Whether the processor is among the files, or is the base's.

    Example:
        >>> card = model_card("model", "me/mine", RunFacts(), base_model=None, licence=Licence("mit"),
        ...     versions={"vlcpt": "0.1.0"})
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
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    template = environment.from_string((files("vlcpt.report") / "templates/card.md.jinja").read_text("utf-8"))
    body = template.render(
        kind=kind,
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        has_processor=has_processor,
        min_pixels=run.min_pixels,
        max_pixels=run.max_pixels,
        licence=escaped(licence.told()),
        trained=[(escaped(part), escaped(how)) for part, how in run.trained],
        settings=[(key, escaped(value)) for key, value in run.settings],
        data=run.data and _escaped_table(run.data),
        evaluation=run.evaluation and _escaped_table(run.evaluation),
        versions={name: escaped(number) for name, number in versions.items()},
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _escaped_table(table: Table) -> Table:
    return Table(
        tuple(map(escaped, table.columns)),
        tuple((escaped(label), tuple(map(escaped, cells))) for label, cells in table.rows),
        table.note,
    )


def escaped(text: str) -> Markup:
    """Text that Markdown and HTML show as it is: one line, no markup, no control characters.

    Example:
        >>> str(escaped("a|b <c>"))
        'a&#124;b &#60;c&#62;'
    """
    line = " ".join(str(text).split())
    return Markup(
        _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};" if found[0].isprintable() else "\ufffd", line)
    )
