"""The versions whose behaviour is planned: what the user names, else what is installed, else the newest known.

Rules are known for a range of versions of each package (`KNOWN`, read from their sources). A version outside it is
planned by the nearest rules, with a warning. Nothing is imported to learn what is installed: the names of the
metadata folders that pip leaves beside a package say it, for a hundredth of the time importlib.metadata takes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from vramplan.planner.errors import UsageError, shown, unknown

if TYPE_CHECKING:
    from collections.abc import Iterable

Version = tuple[int, int]

# The oldest and newest minor version of each whose source was read.
KNOWN: dict[str, tuple[Version, Version]] = {
    "torch": ((2, 11), (2, 15)),
    "transformers": ((5, 17), (5, 24)),
    "peft": ((0, 21), (0, 21)),
    "bitsandbytes": ((0, 50), (0, 50)),
    "accelerate": ((1, 15), (1, 15)),
    "trl": ((1, 16), (1, 16)),
}

_VERSION = (
    r"\d{1,6}(?:\.\d{1,6}){0,4}(?:\.?[a-z+_-][a-z\d.+_-]{0,40})?"  # loose about what follows the numbers: rc1, +cu130
)


class Stack(NamedTuple):
    """The (major, minor) versions whose rules are planned by, all within `KNOWN`.

    `versions` holds each package's version as it was named or found ("2.11.0+cu130"), else the newest known;
    `named` the packages that the user named, `installed` those that were found.
    """

    torch: Version
    transformers: Version
    peft: Version
    bitsandbytes: Version
    accelerate: Version
    trl: Version
    versions: Mapping[str, str]
    named: frozenset[str] = frozenset()
    installed: frozenset[str] = frozenset()

    def warnings(self, used: Iterable[str]) -> tuple[str, ...]:
        """One for each package outside the known versions, of those that were named or that the plan has `used`."""
        used = set(used)
        found = []
        for package in KNOWN:
            asked, rules = _minor(self.versions[package]), getattr(self, package)
            if asked != rules and (package in self.named or package in used):
                side = "older" if asked < rules else "newer"
                planned = f"{rules[0]}.{rules[1]}"
                found.append(
                    f"{package} {self.versions[package]} is {side} than the versions whose rules are known; "
                    f"planned by those of {planned} (--stack)"
                )
        return tuple(found)


def parse_stack(given: str | Mapping[str, object] | None = None) -> Stack:
    """The stack that `given` names: "torch=2.11,transformers=5.17", the same as a dict, or None for what is installed.

    Raises UsageError for an unknown package or for what is not a version number.
    """
    named = {package: _version(package, version) for package, version in _pairs(given)}
    found = {} if len(named) == len(KNOWN) else installed()
    newest = {package: f"{last[0]}.{last[1]}" for package, (_, last) in KNOWN.items()}
    versions = {**newest, **found, **named}
    return Stack(
        **{package: _nearest_known(package, versions[package]) for package in KNOWN},
        versions=versions,
        named=frozenset(named),
        installed=frozenset(found.keys() - named.keys()),
    )


def installed() -> dict[str, str]:
    """The versions of the known packages that this Python would import, as their metadata folders name them."""
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            with os.scandir(folder or ".") as entries:
                names = [entry.name for entry in entries if entry.name.endswith("-info")]
        except OSError:  # zip files, and folders that are not there
            continue
        for name in names:  # torch-2.11.0+cu130.dist-info, or torch-2.11.0-py3.11.egg-info
            package, _, version = name.rpartition(".")[0].partition("-")
            version = version.partition("-")[0]
            if package.lower() in KNOWN and re.fullmatch(_VERSION, version, re.IGNORECASE):
                found.setdefault(package.lower(), version)
    return found


def _pairs(given: str | Mapping[str, object] | None) -> list[tuple[str, object]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, str):
        pairs = []
        for part in given.split(","):
            package, equals, version = part.partition("=")
            if not equals:
                raise UsageError(f"{shown(part)} is no package=version, such as torch=2.11 (--stack)")
            pairs.append((package.strip(), version.strip().lstrip("=")))
    else:
        raise UsageError(f"stack is {shown(given)}; it must be a dict or a text such as torch=2.11,peft=0.21 (--stack)")
    for package, _ in pairs:
        if package not in KNOWN:
            raise unknown("package", package, KNOWN, "--stack")
    if len({package for package, _ in pairs}) < len(pairs):
        raise UsageError(f"{shown(given)} names a package twice (--stack)")
    return pairs


def _version(package: str, version: object) -> str:
    if not isinstance(version, str) or not re.fullmatch(_VERSION, version, re.ASCII | re.IGNORECASE):
        raise UsageError(f"{shown(version)} is no version of {package}; write one such as {_newest(package)} (--stack)")
    return version


def _newest(package: str) -> str:
    major, minor = KNOWN[package][1]
    return f"{major}.{minor}"


def _minor(version: str) -> Version:
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    assert match  # every version was matched by _VERSION
    return int(match[1]), int(match[2] or 0)


def _nearest_known(package: str, version: str) -> Version:
    oldest, newest = KNOWN[package]
    return min(max(_minor(version), oldest), newest)
