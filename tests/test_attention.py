"""Which kernel runs where, and what each allocates forward and backward, as measured on an H200 with torch 2.11."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from vramplan.planner import attention, catalog, memory
from vramplan.planner.device import device
from vramplan.planner.layers import Attention
from vramplan.planner.paper import Node, Tape, Tensor, backward
from vramplan.planner.training import parse_options

if TYPE_CHECKING:
    from vramplan.planner.blocks import Settings


def tensor(shape: tuple[int, ...], dtype: str, merged: bool) -> Tensor:
    out = Tensor(None, shape, dtype, Node(0, [], lambda g, _: [], []))
    out.merged = merged
    return out


def settings(kernel: str, gpu: str = "h200", **options: Any) -> Settings:
    asked = parse_options({"method": "lora", "mixed_precision": "no", "attention": kernel, **options})
    return memory.settings(asked, device(catalog.gpu(gpu)))


def play(
    kernel: str, b: int, n: int, kv: int, t: int, d: int, dtype: str = "bf16", *, masked: bool = False,
    merged: bool = True,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Sizes of at least 5 KB, frees negative: of the forward (with a bias made before), and of the backward."""
    tape = Tape()
    q, k, v = (tensor((b, h, t, w), dtype, merged) for h, w in ((n, d), (kv, d), (kv, d)))
    bias = [tape.new((b, 1, t, t), dtype, "bias") if masked else None]
    if kernel == "flash":
        out = attention.flash(tape, q, k, v)
    elif kernel == "cudnn":
        out = attention.cudnn(tape, q, k, v, bias.pop())
    else:
        out = attention.efficient(tape, q, k, v, bias.pop())
    forward = history(tape)
    tape.events.clear()
    assert out.node is not None
    grads = backward(
        tape, [(out.node, 0, Tensor(None, out.shape, dtype))], [x.node for x in (q, k, v) if x.node is not None]
    )
    back = history(tape)
    del grads
    return forward, back


def history(tape: Tape) -> list[int]:
    signed = [-tape.sizes[e >> 1] if e & 1 else tape.sizes[e >> 1] for e in tape.events]
    return [size for size in signed if abs(size) >= 5000]


MB = 2**20
MEASURED = [
    (
        "flash", (1, 32, 32, 512, 64), {}, [2 * MB, 65536],
        [2 * MB, 2 * MB, 2 * MB, 65536, 4 * MB, -4 * MB, -65536, -65536],
    ),
    # grouped heads: dk and dv are made for every head first
    (
        "flash", (2, 16, 4, 1000, 128), {}, [8192000, 128000],
        [8192000, 2048000, 2048000, 131072, 16 * MB, 8192000, 8192000, -8192000, -8192000, -16 * MB, -131072, -128000],
    ),
    # few blocks of rows: the keys are split over four parts
    (
        "flash", (1, 8, 8, 512, 256), {}, [2 * MB, 16384, 65536, 16 * MB, -65536, -16 * MB],
        [2 * MB, 2 * MB, 2 * MB, 16384, 4 * MB, -4 * MB, -16384, -16384],
    ),
    (
        "flash", (1, 16, 16, 512, 80), {}, [1310720, 32768, 65536, 6 * MB, -65536, -6 * MB],
        [1310720, 1310720, 1310720, 32768, 3 * MB, -3 * MB, -32768, -32768],
    ),
    # heads apart in memory: the output is copied for backward
    (
        "flash", (2, 16, 16, 512, 64), {"merged": False}, [2 * MB, 65536],
        [2 * MB, 2 * MB, 2 * MB, 2 * MB, 65536, 4 * MB, -4 * MB, -65536, -2 * MB, -65536],
    ),
    (
        "efficient", (2, 16, 16, 1000, 128), {}, [8192000, 131072],
        [8192000, 8192000, 8192000, 128000, 16781312, -128000, -16781312, -131072],
    ),
    (
        "efficient", (1, 8, 8, 512, 256), {}, [2 * MB, 16384, 4 * MB, -4 * MB],
        [2 * MB, 2 * MB, 2 * MB, 16384, 12584960, -16384, -12584960, -16384],
    ),
    (
        "efficient", (1, 32, 32, 512, 64), {"dtype": "fp32"}, [4 * MB, 65536],
        [4 * MB, 4 * MB, 4 * MB, 4 * MB, 65536, 65536, -65536, -4 * MB, 4198400, -65536, -4198400, -65536],
    ),
    # a mask as a bias, padded to eight columns
    (
        "efficient", (2, 16, 16, 500, 64), {"masked": True}, [1000000, 1008000, -1000000, 2048000, 65536],
        [2048000, 2048000, 2048000, 64000, 4198400, -64000, -4198400, -1008000, -65536],
    ),
    ("cudnn", (1, 16, 16, 512, 80), {}, [1310720, 32768], [1310720, 1310720, 1310720, 2654464, -2654464, -32768]),
    (
        "cudnn", (2, 16, 4, 1000, 128), {"merged": False}, [8192000, 128000],
        [8192000, 2048000, 2048000, 32896256, -32896256, -128000],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "sizes", "more", "forward", "back"), MEASURED)
