import json
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.planner import catalog
from vramplan.planner.errors import UsageError


@pytest.mark.parametrize(
    "name",
    ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "llama3.1:8b", "Llama-3.1-8B-Instruct", "LLAMA 3.1 8b", "llama_3_1_8b"],
)
def test_ways_to_write_a_model(name: str) -> None:
    model = catalog.find_model(name)
    assert model is not None
    assert (model.name, model.total_parameters, model.gated) == ("llama-3.1-8b", 8_030_261_248, True)
    assert model.config["hidden_size"] == 4096


@pytest.mark.parametrize(("name", "found"), [("opt_13b", "opt-13b"), ("OPT 1.3B", "opt-1.3b"), ("opt13b", "opt-13b")])
def test_digits_keep_their_separators(name: str, found: str) -> None:
    model = catalog.find_model(name)
    assert model is not None
    assert model.name == found


@pytest.mark.parametrize(
    "name", ["", " ", "-", "someone/Llama-3.1-8B", 'name": "gpt2', "llama", '"', "\\", "llama-3.1-8b\n{"]
)
def test_what_is_no_bundled_model(name: str) -> None:
    assert catalog.find_model(name) is None


def test_a_loose_name_of_two_models_asks_which() -> None:
    with pytest.raises(UsageError, match=r"^'mistral 7b' could be mistral-7b or mistral-7b-v0.3; name one \(MODEL\)$"):
        catalog.find_model("mistral 7b")


@given(st.text() | st.text("abil-_. :/0123456789"))
def test_any_text_is_found_not_found_or_refused_in_a_sentence(name: str) -> None:
    for look_up in (catalog.find_model, catalog.gpu):
        refusal = ""
        try:
            look_up(name)
        except UsageError as error:
            refusal = str(error)
        assert "\n" not in refusal
        assert len(refusal) < 400


def test_finding_a_model_parses_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    last = catalog.find_model(catalog._read("models.jsonl").rsplit('{"name": "', 1)[1].partition('"')[0])
    assert last is not None
    assert len(parsed) == 1
    assert min(timeit.repeat(lambda: catalog.find_model("Llama-3.1-8B-Instruct"), number=1, repeat=5)) < 5e-3


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h200", "h200"),
        ("RTX4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("2080 ti", "rtx-2080-ti"),
        ("A100 80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("H100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-PCIE-16GB", "v100-pcie-16gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_ways_to_write_a_gpu(name: str, found: str) -> None:
    assert catalog.gpu(name).name == found


def test_h200_figures() -> None:
    card = catalog.gpu("h200")
    assert (card.budget_bytes, card.driver_bytes) == (143_156 * 2**20, 143_771 * 2**20)
    assert (card.memory_gb, card.bandwidth_gb_s, card.tensor_tflops, card.nvlink_gb_s) == (141, 4800, 989, 900)
    assert not card.budget_derived


def test_a_derived_budget() -> None:
    card = catalog.gpu("rtx-a6000")
    assert (card.budget_bytes, card.budget_derived) == ((49_140 - 400 - 294) * 2**20, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100", "'a100' comes with 40 GB or 80 GB; name one: a100-40gb, a100-80gb (--gpu)"),
        ("V100", "'V100' comes with 16 GB or 32 GB; name one: v100-16gb, v100-32gb (--gpu)"),
        ("4060 ti", "'4060 ti' comes with 8 GB or 16 GB; name one: rtx-4060-ti-8gb, rtx-4060-ti-16gb (--gpu)"),
        ("rtx-9090", "unknown GPU 'rtx-9090'; did you mean rtx-5090 or rtx-4090 or rtx-3090? (--gpu)"),
        ("24", "'24' is no size; write a number and its unit, such as 24GiB or 24GB (--gpu)"),
        ("-24GiB", "'-24GiB' is no size; write a number and its unit, such as 24GiB or 24GB (--gpu)"),
        ("0GB", "the size '0GB' is out of range; write one above 0 and up to 64TiB (--gpu)"),
        (24, "a GPU is a name such as h200 or a size such as 24GiB, not 24 (--gpu)"),
    ],
)
def test_gpu_errors(name: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        catalog.gpu(name)
    assert str(error.value) == message


@pytest.mark.parametrize(("size", "budget"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5 tib", 3 * 2**39)])
def test_a_size_is_a_nameless_card(size: str, budget: int) -> None:
    card = catalog.gpu(size)
    assert (card.name, card.budget_bytes, card.tensor_tflops, card.bf16) == (size, budget, None, None)
