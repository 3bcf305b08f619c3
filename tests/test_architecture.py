"""Which way imports point, what an import costs, and which names are public."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vlcpt

PACKAGE = Path(vlcpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}

# What a part may import of vlcpt, by the beginnings of names; cli, runs and demo may import all.
ALLOWED = {
    "vlcpt.errors": ("vlcpt.errors",),
    "vlcpt.file_writes": ("vlcpt.file_writes",),
    "vlcpt.eval_names": ("vlcpt.eval_names",),
    "vlcpt.run_files": ("vlcpt.run_files", "vlcpt.errors", "vlcpt.folder_locks"),
    "vlcpt.folder_locks": ("vlcpt.folder_locks", "vlcpt.file_writes", "vlcpt.errors"),
    # Formats, names of sources and towers are checked before anything is read.
    "vlcpt.config": (
        *("vlcpt.config", "vlcpt.errors", "vlcpt.deepspeed_configs", "vlcpt.run_files", "vlcpt.eval_names"),
        *("vlcpt.data.documents", "vlcpt.data.families", "vlcpt.data.formats", "vlcpt.data.rows"),
    ),
    "vlcpt.data": (
        *("vlcpt.data", "vlcpt.__version__", "vlcpt.errors", "vlcpt.folder_locks", "vlcpt.file_writes"),
    ),
    "vlcpt.model": (
        *("vlcpt.model", "vlcpt.data.families", "vlcpt.errors", "vlcpt.folder_locks", "vlcpt.file_writes"),
        *("vlcpt.run_files", "vlcpt.data.encode.features"),
    ),
    "vlcpt.training": (
        *("vlcpt.training", "vlcpt.data", "vlcpt.model", "vlcpt.config", "vlcpt.errors", "vlcpt.__version__"),
        *("vlcpt.folder_locks", "vlcpt.file_writes", "vlcpt.run_files", "vlcpt.interrupts"),
        *("vlcpt.eval_names",),
    ),
    "vlcpt.report": (
        *("vlcpt.report", "vlcpt.data", "vlcpt.run_files", "vlcpt.eval_names", "vlcpt.__version__"),
    ),
}
# Heavy or foreign packages that a part must do without.
FORBIDDEN = {
    "vlcpt.data": ("peft", "deepspeed", "bitsandbytes", "accelerate"),
    "vlcpt.data.documents": ("torch", "numpy", "transformers"),
    "vlcpt.data.markup": ("torch", "numpy", "transformers"),
    "vlcpt.data.plan.mix": ("torch", "transformers"),
    "vlcpt.cli": ("torch", "transformers"),
    "vlcpt.config.yaml": ("torch", "transformers"),
    "vlcpt.config.keys": ("torch", "transformers"),
    "vlcpt.config.paths": ("torch", "transformers"),
    "vlcpt.config.rules": ("torch", "transformers"),
    "vlcpt.config.schema": ("torch", "transformers"),
    "vlcpt.errors": ("torch", "transformers"),
    "vlcpt.eval_names": ("torch", "transformers"),
    "vlcpt.folder_locks": ("torch", "transformers"),
    "vlcpt.file_writes": ("torch", "transformers"),
    "vlcpt.run_files": ("torch", "transformers"),
    "vlcpt.interrupts": ("torch", "transformers"),
    "vlcpt.__main__": ("torch", "transformers"),
}
PRINTS = {"vlcpt.cli", "vlcpt.__main__"}
# fmt: off
PUBLIC = [
    "CPTTrainer", "CPTConfig", "ModelConfig", "DataConfig", "CPTDataset", "CPTDataCollator",
    "Document", "Text", "Image", "Video", "Source", "DocumentError", "parse_markup", "read_documents",
    "encode_document", "load_model", "load_processor", "merge_adapter", "push_adapter", "evaluate",
]
# fmt: on
OVERRIDES = {
    "__init__",
    "log",
    "train",
    "get_train_dataloader",
    "_get_train_sampler",
    "get_batch_samples",
    "training_step",
    "compute_loss",
    "create_optimizer",
    "create_scheduler",
    "evaluation_loop",
    "prediction_step",
    "save_model",
}


def imports_of(module):
    """Names of what a module imports, wherever it does so, except for type checking alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in MODULES or node.module == "vlcpt" else str(node.module))
    return found


def is_within(name, prefix):
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}_"))


def within(part):
    return [module for module in MODULES if is_within(module, part)]


def graph():
    """Each module and what of the package it imports, for types alone too."""
    found = {}
    for module, path in MODULES.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and is_within(node.module, "vlcpt"):
                full = {f"{node.module}.{name.name}" for name in node.names}
                imported |= (full & MODULES.keys()) or {node.module}
        found[module] = imported - {module, "vlcpt"}
    return found


