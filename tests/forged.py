"""Files of a checkpoint as somebody forges or breaks them."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlcpt.training.checkpoints.files import MANIFEST, write_manifest

# What no message may say: how to weaken a check.
ADVICE = (
    "trust_remote_code",
    "weights_only",
    "ignore_mismatched",
    "TORCH_FORCE",
    "safe_globals",
    "pickle_module",
)
Change = Callable[[Path], None]
PETABYTE = 10**15


class Runs:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def remanifest(folder: Path) -> None:
    """Write the manifest anew, over what is there now, with the facts that it had."""
    path = folder / MANIFEST
    if path.is_file():
        run = json.loads(path.read_text())["run"]
        path.unlink()
        write_manifest(folder, run)


def in_json(name: str, **entries: object) -> Change:
    """Set entries of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def raw(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Change:
    """Half of a file."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def huge_header(name: str) -> Change:
    """Safetensors whose header claims a petabyte."""
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [PETABYTE // 4], "data_offsets": [0, PETABYTE]}}
    ).encode()
    return raw(name, len(header).to_bytes(8, "little") + header)


def tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Other tensors in a safetensors file."""

    def change(folder: Path) -> None:
        held = edit(load_file(folder / name))
        save_file({key: one.clone() for key, one in held.items()}, folder / name, metadata={"format": "pt"})

    return change


def saved(name: str, edit: Callable[[object], object]) -> Change:
    """Something else in a file of torch.save."""

    def change(folder: Path) -> None:
        torch.save(edit(torch.load(folder / name, weights_only=False)), folder / name)

    return change


def program(name: str, also_delete: str | None = None) -> Change:
    """A pickle that runs code."""

    def change(folder: Path) -> None:
        if also_delete:
            (folder / also_delete).unlink()
        torch.save({"state": Runs(folder / "ran")}, folder / name)

    return change


def bare_program(name: str) -> Change:
    """The same, as pickle itself writes it."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Runs(folder / "ran")))


ADAPTER = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
SETTING = r"adapter_config\.json"
# What is done to an adapter, and the file or key that the message names.
ADAPTERS: dict[str, tuple[Change, str]] = {
    "r of a billion": (in_json(SETTINGS, r=10**9), rf"{SETTING}: r is 1000000000"),
    "r of 60000": (in_json(SETTINGS, r=60_000), rf"{SETTING}: r is 60000, but the tensors"),
    "r of a billion for some": (
        in_json(SETTINGS, rank_pattern={"q_proj": 10**9}),
        rf"{SETTING}: rank_pattern is",
    ),
    "r of 60000 for some": (in_json(SETTINGS, rank_pattern={"q_proj": 60_000}), r"of another shape"),
    "r of 0": (in_json(SETTINGS, r=0), rf"{SETTING}: r is 0"),
    "r in words": (in_json(SETTINGS, r="four"), rf"{SETTING}: r is 'four'"),
    "no r": (in_json(SETTINGS, r=None), rf"{SETTING}: r is None"),
    "alpha in words": (in_json(SETTINGS, lora_alpha="x"), rf"{SETTING}: lora_alpha is 'x'"),
    "dropout of 2": (in_json(SETTINGS, lora_dropout=2), rf"{SETTING}: lora_dropout is 2"),
    "other layers": (in_json(SETTINGS, target_modules=["q_proj"]), r"unexpected|LoRA"),
    "no such layer": (in_json(SETTINGS, target_modules=["nope"]), r"adapter_config\.json|LoRA"),
    "layers by number": (in_json(SETTINGS, target_modules=3), rf"{SETTING}: target_modules is 3"),
    "a pattern that never ends": (
        in_json(SETTINGS, target_modules="([a-z_.0-9]+)+!"),
        rf"{SETTING}: target_modules is",
    ),
    "no pattern": (in_json(SETTINGS, target_modules="(("), rf"{SETTING}: target_modules is"),
    "IA3": (in_json(SETTINGS, peft_type="IA3"), rf"{SETTING}: peft_type is 'IA3'"),
    "prompts": (in_json(SETTINGS, peft_type="PROMPT_TUNING"), rf"{SETTING}: peft_type is 'PROMPT_TUNING'"),
    "no kind that exists": (in_json(SETTINGS, peft_type="MINE"), rf"{SETTING}: peft_type is 'MINE'"),
    "a module to import": (
        in_json(SETTINGS, megatron_config={"a": 1}, megatron_core="this"),
        rf"{SETTING}: megatron_config is",
    ),
    "a list": (text(SETTINGS, "[1]"), rf"{SETTING}: expected a JSON object"),
    "no JSON": (text(SETTINGS, '{"r": '), rf"{SETTING}: line 1 is no JSON"),
    "deep JSON": (text(SETTINGS, "[" * 100_000), SETTING),
    "no UTF-8": (raw(SETTINGS, b"\xff\xfe{"), rf"{SETTING}: it is no text in UTF-8"),
    "a tensor missing": (tensors(ADAPTER, lambda held: dict(list(held.items())[1:])), r"1 missing"),
    "a tensor more": (tensors(ADAPTER, lambda held: held | {"extra": torch.ones(1)}), r"1 unexpected"),
    "another shape": (
        tensors(ADAPTER, lambda held: {key: one[..., :1] for key, one in held.items()}),
        r"of another shape",
    ),
    "half of the weights": (cut(ADAPTER), r"adapter_model\.safetensors: it is no complete"),
    "no weights": (raw(ADAPTER, b""), r"adapter_model\.safetensors: it is no complete"),
    "a petabyte": (huge_header(ADAPTER), r"adapter_model\.safetensors: it is no complete"),
    "a header of 2^60": (
        raw(ADAPTER, (2**60).to_bytes(8, "little") + b"{}"),
        r"adapter_model\.safetensors: it is no",
    ),
}
# Where the weights are a pickle: what a resume says is another thing, as its own are never one.
PICKLES: dict[str, tuple[Change, str]] = {
    "a program": (program("adapter_model.bin", ADAPTER), r"adapter_model\.(bin: it is a pickle|safetensors)"),
}


def in_group(**entries: object) -> Change:
    """Set entries of each group of an optimizer's state."""

    def edit(held: dict) -> dict:
        for group in held["param_groups"]:
            group |= entries
        return held

    return saved("optimizer.pt", edit)


def in_state(edit: Callable[[dict], dict]) -> Change:
    """Another state of each parameter."""

    def whole(held: dict) -> dict:
        return held | {"state": {number: edit(one) for number, one in held["state"].items()}}

    return saved("optimizer.pt", whole)


def compressed(name: str) -> Change:
    """The same file, its members compressed: a gigabyte of zeros takes a megabyte."""

    def change(folder: Path) -> None:
        with zipfile.ZipFile(folder / name) as archive:
            held = {one.filename: archive.read(one) for one in archive.infolist()}
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in held.items():
                archive.writestr(member, content)

    return change


def in_saved(name: str, **entries: object) -> Change:
    return saved(name, lambda held: held | entries)


OPTIMIZER = r"checkpoint-2/optimizer\.pt: "
SCHEDULER = r"checkpoint-2/scheduler\.pt: "
RANDOM = r"checkpoint-2/rng_state\.pth: "
PROGRESS = r"checkpoint-2/trainer_state\.json: "
MOMENTUM = {"momentum_buffer": torch.zeros(1)}
STATES: dict[str, tuple[Change, str]] = {
    "optimizer: a program": (program("optimizer.pt"), OPTIMIZER + "it is a pickle"),
    "optimizer: a bare program": (bare_program("optimizer.pt"), OPTIMIZER + "it is cut, or no"),
    "optimizer: half": (cut("optimizer.pt"), OPTIMIZER + "it is cut, or no"),
    "optimizer: nothing": (raw("optimizer.pt", b""), OPTIMIZER + "it is cut, or no"),
    "optimizer: text": (raw("optimizer.pt", b"{}" * 99), OPTIMIZER + "it is cut, or no"),
    "optimizer: compressed": (compressed("optimizer.pt"), OPTIMIZER + "it is compressed"),
    "optimizer: a list": (saved("optimizer.pt", lambda held: [1]), OPTIMIZER + "it holds no state"),
    "optimizer: a group less": (
        saved("optimizer.pt", lambda held: held | {"param_groups": []}),
        OPTIMIZER + r"it has 0 groups of parameters, and this run has \d",
    ),
    "optimizer: a group more": (
        saved("optimizer.pt", lambda held: held | {"param_groups": held["param_groups"] * 2}),
        OPTIMIZER + "it has 2 groups of parameters",
    ),
    "optimizer: a parameter less": (in_group(params=[0]), OPTIMIZER + "params of its group language is "),
    "optimizer: of SGD": (
        saved(
            "optimizer.pt",
            lambda held: {
                "state": dict.fromkeys(held["state"], MOMENTUM),
                "param_groups": [
                    {"params": one["params"], "lr": 0.1, "momentum": 0.9} for one in held["param_groups"]
                ],
            },
        ),
        OPTIMIZER + "its group language has no .*: it was saved by another optimizer",
    ),
    "optimizer: states of SGD": (
        in_state(lambda one: MOMENTUM),
        OPTIMIZER + "parameter 0 has no .*: it was saved by another optimizer",
    ),
    "optimizer: empty states": (in_state(lambda one: {}), OPTIMIZER + "parameter 0 has no "),
    "optimizer: numbers for states": (in_state(lambda one: 3), OPTIMIZER + "it has a state for"),
    "optimizer: other shapes": (
        in_state(lambda one: one | {"exp_avg": torch.zeros(3, 5)}),
        OPTIMIZER + r"exp_avg of parameter 0 has the shape \(3, 5\)",
    ),
    "optimizer: NaN": (
        in_state(lambda one: one | {"exp_avg": one["exp_avg"] * float("nan")}),
        OPTIMIZER + "exp_avg of parameter 0 holds numbers that are not finite",
    ),
    "optimizer: infinite": (
        in_state(lambda one: one | {"exp_avg_sq": one["exp_avg_sq"] + float("inf")}),
        OPTIMIZER + "exp_avg_sq of parameter 0 holds numbers that are not finite",
    ),
    "optimizer: negative squares": (
        in_state(lambda one: one | {"exp_avg_sq": one["exp_avg_sq"] - 1}),
        OPTIMIZER + "exp_avg_sq of parameter 0 holds negative numbers",
    ),
    "optimizer: rate in words": (in_group(lr="x"), OPTIMIZER + "lr of its group language is x"),
    "optimizer: rate NaN": (in_group(lr=float("nan")), OPTIMIZER + "lr of its group language is nan"),
    "optimizer: betas of 2": (in_group(betas=(2, 2)), OPTIMIZER + "betas of its group language"),
    "optimizer: betas missing": (in_group(betas=None), OPTIMIZER + "betas of its group language is None"),
    "scheduler: a program": (program("scheduler.pt"), SCHEDULER + "it is a pickle"),
    "scheduler: half": (cut("scheduler.pt"), SCHEDULER + "it is cut, or no"),
    "scheduler: a list": (saved("scheduler.pt", lambda held: [1]), SCHEDULER + "it holds no state"),
    "scheduler: empty": (saved("scheduler.pt", lambda held: {}), SCHEDULER + "it has no base_lrs"),
    "scheduler: a method": (in_saved("scheduler.pt", step=1), SCHEDULER + "it would replace 'step'"),
    "scheduler: the optimizer": (
        in_saved("scheduler.pt", optimizer=1),
        SCHEDULER + "it would replace 'optim",
    ),
    "scheduler: rates of others": (in_saved("scheduler.pt", base_lrs=[1.0] * 7), SCHEDULER + "base_lrs is"),
    "scheduler: rate NaN": (in_saved("scheduler.pt", base_lrs=[float("nan")]), SCHEDULER + "base_lrs is"),
    "scheduler: epoch in words": (in_saved("scheduler.pt", last_epoch="x"), SCHEDULER + "last_epoch is x"),
    "random: a program": (program("rng_state.pth"), RANDOM + "it is a pickle"),
    "random: half": (cut("rng_state.pth"), RANDOM + "it is cut, or no"),
    "random: a list": (saved("rng_state.pth", lambda held: [1]), RANDOM + "it holds no state"),
    "random: others": (in_saved("rng_state.pth", python=(3, (1, 2), None)), RANDOM + "it holds no state"),
    "random: no tensor": (in_saved("rng_state.pth", cpu=3), RANDOM + "it holds no state"),
    "progress: no JSON": (text("trainer_state.json", "{"), PROGRESS + "it is no JSON"),
    "progress: deep": (text("trainer_state.json", "[" * 100_000), PROGRESS + "it is no JSON"),
    "progress: a list": (text("trainer_state.json", "[]"), PROGRESS + "expected a JSON object"),
    "progress: another key": (in_json("trainer_state.json", mine=1), PROGRESS + "it has the key 'mine'"),
    "progress: step in words": (
        in_json("trainer_state.json", global_step="x"),
        PROGRESS + "global_step is x",
    ),
    "progress: another step": (
        in_json("trainer_state.json", global_step=3),
        PROGRESS + "global_step is 3, in",
    ),
    "progress: a list of steps": (
        in_json("trainer_state.json", log_history=[3]),
        PROGRESS + "log_history is",
    ),
    "progress: callbacks": (
        in_json("trainer_state.json", stateful_callbacks=[1]),
        PROGRESS + "stateful_callbacks is",
    ),
    "failed: no list": (text("failed_documents.json", "[3]"), r"failed_documents\.json: it does not list"),
    "failed: no document": (
        text(
            "failed_documents.json",
            '{"failed": [[99, 1, ["a", 1, null, "x", "y"], "m", true]], "in_a_row": []}',
        ),
        r"failed_documents\.json: it does not list",
    ),
}

MODEL = "model.safetensors"
WEIGHTS: dict[str, tuple[Change, str]] = {
    "half of the weights": (cut(MODEL), r"model\.safetensors: it is no complete"),
    "no weights": (raw(MODEL, b""), r"model\.safetensors: it is no complete"),
    "a petabyte": (huge_header(MODEL), r"model\.safetensors: it is no complete"),
    "a tensor missing": (tensors(MODEL, lambda held: dict(list(held.items())[1:])), r"1 missing|parameters"),
    "a tensor more": (tensors(MODEL, lambda held: held | {"extra": torch.ones(1)}), r"1 unexpected"),
    "other shapes": (
        tensors(MODEL, lambda held: {k: torch.cat([v, v]) for k, v in held.items()}),
        "of another shape|mismatched",
    ),
    "a program": (program("pytorch_model.bin", MODEL), r"pytorch_model\.bin: it is a pickle"),
}


def in_text_config(**entries: object) -> Change:
    """Set entries of the language model's configuration, wherever this layout has them."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        found = json.loads(path.read_text())
        inner = found.get("text_config", found)
        inner |= entries
        path.write_text(json.dumps(found))

    return change


CONFIG = r"config\.json"
BASES: dict[str, tuple[Change, str]] = {
    "a billion layers": (
        in_text_config(num_hidden_layers=10**9),
        CONFIG + ".*num_hidden_layers is 1000000000",
    ),
    "999 layers": (in_text_config(num_hidden_layers=999), CONFIG + "|layers"),
    "a wide model": (in_text_config(hidden_size=2**20), CONFIG),
    "a vast vocabulary": (in_text_config(vocab_size=2**31 - 1), CONFIG + " describes a model of"),
    "sizes that overflow": (in_text_config(hidden_size=2**31, intermediate_size=2**31), CONFIG),
    "a size above all": (
        in_text_config(intermediate_size=10**18),
        CONFIG + ".*intermediate_size is 10000000",
    ),
    "no heads": (in_text_config(num_attention_heads=0), CONFIG),
    "sizes in words": (in_text_config(hidden_size="wide"), CONFIG + "|no model could be loaded"),
    "a type that is none": (in_json("config.json", dtype="load"), CONFIG + ": dtype is 'load'"),
    "a list": (text("config.json", "[1]"), CONFIG + ": expected a JSON object"),
    "no JSON": (text("config.json", '{"a": '), CONFIG + ": line 1 is no JSON"),
    "deep JSON": (text("config.json", "[" * 100_000), CONFIG + ": it is nested too deeply"),
    "code of its own": (
        in_json("config.json", auto_map={"AutoConfig": "mine.Mine"}, model_type="mine"),
        "no model could be loaded",
    ),
}
