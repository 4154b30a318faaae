"""The engine: storages, saved tensors, sums of gradients, recomputation, autocast's cache, sums of columns."""

from __future__ import annotations

from vramplan.planner import ops
from vramplan.planner.paper import Node, Parameter, Tape, Tensor, backward, checkpoint, column_sum_bytes

SHAPE = (4, 8)


def leaf() -> Tensor:
    return Tensor(None, SHAPE, "fp32", Node(0, [], lambda g, _: [], []))


def history(tape: Tape) -> list[int]:
    return [-tape.sizes[e >> 1] if e & 1 else tape.sizes[e >> 1] for e in tape.events]


def run_backward(tape: Tape, out: Tensor, stop: Tensor) -> list[Tensor | None]:
    assert out.node is not None
    assert stop.node is not None
    return backward(tape, [(out.node, 0, Tensor(None, out.shape, out.dtype))], [stop.node])


def test_a_storage_lives_as_long_as_its_last_holder() -> None:
    tape = Tape()
    a = tape.new(SHAPE, "fp32", "a")
    b = a.view(32)
    del a
    assert history(tape) == [128]
    del b
    assert history(tape) == [128, -128]


def test_a_saved_tensor_is_released_when_its_node_has_run() -> None:
    tape = Tape()
    x = leaf()
    out = ops.unary(tape, ops.scale(tape, x), "silu")
    assert tape.saved == {0}
    tape.events.clear()
    run_backward(tape, out, x)
    # the activation's gradient, then its input; the scaled gradient; both gradients go
    assert history(tape) == [128, -128, 128, -128, -128]


def test_gradients_of_one_input_are_added_in_place_unless_they_are_views() -> None:
    for plain in (True, False):
        tape = Tape()
        x = leaf()
        middle = ops.scale(tape, x)
        branches = [ops.scale(tape, m) for m in (middle, middle)]
        if not plain:
            branches[1] = ops.scale(tape, ops.view(tape, middle, (8, 4)))
            branches[1] = ops.view(tape, branches[1], SHAPE)
        out = ops.add(tape, branches[0], branches[1])
        before = len(tape.sizes)
        run_backward(tape, out, x)
        assert ("gradient sum" in tape.labels[before:]) is not plain


def test_a_weight_s_gradient_is_kept_and_named() -> None:
    tape = Tape()
    weight = Parameter("w", (16, 8), "fp32", True)
    out = ops.linear(tape, leaf(), weight, 16)
    assert out.node is not None
    backward(tape, [(out.node, 0, Tensor(None, out.shape, "fp32"))])
    assert weight.grad is not None
    assert weight.grad.storage is not None
    assert (tape.labels[weight.grad.storage.id], tape.scopes[weight.grad.storage.id]) == ("gradient", "w")


def test_checkpointing_keeps_nothing_and_runs_again_until_the_last_saved_tensor() -> None:
    tape = Tape()
    x = leaf()
    calls = []

    def layer(hidden: Tensor) -> Tensor:
        calls.append(len(tape.sizes))
        middle = ops.unary(tape, ops.scale(tape, hidden), "silu")
        return ops.scale(tape, middle)

    out = checkpoint(tape, layer, x)
    assert not tape.saved
    assert history(tape) == [128, 128, -128, 128, -128]
    run_backward(tape, out, x)
    assert len(calls) == 2
    # the second run stops when silu has saved its input: before silu's own output
    assert tape.labels[3:6] == ["gradient, scaled", "scaled", "gradient of silu"]


def test_autocast_keeps_casts_of_trained_weights_only() -> None:
    for trained in (True, False):
        tape = Tape("bf16")
        weight = Parameter("w", (16, 8), "fp32", trained)
        for _ in range(2):
            ops.linear(tape, leaf(), weight, 16)
        assert tape.labels.count("weight cast by autocast") == (1 if trained else 2)
        tape.end_autocast()
        assert not tape.cache


def test_sums_of_columns_take_a_buffer_only_when_blocks_share_them() -> None:
    # measured on an H200 (132 multiprocessors), torch 2.11: x.sum(0)
    measured = {
        (512, 2048): 0, (2048, 2048): 33554432, (4096, 8192): 138412032, (16384, 4096): 138412032,
        (8192, 1000): 65536000, (8192, 4096): 138412032,
    }  # fmt: skip
    assert {shape: column_sum_bytes(*shape) for shape in measured} == measured
