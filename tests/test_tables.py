"""Every row of tables/ is whole, plausible and found by every one of its names."""

import re

import pytest

from vramplan.planner import catalog
from vramplan.planner.architecture import parse
from vramplan.planner.errors import UsageError
from vramplan.planner.units import GIB, MIB

MODELS = catalog.models()
GPUS = catalog.gpus()


@pytest.mark.parametrize("table", ["models.jsonl", "gpus.jsonl"])
def test_files_are_lines_of_ascii(table: str) -> None:
    raw = (catalog._TABLES / table).read_bytes()
    assert raw.isascii()
    assert raw.endswith(b"}\n")
    assert b"\r" not in raw
    assert b"\n\n" not in raw


def test_every_name_of_a_model_leads_to_it_alone() -> None:
    owners: dict[str, set[str]] = {}
    for model in MODELS:
        names = [model.name, *model.aliases]
        assert len({name.lower() for name in names}) == len(names), model.name
        for name in names + [alias.split("/")[1] for alias in model.aliases if "/" in alias]:
            owners.setdefault(name.lower(), set()).add(model.name)
    assert {name: owner for name, owner in owners.items() if len(owner) > 1} == {}
    for name, (owner,) in owners.items():
        found = [catalog.find_model(spelling) for spelling in (name, name.upper())]
        assert [model and model.name for model in found] == [owner, owner]


def test_parameters_of_every_model_are_what_its_config_gives() -> None:
    counted = {model.name: parse(model.config).total_parameters for model in MODELS}
    assert counted == {model.name: model.total_parameters for model in MODELS}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_model_row(model: catalog.Model) -> None:
    assert model.verified == ("exact" if model.total_parameters == model.published_total else "config-read")
    assert (model.published_total is None) == (model.published_source is None)
    assert (model.hub_total is None) == (model.hub_total_reason is None)
    assert model.hub_total is None or model.hub_total > model.total_parameters
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", model.released)
    assert 1024 <= model.context_length <= 2**24
    assert model.config_source
    assert model.license


def test_every_name_of_a_gpu_leads_to_it_or_asks_which_is_meant() -> None:
    asks = {"a100", "a100-sxm", "a100-sxm4", "a100-pcie", "v100", "v100-sxm2"}
    asks |= {"rtx-4060-ti", "4060-ti", "GeForce RTX 4060 Ti"}
    for card in GPUS:
        for name in (card.name, card.title, f"NVIDIA {card.title}", card.name.upper(), card.name.replace("-", " ")):
            assert catalog.gpu(name) is card, name
        for alias in card.aliases:
            if alias in asks:
                with pytest.raises(UsageError, match="comes with"):
                    catalog.gpu(alias)
            else:
                assert catalog.gpu(alias) is card, alias


@pytest.mark.parametrize("card", GPUS, ids=lambda card: card.name)
def test_gpu_row(card: catalog.Gpu) -> None:
    assert card.memory_gb is not None
    assert card.driver_bytes is not None
    assert 0.92 * card.driver_bytes < card.budget_bytes < card.driver_bytes <= card.memory_gb * GIB
    assert card.driver_bytes >= 0.93 * card.memory_gb * GIB  # error-correcting codes and reserves take up to 7 %
    assert card.bandwidth_gb_s is not None
    assert 200 < card.bandwidth_gb_s <= 8000
    assert card.tensor_tflops is not None
    assert card.fp32_tflops is not None
    assert 2 * card.fp32_tflops <= card.tensor_tflops * 1.01 <= 40 * card.fp32_tflops
    assert card.pcie_gen in {3, 4, 5}
    assert card.tdp_w is not None
    assert 70 <= card.tdp_w <= 1400
    assert card.nvlink_gb_s is None or 50 <= card.nvlink_gb_s <= 1800
    weak = {"driver_bytes", "tensor_tflops", "nvlink_gb_s", "tdp_w", "bandwidth_gb_s", "multiprocessors"}
    assert set(card.uncertain) <= weak
    assert card.multiprocessors is not None
    assert 28 <= card.multiprocessors <= 304
    assert card.memory_source
    assert card.compute_source
    if card.vendor == "NVIDIA":
        capability = tuple(map(int, str(card.compute_capability).split(".")))
        assert card.bf16 == (capability >= (8, 0))
        assert card.flash_attention_2 == (None if capability >= (10, 0) else capability >= (8, 0))


def test_the_rule_for_unseen_cards_stays_below_every_seen_one() -> None:
    seen = [card for card in GPUS if card.vendor == "NVIDIA" and not card.budget_derived]
    assert len(seen) >= 20
    above = [
        card.name
        for card in seen
        if catalog.cuda_mib_from_driver(card.driver_bytes // MIB) * MIB > card.budget_bytes  # type: ignore[operator]
    ]
    assert above == ["gh200"]