def test_a_kernel_allocates_what_was_measured(
    kernel: str, sizes: tuple[int, int, int, int, int], more: dict[str, object], forward: list[int], back: list[int]
) -> None:
    made, given_back = play(kernel, *sizes, **more)  # type: ignore[arg-type]
    assert made == forward
    # what the forward left (the output and what was saved) goes with the test's own references
    assert given_back[: len(back)] == back


@pytest.mark.parametrize(
    ("capability", "dtype", "heads", "d", "value_d", "masked", "grouped", "kernel"),
    [
        ((9, 0), "bf16", (32, 8), 64, 64, False, True, "cudnn"),
        ((9, 0), "bf16", (8, 8), 256, 256, True, True, "cudnn"),
        ((9, 0), "bf16", (32, 32), 192, 128, False, True, "cudnn"),
        ((9, 0), "bf16", (8, 8), 36, 36, False, True, "flash"),
        ((9, 0), "bf16", (8, 8), 512, 512, False, True, "efficient"),
        ((9, 0), "bf16", (71, 1), 64, 64, True, False, "math"),
        ((9, 0), "fp32", (16, 16), 64, 64, False, True, "efficient"),
        ((9, 0), "fp32", (32, 8), 64, 64, False, True, "math"),
        ((8, 0), "bf16", (32, 8), 128, 128, False, True, "flash"),
        ((8, 0), "bf16", (32, 32), 128, 128, True, True, "efficient"),
        ((8, 9), "bf16", (8, 8), 224, 224, False, True, "efficient"),
        ((8, 9), "bf16", (8, 8), 256, 256, False, True, "flash"),
        ((7, 5), "fp16", (32, 32), 128, 128, False, True, "efficient"),
        ((7, 5), "fp16", (32, 8), 128, 128, False, True, "math"),
        ((7, 5), "bf16", (32, 32), 128, 128, False, True, "math"),
    ],
)
def test_the_first_kernel_whose_conditions_hold_is_taken(
    capability: tuple[int, int], dtype: str, heads: tuple[int, int], d: int, value_d: int, masked: bool, grouped: bool,
    kernel: str,
) -> None:  # fmt: skip
    q, k, v = (Tensor(None, (1, h, 16, w), dtype) for h, w in ((heads[0], d), (heads[1], d), (heads[1], value_d)))
    assert attention.choose(capability, q, k, v, masked=masked, grouped=grouped) == kernel


def chosen(capability: tuple[int, int] | None, heads: tuple[int, int], d: int, value_d: int, **more: Any) -> str:
    q, k, v = (Tensor(None, (1, h, 16, w), "bf16") for h, w in ((heads[0], d), (heads[1], d), (heads[1], value_d)))
    return attention.choose(capability, q, k, v, **{"masked": False, "grouped": True, **more})


