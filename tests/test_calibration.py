"""What a probe learned: kept whole or not at all, used where it holds, and otherwise left alone with a warning."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from test_plan import TINY

from vramplan import plan
from vramplan.planner import calibration, catalog, cli, report
from vramplan.planner.calibration import Calibration, load, save
from vramplan.planner.device import device
from vramplan.planner.errors import UsageError
from vramplan.planner.stack import parse_stack

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
STACK = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "bitsandbytes": "0.50.2"}
KNOWN = Calibration("rtx-4090", "580.65.06", STACK, "2026-11-20", 300 * MIB, 20 * MIB, 9 * MIB, "efficient", 1.5e14)
VERSIONS = parse_stack("torch=2.11")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "_DRIVER", tmp_path / "version")
    return tmp_path / "calibrations"


def installed(tmp_path: Path, driver: str) -> None:
    """The kernel module's file as Linux shows it, open and closed."""
    (tmp_path / "version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (root@)  Sun Aug  3\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04) \n"
    )


def only_warning(gpu: str = "rtx-4090", stack: str = "torch=2.11") -> str:
    found, (warning,) = load(gpu, parse_stack(stack))
    assert found is None
    assert "`vramplan probe`" in warning
    return warning


def test_what_was_saved_is_found(folder: Path) -> None:
    file = save(KNOWN)
    assert file.parent == folder
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())
    assert load("rtx-4090", parse_stack("torch=2.11.1,peft=0.20")) == (KNOWN, ())
    assert load("h200", VERSIONS) == (None, ())
    newer = replace(KNOWN, process_bytes=1)
    assert save(newer) == file
    assert load("rtx-4090", VERSIONS) == (newer, ())
    assert list(folder.iterdir()) == [file]  # nothing else was left there


def test_each_minor_version_of_torch_has_its_own() -> None:
    other = replace(KNOWN, stack={"torch": "2.13.0"}, process_bytes=7)
    assert save(other) != save(KNOWN)
    assert load("rtx-4090", parse_stack("torch=2.13")) == (other, ())
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())


def test_another_torch_is_stale() -> None:
    save(KNOWN)
    warning = only_warning(stack="torch=2.12")
    assert "was made with torch 2.11, and 2.12 is planned" in warning


def test_another_driver_is_stale(tmp_path: Path) -> None:
    save(KNOWN)
    installed(tmp_path, "580.65.06")
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())
    installed(tmp_path, "590.10")
    assert "made with driver 580.65.06, and 590.10 is installed" in only_warning()


def test_no_folder_is_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load("rtx-4090", VERSIONS) == (None, ())
    monkeypatch.setenv("VRAMPLAN_DATA_DIR", str(tmp_path / "not" / "there"))
    assert load("rtx-4090", VERSIONS) == (None, ())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is no JSON"),
        ("[1]", "it holds no JSON object"),
        ('{"schema": 2}', "it is of schema 2, which a newer vramplan wrote"),
        ('{"schema": "1"}', "its schema is '1', not 1"),
        ('{"gpu": "x"}', "its schema is None, not 1"),
        ('{"schema": 1, "gpu": "x"}', "it has no driver"),
        ("[" * 10_000, "it is no JSON"),
        (" " * 70_000, "it is larger than 64 KiB"),
    ],
)
def test_a_broken_file_is_left_alone(folder: Path, text: str, why: str) -> None:
    save(KNOWN).write_text(text)
    assert f" is not used: {why};" in only_warning()
    save(KNOWN)  # and a new one may be made
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu", ""), ("gpu", 7), ("driver", "a\nb"), ("date", ["x"]), ("stack", {}), ("stack", {"torch": 2.11}),
        ("stack", "torch"), ("process_bytes", -1), ("process_bytes", 1.5), ("process_bytes", True),
        ("hidden_bytes", 2**50), ("workspace_bytes", "8"), ("kernel", "fast"), ("kernel", []),
        ("matmul_flops_per_s", 0), ("copy_bytes_per_s", "much"), ("notes", "text"), ("notes", [1]),
    ],
)  # fmt: skip
def test_a_value_out_of_place_is_named(name: str, value: object) -> None:
    file = save(KNOWN)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    assert f"not used: {name} is " in only_warning()


def test_infinity_is_no_speed() -> None:
    file = save(KNOWN)
    file.write_text(file.read_text().replace(": 150000000000000.0", ": Infinity"))
    assert "not used: matmul_flops_per_s is inf" in only_warning()


def test_later_fields_are_passed_over() -> None:
    file = save(KNOWN)
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": 1}))
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())


