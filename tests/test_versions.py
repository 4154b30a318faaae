"""What earlier versions of transformers do otherwise, each side by hand; the installed one is held against its models.

The other sides of these are measured: runs of gptj by transformers 5.17 are in tables/measured.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from small_models import FLAT, small

from vramplan.planner import memory, phases
from vramplan.planner.architecture import parse
from vramplan.planner.cache import VALUES
from vramplan.planner.errors import UsageError
from vramplan.planner.layers import Moe
from vramplan.planner.plan import Plan, plan
from vramplan.planner.stack import KNOWN, parse_stack
from vramplan.planner.versions import GPTJ_BY_LAYER, as_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vramplan.planner.run import Run, Stretch

ROUTED = ("deepseek_v2", "deepseek_v3", "glm4_moe")
GPTJ = small("gptj") | {"num_hidden_layers": 3, "n_positions": 40}


def planned(config: dict[str, Any], transformers: str, **options: Any) -> Plan:
    return plan(config, stack=f"torch=2.13,transformers={transformers}", **{"seq_len": 16, **options})


def run_of(made: Plan) -> Run:
    return memory.run_of(made.architecture, made.options, made.device, made.counts)


def made_by(run: Run, stretches: Iterable[Stretch]) -> Counter[str]:
    """How often a tensor of each label is made."""
    return Counter(run.program.labels[e >> 1] for stretch in stretches for e in stretch.events if not e & 1)


def test_the_newest_is_what_the_builders_build() -> None:
    for model_type, index in FLAT:
        architecture = parse(small(model_type, index))
        assert as_of(architecture, KNOWN["transformers"][1]) is architecture
        for minor in range(KNOWN["transformers"][0][1], KNOWN["transformers"][1][1]):
            once = as_of(architecture, (5, minor))
            assert as_of(once, (5, minor)) == once


@pytest.mark.parametrize(("model_type", "index"), FLAT)
def test_weights_are_float32_in_a_model_of_16_bit_where_transformers_keeps_them_so(model_type: str, index: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = small(model_type, index)
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    with torch.device("meta"):
        fields = CONFIG_MAPPING[model_type](**{key: value for key, value in config.items() if key != "model_type"})
        model = AutoModelForCausalLM.from_config(fields, dtype=torch.bfloat16)
    found = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    architecture = as_of(parse(config), parse_stack().transformers)
    assert {name for name, _, weight in architecture.weights() if weight.wide} == found


# -------------------------------------------------------------------------------------------------------------- gptj


def test_gptj_takes_sdpa_from_5_24_on() -> None:
    before, now = planned(GPTJ, "5.23"), planned(GPTJ, "5.24")
    assert (before.options.attention, now.options.attention) == ("eager", "sdpa")
    assert before.warnings == ("transformers has no sdpa attention for gptj, so it takes eager",)
    assert now.warnings == ()
    with pytest.raises(UsageError, match="choose --attention eager or --attention flash_attention_2"):
        planned(GPTJ, "5.23", attention="sdpa")


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_gptj_looks_sines_and_cosines_up_once_from_5_24_on(method: str, attention: str) -> None:
    options = {"method": method, "attention": attention, "gradient_checkpointing": False}
    before, now = (run_of(planned(GPTJ, version, **options)) for version in ("5.23", "5.24"))
    tables = [made_by(run, run.loading)["rotary table"] for run in (before, now)]
    assert tables == [3, 1]
    of_every_position = [made_by(run, run.step(0))["sines and cosines of every position"] for run in (before, now)]
    looked_up = [made_by(run, run.step(1))["sines and cosines"] for run in (before, now)]
    assert (of_every_position, looked_up) == ([3, 0], [3, 1])
    assert {kind.family for kind in before.architecture.kinds} == {GPTJ_BY_LAYER}
    assert {kind.family for kind in now.architecture.kinds} == {"gptj"}


@pytest.mark.parametrize("phase", ["evaluation", "generation"])
def test_a_block_of_gptj_returned_its_probabilities_until_5_23(phase: str) -> None:
    """One layer's are still there while the next runs; B = 2, N = 4, T = 100."""
    sizes = {"per_device_eval_batch_size": 2, "generation_batch_size": 2, "prompt_len": 100, "max_new_tokens": 2}
    keys = {"evaluation": ("per_device_eval_batch_size",)}.get(phase, tuple(sizes)[1:])
    options = {"attention": "eager", "method": "full", "mixed_precision": "no", "seq_len": 100, "phases": [phase]}
    ends = []
    for version in ("5.23", "5.24"):
        made = planned(GPTJ, version, **options, **{key: sizes[key] for key in keys})
        run = run_of(made)
        live: set[int] = set()
        for stretch in getattr(phases, phase)(run, made.options):
            for event in stretch.events:
                (live.discard if event & 1 else live.add)(event >> 1)
            if stretch.name.endswith("layer 0"):
                ends.append([run.program.sizes[i] for i in live if run.program.labels[i] == "probabilities, cast"])
                break
    assert ends == [[2 * 4 * 100 * 100 * 2], []]


