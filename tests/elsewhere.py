"""Load results with plain from_pretrained and print what they give: run with any transformers, without vlcpt.

python tests/elsewhere.py [BASE RESULT LOGITS.npy]…
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def facts_of(base: str, result: str, logits_file: str) -> dict[str, object]:
    """What is the same in every version; the logits go into a file."""
    processor = AutoProcessor.from_pretrained(result)
    image = Image.fromarray((np.arange(90 * 120 * 3).reshape(90, 120, 3) % 251).astype("uint8"))
    text = "<|vision_start|><|image_pad|><|vision_end|> Fig. 1 shows a valve."
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    is_adapter = Path(result, "adapter_config.json").is_file()
    model, info = AutoModelForImageTextToText.from_pretrained(
        base if is_adapter else result, dtype="auto", output_loading_info=True
    )
    dtype = str(model.dtype)
    if is_adapter:
        model = PeftModel.from_pretrained(model, result)
    with torch.no_grad():
        np.save(logits_file, model.float().eval()(**inputs).logits.numpy())
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
    return {
        "ids": inputs["input_ids"].tolist(),
        "tokens": AutoTokenizer.from_pretrained(result)("Fig. <tool_call> é").input_ids,
        "chat": processor.apply_chat_template([message], add_generation_prompt=True),
        "wrong tensors": {kind: sorted(map(str, names)) for kind, names in info.items() if names},
        "dtype": dtype,
    }


def main() -> None:
    given = iter(sys.argv[1:])
    facts = [facts_of(*one) for one in zip(given, given, given, strict=True)]
    print(json.dumps({"version": transformers.__version__, "facts": facts}))


if __name__ == "__main__":
    main()
