"""What tests share: Hypothesis profiles and fixtures."""

from __future__ import annotations

import os
import shlex
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Examples are the same in every run of CI, and never judged by how busy the machine is.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def _no_calibration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads what the developer's own GPU taught vramplan, nor writes there."""
    os.environ["VRAMPLAN_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def newest_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for the newest known versions, whatever is installed where the tests run."""
    from vramplan.planner import stack

    monkeypatch.setattr(stack, "installed", dict)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line: of a line its exit code, stdout and stderr."""
    from vramplan.planner import cli

    def command(line: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(line))
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return command