def test_no_module_leads_back_to_itself():
    left = graph()
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        left = {module: imported for module, imported in left.items() if module not in free}

    assert set(left) == set()


def undocumented_length(node):
    """Lines of a function or a class without docstrings."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [
        inner.body[0]
        for inner in ast.walk(node)
        if isinstance(inner, documented) and ast.get_docstring(inner, clean=False) is not None
    ]
    return node.end_lineno - node.lineno + 1 - sum(one.end_lineno - one.lineno + 1 for one in texts)


@pytest.mark.parametrize(("kind", "most"), [(ast.FunctionDef, 60), (ast.ClassDef, 250)])
def test_a_function_fits_a_screen_and_a_class_is_one_idea(kind, most):
    lengths = {
        f"{module}.{node.name}": undocumented_length(node)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kind)
    }

    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > most} == {}


def test_the_design_lists_every_module_once():
    tree = (PACKAGE.parent / "docs/design.md").read_text(encoding="utf-8").split("```")[1]
    listed, folders = [], []
    for line in tree.strip().splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        if name.endswith("/"):
            folders = [] if name == "vlcpt/" else [*folders[:level], name]
        else:
            assert name.endswith(".py") and len(line.split()) > 1, line
            listed.append("".join([*folders[:level], name]))

    inside = {path.relative_to(PACKAGE).as_posix() for path in FILES if path.parent.name != "demo"}
    assert sorted(listed) == sorted(path for path in inside if "/" not in path or "__init__" not in path)


def test_tests_mirror_the_package():
    """A test file lies in its module's folder and begins with its name; those of the whole lie on top."""
    strays = []
    for path in (PACKAGE.parent / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(PACKAGE.parent / "tests")
        known = [one.stem for one in (PACKAGE / folder).glob("*") if one.stem != "__init__"]
        if folder.parts and folder.parts[0] != "invariants":
            strays += [] if any(is_within(path.stem[5:], one) for one in known) else [path.name]

    assert strays == []


def test_the_package_was_found():
    assert len(MODULES) > 30
    assert "torch" in imports_of("vlcpt.training.loss")
    assert "vlcpt.data.formats.marked" in imports_of("vlcpt.data.formats.detect")


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    wrong = {
        (module, name)
        for module in within(part)
        for name in imports_of(module)
        if is_within(name, "vlcpt") and not any(is_within(name, one) for one in ALLOWED[part])
    }

    assert within(part)
    assert not wrong


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_does_without_foreign_packages(part):
    wrong = {
        (module, name)
        for module in within(part)
        for name in imports_of(module)
        if name.partition(".")[0] in FORBIDDEN[part]
    }

    assert within(part)
    assert not wrong


def test_only_the_command_line_prints():
    printing = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }

    assert not {module for module in printing - PRINTS if not is_within(module, "vlcpt.demo")}


def test_there_is_no_utils():
    names = {name.rpartition(".")[2].strip("_") for name in MODULES}

    assert not names & {"util", "utils", "helpers", "common", "misc"}


def test_the_public_names_are_the_contracts():
    assert sorted(vlcpt.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(vlcpt, name).__name__ == name
    assert set(PUBLIC) <= set(dir(vlcpt))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vlcpt' has no attribute 'nothing'"):
        _ = vlcpt.nothing


def test_the_trainer_stays_thin():
    tree = ast.parse(MODULES["vlcpt.training.trainer"].read_text(encoding="utf-8"))
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "CPTTrainer")

    methods = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}

    assert methods <= OVERRIDES
    assert "compute_loss" in methods


@pytest.mark.parametrize(
    "code",
    [
        "import vlcpt; names = dir(vlcpt)",
        "import sys; sys.argv = ['vlcpt', '--help']\nfrom vlcpt.__main__ import main\n"
        "try: main()\nexcept SystemExit as done: assert done.code == 0",
    ],
    ids=["import vlcpt", "vlcpt --help"],
)
def test_it_starts_without_torch_in_under_a_second(code):
    loaded = "{'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)"
    command = f"import sys\n{code}\nassert not {loaded}, {loaded}"

    def seconds():
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, cwd=PACKAGE.parent
        )
        assert done.returncode == 0, done.stderr
        return time.monotonic() - start

    # The best of three: another process may hold the cores.
    assert min(seconds() for _ in range(3)) < 1


def test_help_is_shown_by_the_module():
    done = subprocess.run(
        [sys.executable, "-m", "vlcpt", "--help"], capture_output=True, text=True, cwd=PACKAGE.parent
    )

    assert done.returncode == 0
    assert {"demo", "train", "eval", "inspect", "merge", "env"} <= set(done.stdout.split())
