"""Go on from a result with TRL's SFTTrainer and DPOTrainer: started with TRL on the path, without vlcpt.

python tests/going_on_in_trl.py BASE RESULT OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer, set_seed

PROMPT = [{"role": "user", "content": "What does Fig. 1 show?"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("The relief valve.", "Nothing.")]
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


def go_on(kind: str, base: str, result: str, output: Path) -> dict[str, object]:
    """Two steps; the losses, and whether a weight that trains has moved."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    set_seed(0)
    model, tokenizer = load(base, result), AutoTokenizer.from_pretrained(result)
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    assert before
    if kind == "sft":
        rows = Dataset.from_list([{"prompt": PROMPT, "completion": ANSWERS[0]}] * 4)
        args = SFTConfig(output_dir=str(output / kind), **SETTINGS)
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    else:
        rows = Dataset.from_list([{"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}] * 4)
        args = DPOConfig(output_dir=str(output / kind), **SETTINGS)
        trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    after = dict(trainer.model.named_parameters())
    moved = sum(not torch.equal(one, after[name]) for name, one in before.items() if name in after)
    return {"losses": losses, "moved": moved}


def main() -> None:
    base, result, output = sys.argv[1:]
    found = {kind: go_on(kind, base, result, Path(output)) for kind in ("sft", "dpo")}
    assert "vlcpt" not in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
