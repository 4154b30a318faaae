"""Exported files: they say exactly the plan, and run."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small

from vramplan import plan
from vramplan.planner.configs import read
from vramplan.planner.errors import UsageError
from vramplan.planner.export import TARGETS, export
from vramplan.planner.training import OPTIONS, parse_options

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(small("llama")))
    return str(folder)


OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "method": st.sampled_from(["qlora", "lora", "full"]),
    "batch_size": st.sampled_from([1, 2, 8]),
    "seq_len": st.sampled_from([16, 64]),
    "padded": st.booleans(),
    "gradient_accumulation_steps": st.sampled_from([1, 4]),
    "gradient_checkpointing": st.booleans(),
    "optimizer": st.sampled_from(["adamw_torch_fused", "adafactor", "paged_adamw_8bit", "sgd"]),
    "weights_dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
    "mixed_precision": st.sampled_from(["bf16", "fp16", "no"]),
    "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    "trainer": st.sampled_from(["transformers", "trl"]),
    "expandable_segments": st.booleans(),
    "examples": st.sampled_from([1, 300]),
    "tokens_per_example": st.sampled_from([16, 20]),
    "epochs": st.sampled_from([1, 0.5]),
    "rank": st.sampled_from([1, 64]),
    "lora_alpha": st.sampled_from([1, 7.5]),
    "lora_dropout": st.sampled_from([0.0, 0.05]),
    "target_modules": st.sampled_from(["all-linear", "attention", "mlp", "attention,up_proj", ["q_proj", "v_proj"]]),
    "double_quant": st.booleans(),
    "prepare_kbit": st.booleans(),
}
asked = st.fixed_dictionaries({}, optional=OPTIONAL)


def spelled(options: dict[str, Any], names: Any) -> dict[str, Any]:
    """The options as an export has them: PEFT knows modules, not what attention means."""
    targets = options["target_modules"]
    group = targets is not None and targets != "all-linear"
    return options | {"target_modules": list(names)} if group else options


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60)
@given(asked=asked)
def test_check_gives_the_options_that_were_exported(
    target: str, asked: dict[str, Any], model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        made = plan(model, stack={}, **asked)
        found = export(made, target, command="vramplan export")
    except UsageError:
        return
    file = tmp_path_factory.getbasetemp() / f"{target}.{'py' if target == 'script' else 'yml'}"
    file.write_text(found.text)
    reading = read([str(file)])
    assert parse_options(reading.options).as_dict() == found.options.as_dict()
    assert reading.model == model
    beside = {name for name, source in reading.sources.items() if "comment" in source}
    assert target == "accelerate" or beside <= {"padded", "examples", "tokens_per_example", "expandable_segments"}
    assert not reading.unknown
    assert not reading.notes
    # What was asked for is what it runs, and what it makes otherwise it says.
    ours, theirs = spelled(made.options.as_dict(), made.counts.names), found.options.as_dict()
    changed = {name for name in OPTIONS if ours[name] != theirs[name]}
    assert not changed & set(asked)
    assert changed <= {note.split()[0] for note in found.notes}
    assert plan(reading.model, stack={}, **reading.options).options.as_dict() == theirs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_plainest_plan_of_every_method_has_an_export(target: str, method: str, model: str) -> None:
    attention = "flash_attention_2" if (target, method) == ("axolotl", "full") else "sdpa"
    assert export(plan(model, method=method, attention=attention), target, command="").text


@pytest.mark.parametrize(
    ("target", "asked", "says"),
    [
        ("trl", {"prepare_kbit": True}, "trl sft makes prepare_kbit false, and true is asked for"),
        ("trl", {"prepare_kbit": True}, "choose --no-prepare-kbit or --to script"),
        ("axolotl", {"trainer": "trl"}, "axolotl makes trainer transformers, and trl is asked for"),
        ("llamafactory", {"method": "full", "weights_dtype": "bf16"}, "LLaMA-Factory makes weights_dtype fp32"),
        ("axolotl", {"method": "full"}, "holds norms, embeddings and head in float32"),
        ("script", {"method": "lora", "num_gpus": 2}, "is nothing that --to script writes, and num_gpus is 2"),
        ("nope", {}, "unknown target 'nope'"),
        ("deepspeed", {"num_gpus": 2, "parallel": "zero3"}, "ZeRO is written by --to accelerate"),
    ],
)
def test_what_a_target_cannot_run(target: str, asked: dict[str, Any], says: str, model: str) -> None:
    with pytest.raises(UsageError) as error:
        export(plan(model, **asked), target, command="")
    assert says in str(error.value)


def test_a_bundled_model_is_named_as_the_hub_has_it(model: str) -> None:
    assert "base_model: meta-llama/Llama-3.1-8B\n" in export(plan("llama-3.1-8b"), "axolotl", command="").text
    with pytest.raises(UsageError, match="no name that another framework could load"):
        export(plan(small("llama")), "trl", command="")


# ----------------------------------------------------------------------------------------------- what others make of it


def test_trl_reads_its_export_as_the_plan(model: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    options = {"method": "lora", "rank": 4, "batch_size": 3, "seq_len": 48, "mixed_precision": "fp16"}
    made = plan(model, weights_dtype="fp16", gradient_checkpointing=False, optimizer="sgd", **options)
    (tmp_path / "a.yml").write_text(export(made, "trl", command="").text)
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    _, sft, config = parser.parse_args_and_config(["--config", str(tmp_path / "a.yml")], fail_with_unknown_args=True)
    assert (config.model_name_or_path, config.use_peft, config.lora_r, config.lora_alpha) == (model, True, 4, 8)
    assert (config.lora_target_modules, config.dtype, config.load_in_4bit) == ("all-linear", "float16", False)
    assert (sft.max_length, sft.per_device_train_batch_size, sft.fp16, sft.bf16) == (48, 3, True, False)
    assert (sft.gradient_checkpointing, str(sft.optim.value), sft.packing) == (False, "sgd", False)


def test_accelerate_reads_its_export(model: str, tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    file = tmp_path / "a.yml"
    file.write_text(export(plan(model, method="lora", mixed_precision="no"), "accelerate", command="").text)
    found = config_args.ClusterConfig.from_yaml_file(str(file))
    assert (found.mixed_precision, found.num_processes) == ("no", 1)
    file.write_text(export(plan(model, method="lora", num_gpus=4), "accelerate", command="").text)
    found = config_args.ClusterConfig.from_yaml_file(str(file))
    assert (str(found.distributed_type), found.num_processes) == ("DistributedType.MULTI_GPU", 4)
    assert read([str(file)]).options["num_gpus"] == 4


SHARED: list[dict[str, Any]] = [
    {"parallel": "ddp"},
    {"parallel": "ddp", "gradient_accumulation_steps": 3, "gradient_checkpointing": False},
    {"parallel": "fsdp"},
    {"parallel": "fsdp", "gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    {"parallel": "fsdp", "reshard_after_forward": False, "cpu_offload": True},
    {"parallel": "zero1"},
    {"parallel": "zero1", "cpu_offload": True, "gradient_accumulation_steps": 1},
    {"parallel": "zero2", "cpu_offload": True},
    {"parallel": "zero2", "gradient_accumulation_steps": 8, "gradient_checkpointing": False},
    {"parallel": "zero3", "gradient_accumulation_steps": 3},
    {"parallel": "zero3", "cpu_offload": True, "optimizer": "adamw_torch"},
    {"parallel": "zero3", "mixed_precision": "no", "weights_dtype": "fp32"},
]


def exported(options: dict[str, Any], model: str, file: Path) -> dict[str, Any]:
    """The keys of a plan's export to accelerate, once it was read back as the plan."""
    made = plan(model, **options)
    file.write_text(export(made, "accelerate", command="").text)
    back = read([str(file)])
    assert parse_options(back.options).as_dict() == made.options.as_dict()
    assert plan(back.model, **back.options).memory == made.memory
    assert not back.notes
    assert not back.unknown
    keys: dict[str, Any] = yaml.safe_load(file.read_text())
    return keys


