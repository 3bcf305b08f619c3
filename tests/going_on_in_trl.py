"""Go on from a result with TRL's SFTTrainer and DPOTrainer: on text, on images, by the page's own code.

Started with TRL on the path, without vlcpt:

python tests/going_on_in_trl.py BASE RESULT OUTPUT
"""

import json
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, set_seed

PROMPT = [{"role": "user", "content": "What does Fig. 1 show?"}]
PICTURE = Image.linear_gradient("L").convert("RGB").resize((84, 56))
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("The relief valve.", "Nothing.")]
KINDS = ("sft", "dpo", "sft images", "dpo images")
PAGE = Path(__file__).parents[1] / "docs/next-steps.md"
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
}


def load(base: str, result: str) -> torch.nn.Module:
    """The result as anyone would load it, an adapter so that it trains."""
    is_adapter = Path(result, "adapter_config.json").is_file()
    model = AutoModelForImageTextToText.from_pretrained(base if is_adapter else result, dtype=torch.float32)
    return PeftModel.from_pretrained(model, result, is_trainable=True) if is_adapter else model


@torch.no_grad()
def own_loss(model: torch.nn.Module, processor: AutoProcessor, with_images: bool) -> float:
    """Nats per token of the answer, from the result's own chat template and a plain forward pass."""
    parts = [{"type": "image"}] if with_images else []
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": PROMPT[0]["content"]}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    whole = processor.apply_chat_template(asked + ANSWERS[0])
    images = [PICTURE] if with_images else None
    batch = processor(text=[whole], images=images, return_tensors="pt")
    before = processor(text=[prompt], images=images)["input_ids"][0]
    ids = batch["input_ids"][0]
    assert ids[: len(before)].tolist() == list(before)
    logits = model.eval()(**batch).logits[0, len(before) - 1 : -1].float()
    model.train()
    return float(cross_entropy(logits, ids[len(before) :]))


def saved_difference(trainer: object, base: str, folder: Path) -> float:
    """The largest difference of any logit between what is in memory and what was saved and loaded."""
    trainer.save_model(str(folder))
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        here, there = (one.eval()(input_ids=ids).logits for one in (trainer.model, load(base, str(folder))))
    return float((here - there).abs().max())


def go_on(kind: str, base: str, result: str, output: Path) -> dict[str, object]:
    """Two steps: what was expected of the first loss, the losses, and which weights have moved."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    set_seed(0)
    method, _, with_images = kind.partition(" ")
    # The processor for rows with images, the tokenizer for text: as TRL's own documentation has it.
    processor = AutoProcessor.from_pretrained(result)
    reader = processor if with_images else AutoTokenizer.from_pretrained(result)
    model, before = load(base, result), load(base, result)
    # Before a step the policy is its own reference, so that DPO cannot tell the answers apart.
    expected = own_loss(model, processor, bool(with_images)) if method == "sft" else math.log(2)
    pictures = {"images": [PICTURE]} if with_images else {}
    folder = str(output / kind)
    if method == "sft":
        rows = Dataset.from_list([{"prompt": PROMPT, "completion": ANSWERS[0], **pictures}] * 4)
        args = SFTConfig(output_dir=folder, **SETTINGS)
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=reader)
    else:
        row = {"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": ANSWERS[1], **pictures}
        args = DPOConfig(output_dir=folder, **SETTINGS)
        trainer = DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list([row] * 4), processing_class=reader
        )
    trainer.train()
    return outcome(trainer, before, expected, base, output / kind / "result")


def outcome(
    trainer: object, before: torch.nn.Module, expected: float, base: str, folder: Path
) -> dict[str, object]:
    """What came of it: ``before`` is the model as it was loaded."""
    after = dict(trainer.model.named_parameters())
    trained = {name for name, one in before.named_parameters() if one.requires_grad}
    assert trained
    moved = {name for name, one in before.named_parameters() if not torch.equal(one, after[name])}
    return {
        "expected": expected,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "moved": len(moved & trained),
        "frozen moved": len(moved - trained),
        "saved difference": saved_difference(trainer, base, folder),
    }


def by_page(base: str, result: str, folder: Path) -> dict[str, dict[str, object]]:
    """The same of the blocks of docs/next-steps.md as they stand there, but for ``SETTINGS``.

    They read ``merged``, ``chats.jsonl`` and ``pairs.jsonl`` where they are started.
    """
    import trl

    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("merged").symlink_to(result)
    PICTURE.save("valve.png")
    row = {"prompt": PROMPT, "images": ["valve.png"]}
    for name, more in {
        "chats": {"completion": ANSWERS[0]},
        "pairs": {"chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    }.items():
        Path(f"{name}.jsonl").write_text((json.dumps(row | more) + "\n") * 4)
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S):
        method = re.search(r"trl import (\w+)Config", block)
        if not method:
            continue
        set_seed(0)
        before = load(base, result)
        processor = AutoProcessor.from_pretrained(result)
        is_dpo = method[1] == "DPO"
        expected = math.log(2) if is_dpo else own_loss(before, processor, True)
        config, given = getattr(trl, f"{method[1]}Config"), {}
        with mock.patch.object(trl, config.__name__, lambda config=config, **own: config(**own | SETTINGS)):
            exec(compile(block, str(PAGE), "exec"), given)
        found[f"page {method[1]}"] = outcome(given["trainer"], before, expected, base, folder / method[1])
    return found


def main() -> None:
    base, result, output = sys.argv[1:]
    found = {kind: go_on(kind, base, result, Path(output)) for kind in KINDS}
    if not Path(result, "adapter_config.json").is_file():
        found |= by_page(base, result, Path(output) / "page")
    assert "vlcpt" not in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