def test_what_later_versions_of_torch_choose() -> None:
    assert chosen((10, 0), (32, 32), 192, 128) == "cudnn"  # DeepSeek's heads, on Blackwell too
    assert chosen((9, 0), (12, 12), 64, 64, dropout=0.1) == "cudnn"
    assert chosen((9, 0), (12, 12), 64, 64, dropout=0.1, torch=(2, 12)) == "flash"
    assert chosen((9, 0), (12, 12), 64, 64, dropout=0.125, torch=(2, 12)) == "cudnn"
    assert chosen((9, 0), (8, 4), 160, 160, torch=(2, 15)) == "flash"
    assert chosen((9, 0), (8, 4), 256, 256, torch=(2, 15)) == "cudnn"
    assert chosen((8, 0), (8, 4), 512, 512) == "math"
    assert chosen((8, 0), (8, 4), 512, 512, torch=(2, 15)) == "efficient"
    assert chosen((8, 0), (8, 1), 64, 64, grouped=False) == "math"
    assert chosen((8, 0), (8, 1), 64, 64, grouped=False, torch=(2, 15)) == "flash"
    assert chosen(None, (32, 8), 128, 128) == "flash"
    assert chosen((8, 9), (8, 8), 256, 256, dropout=0.1) == "efficient"


def test_a_card_with_little_shared_memory_sums_dk_and_dv_outside_registers() -> None:
    # 8 blocks of 128 rows: 128 x 128 numbers and a lock, a counter and padding, 4 bytes each
    assert attention.workspace(1, 32, 1024, 128, 128, "bf16", (8, 0)) == (32 * 8 * (128 * 128 + 4) * 4, True)
    # 16 blocks of 64 rows by two of 64 columns; dk and dv in 200 // 32 parts of 64 keys
    elements = 16 * 2 * (64 * 64 + 4) + 2 * (6 * 64 * 128)
    assert attention.workspace(1, 32, 1024, 128, 128, "bf16", (12, 0)) == (32 * elements * 4, False)
    # heads of 96 have a kernel of their own on two of them
    assert attention.workspace(1, 32, 1024, 96, 96, "bf16", (8, 6)) == (32 * 8 * (128 * 96 + 4) * 4, True)
    # without a sum over parts of the keys float32 needs none
    assert attention.workspace(1, 32, 1024, 64, 64, "fp32", (6, 0)) == (0, False)


def test_heads_that_are_no_multiple_of_8_are_padded_for_flash() -> None:
    tape = Tape()
    q, k, v = (tensor((1, 4, 128, 36), "bf16", True) for _ in range(3))
    a = Attention(4, 4, 36, 36, 0, "none", "q", "k", "v", None, "o")
    out, _ = attention.attend(tape, q, k, v, a, settings("sdpa", gpu="a100-80gb"), None)
    assert out.shape == (1, 128, 4 * 36)
    padded = 4 * 128 * 40 * 2
    assert history(tape)[:4] == [padded] * 4  # q, k, v and the output


def test_flash_attn_on_padded_rows_copies_them_out_and_back() -> None:
    tape = Tape()
    q, k, v = tensor((2, 4, 128, 64), "bf16", True), *(tensor((2, 2, 128, 64), "bf16", True) for _ in range(2))
    a = Attention(4, 2, 64, 64, 0, "none", "q", "k", "v", None, "o")
    out, _ = attention.attend(tape, q, k, v, a, settings("flash_attention_2", padded=True), None)
    many, few = 2 * 128 * 4 * 64 * 2, 2 * 128 * 2 * 64 * 2
    # k, v, q, the output, and the output among zeros; row sums below 5 KB but for 4 heads of 256 rows
    assert [size for size in history(tape) if abs(size) > 5000] == [few, few, many, many, many]
    assert out.shape == (2, 128, 256)


def test_splits_of_the_flash_kernel() -> None:
    assert attention.flash_splits(256, 2, 132) == 1  # enough blocks of rows for 264 slots
    assert attention.flash_splits(64, 2, 132) == 2
    assert attention.flash_splits(64, 8, 132) == 4