def test_what_could_not_be_loaded_is_not_saved(folder: Path) -> None:
    with pytest.raises(UsageError, match="process_bytes is -1"):
        save(replace(KNOWN, process_bytes=-1))
    assert not folder.exists()


def test_a_full_disk_leaves_the_earlier_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(KNOWN)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(replace(KNOWN, process_bytes=1))
    assert load("rtx-4090", VERSIONS) == (KNOWN, ())
    assert len(list(folder.iterdir())) == 1


def test_a_name_cannot_leave_the_folder(folder: Path) -> None:
    assert save(replace(KNOWN, gpu="../../NVIDIA RTX 6000/Ada")).parent == folder


def test_without_the_variable_platformdirs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv("VRAMPLAN_DATA_DIR")
    assert calibration.folder() == platformdirs.user_data_path("vramplan", appauthor=False) / "calibrations"


# ------------------------------------------------------------------------------------------------------------ in a plan


def test_a_device_takes_what_was_measured() -> None:
    card = catalog.gpu("rtx-4090")
    rule, on = device(card, VERSIONS), device(card, VERSIONS, KNOWN)
    assert (on.context_bytes, on.hidden_bytes, on.workspace_bytes) == (320 * MIB, 20 * MIB, 9 * MIB)
    assert (rule.kernel, on.kernel) == ("flash", "efficient")
    assert (rule.context_measured, on.context_measured) == (False, True)
    nothing = device(card, VERSIONS, Calibration("rtx-4090", "1", STACK, "2026-11-20"))
    assert replace(nothing, calibration=None) == rule


def options(**more: Any) -> dict[str, Any]:
    return {"gpu": "rtx-4090", "stack": STACK, "method": "lora", "seq_len": 64, **more}


def test_a_plan_uses_it_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = plan(TINY, **options())
    save(KNOWN)
    after, without = plan(TINY, **options()), plan(TINY, **options(calibration=False))
    assert before.to_dict() == without.to_dict()
    assert before.to_dict()["calibration"] == {}
    answer = after.to_dict()
    assert answer["calibration"] == {"schema": 1, **KNOWN.to_dict()}
    assert json.loads(json.dumps(answer)) == answer
    assert answer["memory"]["context_bytes"] == 320 * MIB
    assert answer["gpu"] == next(row for row in answer["gpus"] if row["name"] == "rtx-4090")
    assert answer["gpu"]["needed_bytes"] == after.memory.peak_reserved_bytes + 300 * MIB
    parts = {part["name"]: part["bytes"] for part in answer["memory"]["components"]}
    assert parts["cuBLAS workspace"] == 2 * 9 * MIB
    report.print_plan(after)
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "calibrated: CUDA context and cuBLAS workspace and attention kernel as measured on this machine's rtx-4090 "
        "(2026-11-20, driver 580.65.06); --no-calibration plans without"
    ) in out
    assert "not measured on" not in out


def test_a_plan_of_another_gpu_or_of_none_does_not() -> None:
    save(KNOWN)
    for gpu in ("h200", "24GiB", None):
        assert plan(TINY, **options(gpu=gpu)).to_dict()["calibration"] == {}


def test_a_plan_warns_of_one_it_cannot_use() -> None:
    save(KNOWN).write_text("{")
    made = plan(TINY, **options())
    assert any("it is no JSON" in warning for warning in made.warnings)
    assert made.device.calibration is None


def test_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(KNOWN)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "plan.toml").write_text("calibration = false")
    line = [str(tmp_path / "config.json"), "--gpu", "rtx-4090", "--stack", "torch=2.11", "--json"]
    for more, used in (([], True), (["--no-calibration"], False), (["--config", str(tmp_path / "plan.toml")], False)):
        with pytest.raises(SystemExit) as end:
            cli.main([*line, *more])
        assert end.value.code == 0
        assert bool(json.loads(capsys.readouterr().out)["calibration"]) is used
    with pytest.raises(UsageError, match="calibration is 'no'; it must be true or false"):
        plan(TINY, **options(calibration="no"))


def test_a_measured_kernel_is_the_one_that_is_planned() -> None:
    peaks = {}
    for kernel in calibration.KERNELS:
        save(replace(KNOWN, kernel=kernel))  # type: ignore[arg-type]
        memory = plan("smollm2-135m", **options(seq_len=512, gradient_checkpointing=False)).memory
        peaks[kernel] = memory.peak_allocated_bytes
    assert peaks["math"] > peaks["flash"]  # it keeps the weights of every pair of tokens
    assert peaks["efficient"] == peaks["math"]  # grouped heads are beyond the memory-efficient kernel
    assert peaks["cudnn"] == peaks["flash"]  # an RTX 4090 is none of cuDNN's
