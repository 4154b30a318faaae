"""The real run from a plan's options: transformers' config, PEFT's, the data, a Trainer that trains (on the CPU)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from vramplan import plan  # noqa: E402
from vramplan.planner import catalog  # noqa: E402
from vramplan.planner.errors import UsageError  # noqa: E402
from vramplan.planner.training import parse_options  # noqa: E402
from vramplan.probes import measure, workload  # noqa: E402
from vramplan.probes.measure import Mark, figures  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_config_is_transformers_own() -> None:
    config = {**LLAMA, "architectures": ["Other"], "auto_map": {"AutoConfig": "evil.Config"}, "torch_dtype": "float64"}
    found = workload.hf_config(config, parse_options({"attention": "eager"}))
    assert type(found).__name__ == "LlamaConfig"
    assert (found.hidden_size, found._attn_implementation) == (64, "eager")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(found)
    assert sum(p.numel() for p in model.parameters()) == plan(LLAMA).counts.total


def test_of_a_composite_config_the_text_model() -> None:
    text = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"head_dim": 16, "num_hidden_layers": 2}
    found = workload.hf_config(
        {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}, parse_options({})
    )
    assert found.model_type == "gemma3_text"
    assert found.tie_word_embeddings is False


def test_a_type_that_transformers_has_not() -> None:
    with pytest.raises(UsageError, match=r"has no model_type 'nope'; install a version that has it"):
        workload.hf_config({"model_type": "nope"}, parse_options({}))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**LLAMA, "hidden_size": "x"}, "does not take this llama config: .*hidden_size"),
        ({**LLAMA, "num_attention_heads": 0}, "does not take this llama config: "),
        ({**LLAMA, "text_config": {}}, "does not take this llama config: "),
        ({"model_type": "gemma3", "text_config": 7}, "does not take this gemma3 config: "),
        ({"model_type": ["llama"]}, r"has no model_type \['llama'\]"),
        ({}, "has no model_type None"),
    ],
)
def test_a_config_that_transformers_does_not_take(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        workload.hf_config(config, parse_options({}))


def test_how_a_model_was_saved_is_left_out() -> None:
    """The probe quantises by itself; a checkpoint's own quantisation is not what is trained."""
    saved = {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}, "_name_or_path": "/secret"}
    found = workload.hf_config(saved, parse_options({}))
    assert not hasattr(found, "quantization_config")
    assert found.name_or_path == ""


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp", "q_proj,down_proj"])
@pytest.mark.parametrize("config", [LLAMA, catalog.find_model("gpt2").config], ids=["llama", "gpt2"])  # type: ignore[union-attr]
def test_peft_trains_what_the_plan_counts(targets: str, config: dict[str, Any]) -> None:
    if config is not LLAMA and "," in targets:
        targets = "c_attn"
    asked = {"method": "lora", "rank": 8, "target_modules": targets, "seq_len": 64}
    made = plan(config, **asked)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(workload.hf_config(config, made.options))
        model = peft.get_peft_model(model, workload.lora_config(made.options, made.counts))
    assert model.get_nb_trainable_parameters()[0] == made.counts.trainable


def test_an_adapter_without_an_architecture() -> None:
    assert workload.lora_config(parse_options({"method": "full"})) is None
    named = workload.lora_config(parse_options({"target_modules": "q_proj,v_proj", "lora_alpha": 64}))
    assert named is not None
    assert (named.target_modules, named.lora_alpha, named.r) == ({"q_proj", "v_proj"}, 64, 16)
    assert workload.lora_config(parse_options({})).target_modules == "all-linear"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"what attention means is not known for this architecture"):
        workload.lora_config(parse_options({"target_modules": "attention"}))


@pytest.mark.parametrize("config", [LLAMA, catalog.find_model("gpt2").config], ids=["llama", "gpt2"])  # type: ignore[union-attr]
def test_what_is_quantised_is_what_the_plan_says(config: dict[str, Any]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from vramplan.planner.memory import run_of

    made = plan(config, seq_len=64)
    model, _ = workload.with_4bit_linears(workload.hf_config(config, made.options), made.options)
    prefix = made.architecture.layer_prefix
    run = run_of(made.architecture, made.options, made.device, made.counts)
    planned = {f"{prefix}.{i}.{name}" for i, names in enumerate(run.quantised) for name in names}
    assert {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)} == planned


def test_rows_fill_whole_steps() -> None:
    rows = workload.Rows(100, parse_options({"batch_size": 3, "gradient_accumulation_steps": 5, "seq_len": 16}))
    assert len(rows) == 75
    assert torch.equal(rows[4]["input_ids"], rows[4]["labels"])
    assert rows[4]["attention_mask"].sum() == 16
    padded = workload.Rows(100, parse_options({"padded": True, "seq_len": 16}))
    lengths = {int(padded[i]["attention_mask"].sum()) for i in range(len(padded))}
    assert lengths == set(range(9, 17))
    short = next(row for row in (padded[i] for i in range(64)) if row["attention_mask"].sum() == 9)
    assert (short["labels"] == -100).sum() == 7