@pytest.mark.parametrize("num_gpus", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("options", SHARED)
def test_how_gpus_share_a_run_goes_there_and_back(
    options: dict[str, Any], method: str, num_gpus: int, model: str, tmp_path: Path
) -> None:
    keys = exported(options | {"method": method, "num_gpus": num_gpus}, model, tmp_path / "a.yml")
    assert (keys["num_processes"], keys["num_machines"]) == (num_gpus, -(-num_gpus // 8))
    assert ("main_process_ip" in keys) == (num_gpus > 8)
    launch = pytest.importorskip("accelerate.commands.launch")
    flags = {flag.lstrip("-") for flag in launch.launch_command_parser()._option_string_actions}
    for name in ("fsdp_config", "deepspeed_config"):
        assert set(keys.get(name, {})) <= flags


@pytest.mark.parametrize("options", SHARED)
def test_accelerate_launches_as_many_processes_on_each_machine(
    options: dict[str, Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that the file's first lines name, on its second machine."""
    launch = pytest.importorskip("accelerate.commands.launch")
    prepare = pytest.importorskip("accelerate.utils.launch")
    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS", "FSDP_STATE_DICT_TYPE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "a.yml"
    exported(options | {"method": "full", "num_gpus": 16}, model, file)
    [run] = [line for line in file.read_text().splitlines() if line.startswith("# Run ")]
    assert run.startswith("# Run on each of the 2 machines, RANK from 0 to 1: accelerate launch ")
    words = run.partition("accelerate launch ")[2].replace("FILE", str(file)).replace("RANK", "1").split()
    parser = launch.launch_command_parser()
    args, _, _ = launch._validate_launch_command(parser.parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""
    if options["parallel"].startswith("zero"):
        command, environment = prepare.prepare_deepspeed_cmd_env(args)
        assert command is None  # torchrun, and no deepspeed command with its hostfile
        offload = environment["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"]
        assert (environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"], offload) == (
            options["parallel"][-1],
            "cpu" if options.get("cpu_offload") else "none",
        )
    else:
        environment = prepare.prepare_multi_gpu_env(args)
        assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (options["parallel"] == "fsdp")
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "PUT-THE-ADDRESS-OF-MACHINE-0-HERE:29500")
    if options["parallel"] == "fsdp":  # what accelerate/state.py chooses the backend "cuda:nccl,cpu:gloo" by
        offloaded = str(options.get("cpu_offload", False)).lower()
        assert (environment["FSDP_OFFLOAD_PARAMS"], environment["FSDP_STATE_DICT_TYPE"]) == (
            offloaded,
            "FULL_STATE_DICT",
        )


def test_gpus_that_machines_cannot_share_evenly_are_refused(model: str) -> None:
    for number, choices in ((9, "8 or 10"), (11, "10 or 12"), (17, "15 or 18")):
        with pytest.raises(UsageError, match=f"num_gpus is {number}, .* choose --num-gpus {choices}"):
            export(plan(model, num_gpus=number), "accelerate", command="")


def test_what_is_to_be_known_of_a_key_stands_above_it(model: str) -> None:
    def text(**options: Any) -> list[str]:
        return export(plan(model, **options), "accelerate", command="").text.splitlines()

    def above(lines: list[str], key: str) -> str:
        return lines[next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:")) - 1].strip()

    several = text(method="full", num_gpus=16)
    assert above(several, "machine_rank") == "# each machine's own, from 0 to 1; --machine_rank goes before it"
    assert above(several, "main_process_ip") == "# where all the others reach machine 0"
    assert above(several, "num_machines") == "# with 8 GPUs each: num_processes is shared out evenly"
    assert not above(text(method="full", num_gpus=2), "machine_rank").startswith("#")
    loading = above(text(method="full", num_gpus=2, parallel="fsdp"), "fsdp_cpu_ram_efficient_loading")
    assert loading.startswith("# false, as planned: each rank loads the whole model in host memory")
    for parallel in ("fsdp", "zero3"):
        quantised = text(method="qlora", num_gpus=2, parallel=parallel)
        assert any("BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16)" in line for line in quantised)
        floats = {"weights_dtype": "fp32", "mixed_precision": "no"}
        quantised = text(method="qlora", num_gpus=2, parallel=parallel, **floats)
        assert any("BitsAndBytesConfig(bnb_4bit_quant_storage=torch.float32)" in line for line in quantised)
        assert not any("quant_storage" in line for line in text(method="lora", num_gpus=2, parallel=parallel))
    assert not any("quant_storage" in line for line in text(method="qlora", num_gpus=2))
    first = (
        "# your_script.py has to make its TrainingArguments before from_pretrained: they choose each process's GPU, and"
    )
    for parallel in ("ddp", "fsdp", "zero3"):
        assert first in text(method="lora", num_gpus=2, parallel=parallel)
    assert first not in text(method="lora")


def test_what_zero3_saves_is_said(model: str) -> None:
    def said(**options: Any) -> str:
        text = export(plan(model, num_gpus=2, **options), "accelerate", command="").text
        before, key, _ = text.partition("\n  zero3_save_16bit_model: false\n")
        return before.rpartition("\n")[2] if key else ""

    assert said(method="full", parallel="zero3").startswith("  # only DeepSpeed's checkpoint is saved then")
    assert (
        said(method="lora", parallel="zero3") == "  # without effect here: the adapter is gathered and saved by itself"
    )
    assert said(method="full", parallel="zero2") == ""


@pytest.fixture
def trainable(tmp_path: Path) -> Path:
    """A folder with a tiny model and its tokenizer, and one with texts."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pytest.importorskip("datasets")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": "a b " * (3 + i)}) for i in range(6)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("trainer", "asked"),
    [
        ("transformers", {"method": "lora", "rank": 2, "batch_size": 2, "padded": True}),
        ("transformers", {"method": "full", "gradient_checkpointing": False}),
        ("trl", {"method": "lora", "gradient_accumulation_steps": 2}),
    ],
)
def test_a_script_trains_with_the_plans_arguments(
    trainer: str, asked: dict[str, Any], trainable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    workload = pytest.importorskip("vramplan.probes.workload")
    cpu = {"weights_dtype": "fp32", "mixed_precision": "no", "seq_len": 8, "epochs": 1, "optimizer": "adamw_torch"}
    made = plan(str(trainable / "model"), trainer=trainer, **asked, **cpu)
    file = trainable / "train.py"
    file.write_text(export(made, "script", command="", dataset=str(trainable / "data")).text)
    monkeypatch.chdir(trainable)
    script = imported(file)
    trained: dict[str, Any] = {}

    class Watched(getattr(script, "Trainer" if trainer == "transformers" else "SFTTrainer")):  # type: ignore[misc]
        def train(self) -> None:
            trained.update(args=self.args, rows=self.train_dataset, steps=super().train().global_step)

    monkeypatch.setattr(script, Watched.__base__.__name__, Watched)
    script.main()
    assert trained["steps"] >= 2
    lengths = [len(row["input_ids"]) for row in trained["rows"]]
    assert set(lengths) == {7, 8} if made.options.padded else set(lengths) == {8}
    assert (trainable / "out").is_dir()
    probed = workload.training_arguments(made.options, "out", steps=2)
    mattering = set(probed) & {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "max_grad_norm",
        "bf16",
        "fp16",
        "optim",
    }
    assert len(mattering) == 8
    assert {name: getattr(trained["args"], name) for name in mattering} == {name: probed[name] for name in mattering}


def imported(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("exported_script", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_quantised_script_quantises_as_the_probe_does(model: str) -> None:
    workload = pytest.importorskip("vramplan.probes.workload")
    made = plan(model, mixed_precision="no", double_quant=False, expandable_segments=True)
    text = export(made, "script", command="").text
    theirs = workload.quantization_config(made.options)
    assert f"bnb_4bit_compute_dtype={theirs.bnb_4bit_compute_dtype}," in text
    assert f"bnb_4bit_use_double_quant={theirs.bnb_4bit_use_double_quant}," in text
    assert f'bnb_4bit_quant_type="{theirs.bnb_4bit_quant_type}",' in text
    assert "model = prepare_model_for_kbit_training(" in text
    assert f"bnb_4bit_quant_storage={theirs.bnb_4bit_compute_dtype}," in text
    allocator = text.index('os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")')
    assert allocator < text.index("import torch")


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_script_has_its_arguments_before_its_model(trainer: str, method: str, model: str, tmp_path: Path) -> None:
    made = plan(model, trainer=trainer, method=method, seq_len=16)
    text = export(made, "script", command="").text
    assert text.index("arguments = ") < text.index("AutoModelForCausalLM.from_pretrained(")
    file = tmp_path / "a.py"
    file.write_text(text)
    back = read([str(file)])
    assert plan(back.model, **back.options).memory == made.memory


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "zero3"])
def test_a_script_and_its_launcher_are_the_plan_again(parallel: str, model: str, tmp_path: Path) -> None:
    options = {"method": "qlora", "seq_len": 16, "gradient_accumulation_steps": 2, "examples": 9}
    made = plan(model, num_gpus=4, parallel=parallel, **options)
    for name, target, shared in (("a.py", "script", plan(model, **options)), ("a.yml", "accelerate", made)):
        (tmp_path / name).write_text(export(shared, target, command="").text)
    back = read([str(tmp_path / "a.py"), str(tmp_path / "a.yml")])
    assert parse_options(back.options).as_dict() == made.options.as_dict()
    assert plan(back.model, **back.options).memory == made.memory


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return run


def test_the_command_prints_or_writes(run: Any, tmp_path: Path) -> None:
    line = "export gpt2 --to trl --rank 4 --seq-len 64"
    code, out, _ = run(line)
    assert code == 0
    assert "# vramplan 0" in out
    assert f": vramplan {line}\n" in out
    code, said, _ = run(f"{line} -o deep/a.yml")
    assert (code, said.startswith("deep/a.yml: gpt2, QLoRA r=4")) == (0, True)
    file = tmp_path / "deep" / "a.yml"
    assert file.read_text().splitlines()[1:] == out.splitlines()[1:]
    assert [each.name for each in file.parent.iterdir()] == ["a.yml"]
    assert run("check deep/a.yml")[0] == 0


def test_an_existing_file_is_kept_without_force(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text("mine")
    code, out, err = run("export gpt2 --seq-len 64 --to trl -o a.yml")
    assert (code, out) == (2, "")
    assert "'a.yml' exists; name another file, or add --force" in err
    assert file.read_text() == "mine"
    assert run("export gpt2 --seq-len 64 --to trl -o a.yml --force")[0] == 0
    assert file.read_text() != "mine"
    assert "cannot write" in run("export gpt2 --seq-len 64 --to trl -o a.yml/b.yml")[2]
    code, _, err = run("export gpt2")
    assert (code, err) == (
        2,
        "vramplan: no format is named; add --to with trl, axolotl, llamafactory, accelerate or script\n",
    )


def test_a_command_of_several_lines_stays_a_comment(run: Any, tmp_path: Path) -> None:
    _, out, _ = run("export gpt2 --seq-len 64 --to trl --dataset 'a\nb: c'")
    assert "dataset_name: " in out
    first = out.splitlines()[0]
    assert first.startswith("# ")
    assert "a?b: c" in first


def test_reading_and_writing_configs_costs_no_other_command_an_import() -> None:
    import subprocess

    code = "import sys; from vramplan import plan; plan('gpt2', seq_len=64); print('yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
