"""The command as a user meets it: words in, an answer on stdout, one sentence on stderr, and the exit code."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from test_plan import TINY

import vramplan
from vramplan.planner import cli, verify
from vramplan.planner import plan as plan_module
from vramplan.planner.errors import Failure
from vramplan.planner.training import OPTIONS
from vramplan.probes import probe

CONFIGS = Path(__file__).parent / "data" / "configs"
COMMANDS = {"vramplan": cli.cli, **{f"vramplan {name}": command for name, command in cli.cli.commands.items()}}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the folder it happens to run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))


@pytest.fixture
def wrong(run: Any) -> Any:
    def command(line: str) -> str:
        code, out, err = run(line)
        assert (code, out) == (2, "")
        assert err.startswith("vramplan: ")
        assert err.count("\n") == 1
        return str(err)[len("vramplan: ") : -1]

    return command


def test_a_model_alone_is_planned(run: Any) -> None:
    code, out, err = run("./config.json")
    assert (code, err) == (0, "")
    assert out.startswith(f"{Path.cwd().name}, QLoRA r=16 on all linear layers")
    assert run("plan ./config.json") == (0, out, "")
    assert run("--rank 16 ./config.json --method qlora") == (0, out, "")


def test_json_is_the_plans_own(run: Any) -> None:
    code, out, err = run("./config.json --method lora --rank 4 --json --stack torch=2.11")
    assert (code, err) == (0, "")
    assert json.loads(out) == vramplan.plan("./config.json", method="lora", rank=4, stack="torch=2.11").to_dict()


def test_every_option_has_one_name(run: Any) -> None:
    given = {
        "method": "lora", "rank": 8, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
        "batch_size": 2, "seq_len": 64, "padded": True, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False, "optimizer": "sgd", "weights_dtype": "fp32", "mixed_precision": "no",
        "attention": "eager", "trainer": "transformers", "expandable_segments": True, "num_gpus": 1, "parallel": "none",
        "examples": 10, "tokens_per_example": 32, "epochs": 1.5,
    }  # fmt: skip
    words = []
    for name, value in given.items():
        flag = OPTIONS[name].flag
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    code, out, _ = run(f"./config.json --json {shlex.join(words)}")
    assert code == 0
    used = json.loads(out)["options"]
    assert {name: used[name] for name in given} == given
    qlora = json.loads(run("./config.json --json --no-double-quant --no-prepare-kbit")[1])["options"]
    assert (qlora["double_quant"], qlora["prepare_kbit"]) == (False, False)


def test_the_exit_code_says_whether_it_fits(run: Any) -> None:
    assert run("./config.json --gpu 24GiB")[0] == 0
    code, out, err = run("./config.json --gpu 0.5GiB")
    assert (code, err) == (1, "")
    assert "does not fit 0.5GiB" in out
    code, out, _ = run("./config.json --gpu 0.5GiB --json")
    assert code == 1
    assert json.loads(out)["gpu"]["fits"] is False


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lama-3.1-8b", "did you mean llama-3.1-8b"),
        ("plan", "no model is named; add one, such as vramplan llama-3.1-8b (MODEL)"),
        ("--rank 3", "no model is named"),
        ("./config.json --method qlra", "unknown method 'qlra'; did you mean qlora or lora? (--method)"),
        ("./config.json --optimizer adamw_8bits", "did you mean adamw_8bit"),
        ("./config.json --gpu h20", "(--gpu)"),
        ("./config.json --gpu ''", "(--gpu)"),
        ("./config.json --gpu -3GiB", "(--gpu)"),
        ("./config.json --target-modules q_prj", "did you mean q_proj"),
        ("./config.json --rank 0", "rank is '0'; it must be a whole number from 1"),
        ("./config.json --rank 300", "rank 300 is larger than the largest side of every adapted matrix, 128 (--rank)"),
        ("./config.json --batch-size=-1", "batch_size is '-1'"),
        ("./config.json --seq-len 99999999999999999999", "seq_len is '99999999999999999999'"),
        ("./config.json --method full --rank 16", "rank 16 belongs to lora and qlora"),
        (
            "./config.json --optimizer paged_adamw_8bit --num-gpus 2 --parallel fsdp",
            "cannot step fsdp's sharded tensors",
        ),
        ("./config.json --weights-dtype fp16", "contradict each other"),
        ("./config.json --num-gpus 1025", "1,024"),
        ("./config.json --trainer unsloth", "planned in a later version"),
        ("./config.json --stack torhc=2.11", "unknown package 'torhc'"),
        ("./config.json --rnak 3", "--rank"),
        ("./config.json --rank", "Option '--rank' requires an argument."),
        ("./config.json --json=3", "Option '--json' does not take a value."),
        ("./config.json more words", "Got unexpected extra arguments (more words)"),
        ("./missing.json", "cannot read 'missing.json': no such file or directory (MODEL)"),
        ("modles", "or was the command models meant?"),
        ("models no-such-model", "unknown model 'no-such-model'"),
        ("gpus rtx-9090", "unknown GPU 'rtx-9090'; did you mean"),
        ("''", "unknown model ''"),
    ],
)
def test_a_wrong_question_is_answered_with_one_sentence(line: str, words: str, wrong: Any) -> None:
    assert words in wrong(line)


BAD_CONFIGS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "an empty object": b"{}",
    "not UTF-8": b'\xff{"model_type": "llama"}',
    "nested": b"[" * 100_000,
    "a huge number": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    "no model_type": b'{"hidden_size": 64}',
    "an unknown model_type": b'{"model_type": "lama"}',
    "a wrong type": b'{"model_type": "llama", "hidden_size": "64"}',
    "a negative size": b'{"model_type": "llama", "num_hidden_layers": -1}',
    "NaN": b'{"model_type": "llama", "hidden_size": NaN}',
    "a quantised base": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
    "an adapter": b'{"peft_type": "LORA", "base_model_name_or_path": "x/y"}',
}


@pytest.mark.parametrize("content", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs(content: bytes, wrong: Any) -> None:
    Path("bad.json").write_bytes(content)
    assert len(wrong("bad.json")) < 400


def test_bad_files(wrong: Any) -> None:
    with Path("huge.json").open("wb") as file:
        file.truncate(100 * 2**20)
    assert "larger than 4 MiB" in wrong("huge.json")
    Path("folder").mkdir()
    assert "no config.json in the folder" in wrong("./folder")
    os.mkfifo("pipe.json")
    assert "not a regular file" in wrong("pipe.json")
    assert "not a regular file" in wrong("/dev/zero")
    assert "unknown model" in wrong("'a\x1b[2Jb'")
    assert wrong("x" * 5000)


def test_a_field_of_the_wrong_type_is_named(wrong: Any) -> None:
    Path("bad.json").write_text(json.dumps({**TINY, "intermediate_size": [1]}))
    assert "intermediate_size" in wrong("bad.json")


# ------------------------------------------------------------------------------------------------------------ profiles


def profile(text: str | bytes) -> None:
    Path("plan.toml").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_profile_holds_the_same_names(run: Any) -> None:
    profile('model = "./config.json"\nmethod = "lora"\nrank = 4\npadded = true\ntarget_modules = ["q_proj"]\n')
    code, out, err = run("--config plan.toml --json")
    assert (code, err) == (0, "")
    options = json.loads(out)["options"]
    assert (options["method"], options["rank"], options["padded"], options["target_modules"]) == (
        "lora", 4, True, ["q_proj"],
    )  # fmt: skip


def test_the_command_line_goes_before_the_profile(run: Any) -> None:
    profile('model = "gpt2"\nmethod = "lora"\nrank = 4\ngpu = "h200"\npadded = true\n[stack]\ntorch = "2.11"\n')
    line = "./config.json --config plan.toml --json --rank 8 --gpu 0.5GiB --no-padded --stack torch=2.12"
    code, out, _ = run(line)
    assert code == 1
    options = json.loads(out)["options"]
    assert (options["rank"], options["method"], options["padded"]) == (8, "lora", False)
    assert (options["gpu"], options["stack"]["torch"]) == ("0.5GiB", "2.12")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnak = 3", "unknown option in 'plan.toml': 'rnak'; did you mean rank"),
        ("seq-len = 3", "'seq-len'; did you mean seq_len"),
        ("rank = ", "'plan.toml' is no TOML: "),
        (b"\xff", "'plan.toml' is not UTF-8 text (--config)"),
        ("a = " + "[" * 100_000, "'plan.toml' is no TOML: "),
        ("#" * (2**20 + 1), "larger than 1 MiB"),
        ("rank = 16.5", "rank is 16.5"),
        ("gpu = 24", "(--gpu)"),
        ("stack = 3", "(--stack)"),
        ("model = 3", "(MODEL)"),
        ("rank = 1979-05-27", "rank is datetime.date(1979, 5, 27)"),
        ("[rank]\nx = 1", "rank is {'x': 1}"),
        ("method = 'full'\nrank = 16", "rank 16 belongs to lora and qlora"),
        ("", "no model is named"),
    ],
)
def test_bad_profiles(text: str | bytes, words: str, wrong: Any) -> None:
    profile(text)
    model = "" if not text or "model" in str(text) else "./config.json"
    assert words in wrong(f"{model} --config plan.toml")


def test_profiles_that_are_no_files(wrong: Any) -> None:
    assert "is no file; name a TOML file of options (--config)" in wrong("./config.json --config missing.toml")
    assert "is no file" in wrong("./config.json --config .")
    assert "is no file" in wrong("./config.json --config /dev/zero")
    assert "(--config)" in wrong(f"./config.json --config {'x' * 5000}")


# --------------------------------------------------------------------------------------------------- models, GPUs, help


def test_models_are_listed_and_filtered(run: Any) -> None:
    code, out, err = run("models")
    assert code == 0
    assert err == ""
    assert len(out.splitlines()) > 120
    code, out, _ = run("models QWEN 32b --json")
    assert code == 0
    assert {"qwen2.5-32b", "qwen3-32b"} <= {row["name"] for row in json.loads(out)}
    assert all("qwen" in row["name"] and row["total_parameters"] > 0 for row in json.loads(out))


def test_gpus_are_listed_and_filtered(run: Any) -> None:
    code, out, err = run("gpus")
    assert code == 0
    assert err == ""
    assert len(out.splitlines()) > 45
    code, out, _ = run("gpus ada --json")
    assert code == 0
    assert "rtx-4090" in {row["name"] for row in json.loads(out)}


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"vramplan {vramplan.__version__}\n", "")


def test_no_words_at_all_show_the_help(run: Any) -> None:
    assert run("") == run("--help")
    assert run("-h")[1].startswith("Usage: vramplan MODEL [OPTIONS] | COMMAND ...\n")


def test_help_names_every_option(run: Any) -> None:
    for line in ("--help", "plan --help", "llama-3.1-8b --help"):
        code, out, _ = run(line)
        assert code == 0
        for option in OPTIONS.values():
            assert f"{option.flag} " in out
        assert all(len(text) <= 80 for text in out.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_run(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = COMMANDS[name].get_help(click.Context(COMMANDS[name], info_name=name))
    lines = [line.strip() for line in text.splitlines() if line.startswith("    vramplan")]
    assert lines
    Path("my-model").mkdir()
    Path("my-model/config.json").write_text(json.dumps(TINY))
    Path("my-runs.jsonl").write_text(verify.bundled()[-1].read_text("utf-8").partition("\n")[0])
    shutil.copytree(CONFIGS, ".", dirs_exist_ok=True)
    monkeypatch.setattr(verify, "bundled", lambda: [Path("my-runs.jsonl")])  # all of them are test_measured's
    monkeypatch.setattr(probe, "probe", no_gpu)  # test_probe.py plays one
    for line in lines:
        code, out, err = run(line.removeprefix("vramplan"))
        assert code in (0, 1)
        assert out or err == "vramplan: no GPU is here\n"


def no_gpu(*_: object, **__: object) -> None:
    raise Failure("no GPU is here")


# ---------------------------------------------------------------------------------------------- as a process of its own

COMMAND = [sys.executable, "-m", "vramplan"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen([*COMMAND, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_neither_an_answer_nor_a_wrong_question() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, "./config.json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 74
    assert done.stderr == f"vramplan: cannot write the answer: {os.strerror(errno.ENOSPC).lower()}\n"


def test_a_model_of_the_hub_while_offline() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path.cwd())}
    command = [*COMMAND, "someone/model-of-theirs"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not in the Hub's cache, and HF_HUB_OFFLINE is set" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt() -> None:
    code = (
        "import time\nfrom vramplan.planner import cli, plan\n"
        "def wait(*args, **kwargs):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "plan.plan = wait\ncli.main(['gpt2'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"waiting\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert b"Traceback" not in process.stderr.read()


def test_a_bug_is_said_to_be_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(plan_module, "plan", fail)
    code, out, err = run("gpt2")
    assert (code, out) == (70, "")
    assert "ZeroDivisionError: by nothing" in err
    assert err.splitlines()[-1].startswith("vramplan: this is a bug in vramplan")


def test_output_that_cannot_be_encoded() -> None:
    Path("ünïcode").mkdir()
    Path("ünïcode/config.json").write_text(json.dumps(TINY))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([*COMMAND, "./ünïcode"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"?n?code, QLoRA")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("vramplan llama-3.1-8", "plain,llama-3.1-8b"),
        ("vramplan comp", "plain,compare"),
        ("vramplan --meth", "plain,--method"),
        ("vramplan llama-3.1-8b --method ql", "plain,qlora"),
        ("vramplan fit llama-3.1-8b --gpu h20", "plain,h200"),
        ("vramplan probe qwen3-4b --trainer tr", "plain,transformers\nplain,trl"),
        ("vramplan ./confi", "file,./confi"),
        ("vramplan verify runs", "file,runs"),
        ("vramplan no-model --rank 1", ""),
    ],
)
def test_a_shell_completes(run: Any, monkeypatch: pytest.MonkeyPatch, typed: str, offered: str) -> None:
    monkeypatch.setenv("_VRAMPLAN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert run("") == (0, offered + "\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_lines_that_turn_completion_on(run: Any, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "contributing.md").read_text("utf-8")
    assert f"_VRAMPLAN_COMPLETE={shell}_source vramplan" in text
    monkeypatch.setenv("_VRAMPLAN_COMPLETE", f"{shell}_source")
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    code, out, _ = run("")
    assert code == 0
    assert "_VRAMPLAN_COMPLETE" in out
