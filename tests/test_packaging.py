"""The house: what is shipped, what it depends on, and which way imports go."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import vramplan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "numpy"}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or anywhere else, but not for type checkers alone."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(file.read_text("utf-8")))
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "planner").glob("*.py")), ids=lambda file: file.name)
def test_the_planner_imports_neither_torch_nor_probes(file: Path) -> None:
    names = imported(file)
    assert not {name for name in names if name.split(".")[0] in HEAVY}
    if file.name != "cli.py" and not file.name.startswith("report"):  # the edge: what runs a command, and what shows it
        assert not {name for name in names if name.startswith("vramplan.probes")}
        assert not {name for name in names if re.match(r"click|rich|vramplan\.planner\.(cli|report)", name)}


def test_only_the_report_prints() -> None:
    for file in (ROOT / "planner").glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        prints = [call.id for call in calls if isinstance(call, ast.Name) and call.id in ("print", "input")]
        assert not prints or file.name.startswith("report"), file.name


def test_tables_hold_data_only() -> None:
    assert [file.name for file in (ROOT / "tables").rglob("*.py")] == ["__init__.py"]
    assert len((ROOT / "tables" / "__init__.py").read_text("utf-8").strip().splitlines()) <= 1


def test_every_table_is_shipped() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["vramplan.tables"]
    shipped = resources.files("vramplan.tables")
    for file in (ROOT / "tables").rglob("*"):
        name = file.relative_to(ROOT / "tables").as_posix()
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name
            assert shipped.joinpath(*name.split("/")).is_file(), name


def test_every_module_is_shipped() -> None:
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert set(folders) == set(PYPROJECT["tool"]["setuptools"]["packages"])
    installed = Path(vramplan.__file__).parent
    for package, folder in folders.items():
        inside = installed.joinpath(*package.split(".")[1:])
        for file in (ROOT / folder).glob("*.py"):
            assert (inside / file.name).is_file(), file
    assert (installed / "py.typed").is_file()


def test_links_lead_to_the_folders() -> None:
    for name in ("planner", "probes", "tables"):
        assert (ROOT / "src" / "vramplan" / name).resolve() == ROOT / name


def test_one_version() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert importlib.metadata.version("vramplan") == vramplan.__version__


def test_a_plan_needs_few_packages() -> None:
    project = PYPROJECT["project"]
    core = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}  # type: ignore[index]
    assert core >= {"click", "rich", "huggingface_hub"}
    assert len(core) <= 8
    assert not core & HEAVY
    assert set(project["optional-dependencies"]) >= {"probe", "test"}


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_changelog_has_a_section_to_write_in() -> None:
    assert re.search(r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_ci_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    readme = (ROOT / "README.md").read_text("utf-8")
    for pattern in re.findall(r"grep -m 1 ['\"](.*?)['\"] README\.md", script.read_text("utf-8")):
        assert re.search(pattern, readme, re.MULTILINE)