# ----------------------------------------------------------------------------------------------------------- routers


@pytest.mark.parametrize("model_type", ROUTED)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_routers_are_float32_from_5_24_on(model_type: str, method: str) -> None:
    options: dict[str, Any] = {"method": method} | ({"prepare_kbit": False} if method == "qlora" else {})
    before, now = (planned(small(model_type), version, **options) for version in ("5.23", "5.24"))
    sparse = sum(isinstance(before.architecture.kinds[kind].mlp, Moe) for kind in before.architecture.order)
    router = 4 * 256  # experts, hidden size
    assert sparse
    assert now.memory.loaded_bytes - before.memory.loaded_bytes == sparse * router * 2
    if method == "full":
        assert run_of(now).gradient_bytes - run_of(before).gradient_bytes == sparse * router * 2
        old, new = ({part.name: part.bytes for part in made.sizes()} for made in (before, now))
        assert new["optimizer.pt"] - old["optimizer.pt"] == sparse * router * 2 * 2
        saved = new["model.safetensors"] - old["model.safetensors"]
        assert saved == pytest.approx(sparse * router * 2, abs=8)  # its header says F32 for BF16, and is padded


@pytest.mark.parametrize(
    "options", [{"weights_dtype": "fp32"}, {"method": "qlora"}, {"method": "qlora", "padded": True}]
)
def test_a_float32_model_holds_its_routers_as_before(options: dict[str, Any]) -> None:
    """So does one that prepare_kbit makes float32, but that its routers are so from the beginning."""
    before, now = (planned(small("deepseek_v3"), version, **options) for version in ("5.23", "5.24"))
    assert now.memory.ready_bytes == before.memory.ready_bytes
    assert now.memory.peak_allocated_bytes == before.memory.peak_allocated_bytes


def test_an_adapter_on_a_float32_router_is_made_in_float32() -> None:
    options = {"method": "lora", "target_modules": "gate"}
    before, now = (run_of(planned(small("deepseek_v3"), version, **options)) for version in ("5.23", "5.24"))
    counts = [made_by(run, run.loading[2:])["adapter weight"] for run in (before, now)]
    assert counts == [4, 2]  # A and B, in bfloat16 first


def test_fully_shard_gathers_routers_in_16_bit() -> None:
    made = planned(small("deepseek_v3"), "5.24", method="lora", num_gpus=2, parallel="fsdp")
    run = run_of(made)
    shares = [s for unit in made_units(run) for s in unit.shares if s.name.endswith("gate.weight")]
    assert [(s.dtype, s.gathered) for s in shares] == [("fp32", "bf16")]
    assert run.layers[1].others["mlp.gate"]["weight"].dtype == "bf16"


def made_units(run: Run) -> Any:
    from vramplan.planner.sharding import Fsdp

    assert isinstance(run.sharing, Fsdp)
    return run.sharing.units(run).all


def test_fully_shard_refuses_routers_of_another_dtype_than_the_rest() -> None:
    options = {"method": "full", "mixed_precision": "no", "num_gpus": 2, "parallel": "fsdp"}
    planned(small("deepseek_v3"), "5.23", **options)
    planned(small("deepseek_v3"), "5.24", **options, weights_dtype="fp32")
    with pytest.raises(UsageError, match=r"float32.*one dtype.*\(--weights-dtype\)"):
        planned(small("deepseek_v3"), "5.24", **options)


# ------------------------------------------------------------------------------------------------------------ gemma2


def test_gemma2_took_sdpa_until_5_20() -> None:
    assert planned(small("gemma2"), "5.20").options.attention == "sdpa"
    assert planned(small("gemma2"), "5.21").options.attention == "eager"


@pytest.mark.parametrize(("transformers", "itemsize"), [("5.23", 4), ("5.24", 2)])
def test_cached_values_took_the_keys_dtype_until_5_23(transformers: str, itemsize: int) -> None:
    """Full fine-tuning of float32 weights leaves them so: rotated keys are float32, values autocast's bf16."""
    config = small("llama")
    options = {"method": "full", "weights_dtype": "fp32", "phases": ["generation"], "prompt_len": 12}
    made = planned(config, transformers, max_new_tokens=4, **options)
    run = run_of(made)
    stretches = list(phases.generation(run, made.options))
    cached = [run.program.sizes[e >> 1] for s in stretches for e in s.events if run.program.labels[e >> 1] == VALUES]
    assert min(cached) == 12 * config["num_key_value_heads"] * made.architecture.kinds[0].attention.head_dim * itemsize