@pytest.mark.parametrize("padded", [False, True])
def test_what_trl_trains_on(tmp_path: Path, padded: bool) -> None:
    """As many rows as are trained; padded ones are short, and its collator makes their mask."""
    pytest.importorskip("trl")
    options = parse_options(
        {"trainer": "trl", "method": "full", "seq_len": 32, "batch_size": 2, "padded": padded,
         "gradient_accumulation_steps": 2, "mixed_precision": "no", "optimizer": "adamw_torch"}
    )  # fmt: skip
    model = workload.from_config(workload.hf_config(LLAMA, options), options)
    made = workload.trainer(model, options, None, workload.training_arguments(options, tmp_path, 3, use_cpu=True))
    assert len(made.train_dataset) == 12
    batches = list(made.get_train_dataloader())
    assert {tuple(tensor.shape) for batch in batches for tensor in batch.values()} == {(2, 32)}
    assert bool((torch.stack([batch["attention_mask"] for batch in batches]) == 0).any()) is padded


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_is_measured(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """measure.py with the counters of a GPU that always shows the same."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1000)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(measure, "_device", lambda _: {})
    recorded: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"requested_bytes.all.current": 900})
    monkeypatch.setattr(measure.history, "start", lambda: recorded.append("start"))
    monkeypatch.setattr(measure.history, "events", lambda: (recorded.append("events"), [], [])[1:])
    monkeypatch.setattr(measure.history, "stop", lambda: recorded.append("stop"))
    monkeypatch.setattr(workload, "load", lambda config, o: workload.from_config(workload.hf_config(config, o), o))
    on_gpu = workload.training_arguments
    monkeypatch.setattr(workload, "training_arguments", lambda *args: on_gpu(*args, use_cpu=True))
    options = {"method": method, "seq_len": 16, "optimizer": "adamw_torch", "mixed_precision": "no"}
    asked = {"config": LLAMA, "options": options, "steps": 2, "limit_bytes": None, "uuid": "", "others_bytes": 0}
    found = measure.measure({**asked, "record": method == "full"})
    assert found.get("history") == ((900, [], []) if method == "full" else None)
    assert recorded == (["start", "events", "stop"] if method == "full" else [])
    made = plan(LLAMA, **options)
    assert found["outcome"] == "ok"
    assert found["trainable_parameters"] == made.counts.trainable
    assert found["gradient_bytes"] == made.counts.trainable * (4 if method == "lora" else 2)
    assert len(found["steps"]) == 2
    assert found["peak_allocated_bytes"] == 1000


def test_figures_of_marks() -> None:
    def step(base: int, time_s: float) -> list[Mark]:
        return [
            Mark("step_begin", base, base, 50, 50, time_s),
            Mark("before_optimizer", base + 5, base + 9, 60, 61, time_s + 1),
            Mark("after_optimizer", base + 6, base + 7, 70, 72, time_s + 2),
            Mark("step_end", base + 1, base + 7, 70, 72, time_s + 3),
        ]

    before = [Mark("loaded", 10, 12, 20, 20, 0.0), Mark("ready", 15, 16, 20, 20, 0.0)]
    found = figures([*before, *step(20, 100.0), *step(30, 200.0)])
    assert (found["loaded_bytes"], found["ready_bytes"]) == (10, 15)
    assert found["steps"][1] == {
        "start_bytes": 30,
        "fwd_bwd_peak_bytes": 39,
        "with_grads_bytes": 35,
        "reserved_peak_bytes": 72,
        "optim_peak_bytes": 37,
        "end_bytes": 31,
        "step_s": 3.0,
    }
    assert (found["peak_allocated_bytes"], found["peak_reserved_bytes"], found["step_s"]) == (39, 72, 3.0)
    assert figures(before) == {"loaded_bytes": 10, "ready_bytes": 15, "steps": []}


def test_what_the_device_holds_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.probes import probe_gpu

    retries = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2500)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": retries})
    monkeypatch.setattr(probe_gpu, "memory", lambda _: probe_gpu.Memory(6000, 5000, 4000))
    asked = {"uuid": "1", "others_bytes": 300, "options": {"optimizer": "adamw_torch"}}
    whole = {"device_used_bytes": 4700, "context_bytes": 2200, "process_bytes": 1200, "retries": 0}
    assert measure._device(asked) == whole
    paged = {**asked, "options": {"optimizer": "paged_adamw_8bit"}}
    assert measure._device(paged) == dict.fromkeys(whole, None) | {"retries": 0}
    retries = 2  # memory was given back, so what is there now was not the most
    assert measure._device(asked) == whole | {"device_used_bytes": None, "retries": 2}


def test_a_rank_measures_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what others hold of that one, which an old driver does not tell apart from its own share."""
    from types import SimpleNamespace

    from vramplan.probes import probe_gpu, ranks

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"gpu {i}", total_memory=78 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(measure, "measure", lambda case: case)
    seen = {"gpu 1": probe_gpu.Memory(80 * 2**30, 5 * 2**30, None)}
    monkeypatch.setattr(probe_gpu, "memory", seen.get)
    found = ranks._measure({"record": True, "uuid": "gpu 0", "others_bytes": 0}, rank=1)
    assert found == {"record": False, "uuid": "gpu 1", "others_bytes": 3 * 2**30}


@pytest.mark.parametrize(
    ("error", "marks", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
            ["loaded", "ready", "step_begin"],
            "in forward or backward of step 1, for want of 2.00 GiB",
        ),
        (RuntimeError("CUDA error: out of memory"), [], "while the model was loaded"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ["step_begin", "step_end", "step_begin", "before_optimizer"],
            "in the optimizer's step 2",
        ),
    ],
)
def test_running_out_of_memory_is_known(error: Exception, marks: list[str], said: str) -> None:
    assert measure.is_out_of_memory(error)
    assert measure._ran_out(error, [Mark(name, 0, 0, 0, 0, 0.0) for name in marks]) == said
    assert not measure.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_nothing_is_written_where_the_trainer_may_write(tmp_path: Path) -> None:
    options = parse_options({"method": "full", "seq_len": 16, "mixed_precision": "no", "optimizer": "adamw_torch"})
    model = workload.from_config(workload.hf_config(LLAMA, options), options)
    arguments = workload.training_arguments(options, tmp_path, 1, use_cpu=True)
    workload.trainer(model, options, None, arguments).train()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
