"""What an installation carries."""

import json
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CARRIED = (
    "vlcpt/py.typed",
    "vlcpt/deepspeed_configs/zero3.json",
    "vlcpt/report/templates/card.md.jinja",
    "vlcpt/report/pages/base.html.j2",
    "vlcpt/report/pages/base.css",
    "vlcpt/demo/demo.yaml",
    "vlcpt/demo/base/model.safetensors",
    "vlcpt/demo/base/tokenizer.json",
    "vlcpt/demo/data/new_train.jsonl",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this checkout, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(build)], check=True)
    subprocess.run([*command, "--wheel-dir", str(folder), str(build)], check=True)
    (path,) = folder.glob("vlcpt-*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_carries_the_demo_and_the_deepspeed_configs(wheel: zipfile.ZipFile) -> None:
    assert set(CARRIED) <= set(wheel.namelist())


def test_a_wheel_carries_every_file_that_the_demos_rows_name(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    rows = [
        json.loads(line)
        for name in sorted(names)
        if name.startswith("vlcpt/demo/data/") and name.endswith(".jsonl")
        for line in wheel.read(name).decode().splitlines()
    ]
    media = [path for row in rows for path in (*row.get("images", []), *row.get("videos", []))]

    assert len(media) > 100
    assert {f"vlcpt/demo/data/{path}" for path in media} <= names


def test_a_wheel_carries_every_module_and_the_known_keys(wheel: zipfile.ZipFile) -> None:
    """Packages are listed in setup.cfg one by one: a new folder is easily forgotten."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlcpt").rglob("*.py")}

    assert len(modules) > 50
    assert modules | {"vlcpt/config/keys.json", "vlcpt/config/synonyms.json", "vlcpt/py.typed"} <= set(
        wheel.namelist()
    )


def test_a_wheel_carries_no_tests_and_no_caches(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if name.startswith("tests/") or "__pycache__" in name]


def test_a_wheels_package_finds_its_files_without_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path)
    code = (
        "from pathlib import Path; import vlcpt.demo as demo; from importlib.resources import files; "
        "print(vlcpt.__file__, Path(demo.base_path(), 'config.json').is_file(), "
        "files('vlcpt.deepspeed_configs').joinpath('zero2.json').is_file())"
    )
    run = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vlcpt; {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )

    assert run.stdout.split() == [str(tmp_path / "vlcpt" / "__init__.py"), "True", "True"]


def test_the_installed_package_finds_the_deepspeed_configs() -> None:
    """True for the editable installation that the README makes, which maps a folder from outside."""
    found = {path.name for path in files("vlcpt.deepspeed_configs").iterdir() if path.name.endswith(".json")}

    assert found == {f"{name}.json" for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")}


def test_the_embedded_model_and_data_stay_small() -> None:
    def size(folder: str) -> int:
        return sum(
            path.stat().st_size for path in (ROOT / "vlcpt/demo" / folder).rglob("*") if path.is_file()
        )

    assert 0 < size("base") < 8_000_000
    assert 0 < size("data") < 1_000_000
