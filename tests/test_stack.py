"""The versions that are planned: as named, as found, and outside what is known."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner import stack
from vramplan.planner.errors import UsageError
from vramplan.planner.stack import KNOWN, parse_stack

if TYPE_CHECKING:
    from pathlib import Path


def message(given: Any) -> str:
    with pytest.raises(UsageError) as error:
        parse_stack(given)
    assert str(error.value).endswith("(--stack)")
    return str(error.value)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only place where packages could be installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "missing"), str(tmp_path)])
    return tmp_path


def test_nothing_installed_is_the_newest_known(site: Path) -> None:
    planned = parse_stack()
    assert {package: getattr(planned, package) for package in KNOWN} == {name: new for name, (_, new) in KNOWN.items()}
    assert planned.warnings(KNOWN) == ()


def test_what_is_installed_is_found_by_its_metadata(site: Path) -> None:
    for name in ("torch-2.12.1+cu130.dist-info", "Peft-0.21.0-py3.11.egg-info", "torchvision-0.27.0.dist-info"):
        (site / name).mkdir()
    (site / "transformers-x.dist-info").mkdir()
    assert stack.installed() == {"torch": "2.12.1+cu130", "peft": "0.21.0"}
    planned = parse_stack()
    assert planned.torch == (2, 12)
    assert planned.versions["torch"] == "2.12.1+cu130"
    assert planned.installed == {"torch", "peft"}


def test_the_first_folder_of_the_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, version in (("first", "2.11.0"), ("second", "2.12.0")):
        (tmp_path / folder / f"torch-{version}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second")])
    assert stack.installed() == {"torch": "2.11.0"}


@pytest.mark.parametrize(
    "given",
    [
        "torch=2.11,transformers=5.17",
        "torch==2.11.0+cu130, transformers = 5.17.0",
        {"torch": "2.11", "transformers": "5.17"},
    ],
)
def test_named_versions_come_before_installed_ones(given: Any, site: Path) -> None:
    (site / "torch-2.13.0.dist-info").mkdir()
    planned = parse_stack(given)
    assert (planned.torch, planned.transformers) == ((2, 11), (5, 17))
    assert planned.named == {"torch", "transformers"}
    assert planned.warnings(KNOWN) == ()


def test_other_versions_take_the_nearest_rules_with_a_warning(site: Path) -> None:
    planned = parse_stack("torch=2.5.1,transformers=6.0.0rc1,trl=2")
    assert (planned.torch, planned.transformers, planned.trl) == (KNOWN["torch"][0], KNOWN["transformers"][1], (1, 16))
    older, newer, trl = planned.warnings(())
    assert older == ("torch 2.5.1 is older than the versions whose rules are known; planned by those of 2.11 (--stack)")
    assert newer.startswith("transformers 6.0.0rc1 is newer than ")
    assert trl.startswith("trl 2 is newer than ")


def test_an_installed_package_that_a_plan_does_not_meet_is_no_warning(site: Path) -> None:
    (site / "trl-0.9.0.dist-info").mkdir()
    assert parse_stack().warnings(["torch"]) == ()
    assert "trl 0.9.0 is older" in parse_stack().warnings(["torch", "trl"])[0]


def test_patch_versions_have_the_same_rules(site: Path) -> None:
    assert parse_stack("torch=2.15.9,peft=0.21.2,accelerate=1.15.0.dev0").warnings(KNOWN) == ()


def test_what_is_no_stack() -> None:
    assert message("torhc=2.11") == "unknown package 'torhc'; did you mean torch or trl? (--stack)"
    assert message("torch") == "'torch' is no package=version, such as torch=2.11 (--stack)"
    assert message("").startswith("'' is no package=version")
    assert message("torch=2.11,torch=2.12").endswith("names a package twice (--stack)")
    for version in ("", "two", "2..1", "-1", "2.11\n", "9" * 99, "2.11 "):
        assert f"{version!r}"[:20] in message({"torch": version})
    for other in (2.11, None, ["2.11"], True):
        assert "is no version of torch; write one such as 2.15" in message({"torch": other})
    for given in (3, ["torch=2.11"], True):
        assert "it must be a dict or a text" in message(given)
