"""What NVML says, by a fake of it: totals, others' memory, and what is said where there is none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner.errors import Failure
from vramplan.probes import probe_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 2**30


class NVMLError(Exception):
    pass


class FakeNvml:
    """A driver with one GPU, of UUID GPU-1 or MIG-1."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2

    def __init__(self, *, count: int = 1, broken: str = "", prefix: str = "GPU-", v2: bool = True) -> None:
        self.count, self.broken, self.prefix, self.v2 = count, broken, prefix, v2

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError(self.broken)

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"{self.prefix}1":
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, _: str, version: int | None = None) -> Any:
        if version and not self.v2:
            raise NVMLError("Function Not Found")
        return SimpleNamespace(total=80 * GIB, used=(3 if version else 4) * GIB)

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:
        return handle.startswith("MIG-")

    def nvmlDeviceGetMigMode(self, _: str) -> tuple[int, int]:
        raise NVMLError("Not Supported")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    probe_gpu._nvml.cache_clear()
    yield
    probe_gpu._nvml.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_memory_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    assert probe_gpu.driver() == "580.1"
    assert probe_gpu.memory("1") == (80 * GIB, 4 * GIB, 3 * GIB)
    assert probe_gpu.memory("GPU-1") == (80 * GIB, 4 * GIB, 3 * GIB)
    assert probe_gpu.memory("2") is None
    assert not probe_gpu.sliced("1")


def test_an_old_driver_does_not_tell_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(v2=False))
    assert probe_gpu.memory("1") == (80 * GIB, 4 * GIB, None)


def test_a_mig_slice_is_found_by_its_own_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml(prefix="MIG-"))
    assert probe_gpu.memory("1") is not None
    assert probe_gpu.sliced("1")


@pytest.mark.parametrize(
    ("nvml", "said"),
    [
        (None, "nvidia-ml-py is not installed; pip install"),
        (FakeNvml(broken="Driver Not Loaded"), "no NVIDIA driver answers (Driver Not Loaded); run the probe where"),
        (FakeNvml(count=0), "no NVIDIA GPU is here"),
    ],
)
def test_without_driver_or_gpu(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, said: str) -> None:
    use(monkeypatch, nvml)
    with pytest.raises(Failure, match="^" + said.replace("(", r"\(").replace(")", r"\)")):
        probe_gpu.driver()
