"""Whether bitsandbytes multiplies with the packed 4-bit weight, or dequantises it into a temporary first.

For few tokens its own kernel is faster; up to how many depends on the shape and on the GPU. The rule was calibrated
on cards by bitsandbytes' authors, so it is a ladder of thresholds and nothing to be derived. The backward always
dequantises.

Source (bitsandbytes 0.50): backends/cuda/ops.py, gemm_4bit and its _gemm_4bit_use_custom_cuda and _rocm.
"""

from __future__ import annotations

from functools import lru_cache

ALWAYS = 4  # tokens for which the kernel is taken on every NVIDIA GPU
NEVER = 1536  # tokens beyond which it is not
SMALL = 4 * 2**20  # weights below so many elements have rules of their own
COLUMNS = 64  # of the output that one thread block makes
BLOCK = 64  # weights that share one absmax: a row must be whole blocks

Capability = tuple[int, int]


@lru_cache(maxsize=4096)
def is_fused(m: int, n: int, k: int, dtype: str, capability: Capability | None, multiprocessors: int) -> bool:
    """Whether `m` tokens times a weight [n, k] need no dequantised copy; `capability` None is an AMD card (CDNA)."""
    if k % BLOCK or m > NEVER:
        return False
    if capability is None:
        return m <= (2 if dtype == "fp32" else 4)
    if m <= ALWAYS:
        return True
    if dtype == "fp32" or capability < (7, 5) or (capability == (7, 5) and dtype != "fp16"):
        return m < 8  # these have no tensor-core kernel
    if capability == (8, 7) or capability[0] == 11:
        return False
    blocks = -(-n // COLUMNS)
    if capability[0] == 10:
        return m <= _datacenter_blackwell(blocks, multiprocessors, n, k)
    if n * k < SMALL:
        return m <= _small_weight(m, blocks, multiprocessors, n, k, capability)
    if m < 8:
        return not _slow_below_eight(m, blocks, multiprocessors, n, k, capability)
    return m <= _LADDERS.get(capability, _ada)(blocks, multiprocessors, n, k)


# Each gives the most tokens. A GPU full of thread blocks, one for each multiprocessor, is a wave.


def _datacenter_blackwell(blocks: int, sms: int, n: int, k: int) -> int:
    if blocks >= 3 * sms:
        return 32
    return 8 if blocks >= sms and k < n else 0


def _small_weight(m: int, blocks: int, sms: int, n: int, k: int, capability: Capability) -> int:
    hbm = capability in ((8, 0), (9, 0))
    if 2 * k < n:
        if hbm:
            wide, narrow = (512, 1536) if capability == (8, 0) else (320, 512)
            return narrow if 3 * blocks < sms else wide
        if capability == (7, 5):
            short = 96 if k >= 704 else 320
            return 320 if blocks >= 3 * sms else 64 if k >= 1024 else short
        return 192 if blocks < sms and blocks * k > 320 * sms else 320
    if capability == (8, 0) and 4 * blocks <= sms:
        tall = 32 if 8 * blocks <= sms else 128
        return tall if k >= n else 384
    if capability == (7, 5) and blocks < sms and m > 8:
        return 64
    if 4 * blocks <= sms:
        return 32 if k < n or hbm else 23
    return 16 if 2 * blocks <= sms else 0


def _slow_below_eight(m: int, blocks: int, sms: int, n: int, k: int, capability: Capability) -> bool:
    """Where cards with HBM lose with 6 or 7 tokens: tall or square weights that fill part of the GPU."""
    if capability not in ((8, 0), (9, 0)) or m < 6 or blocks < (36 if capability == (9, 0) else 48):
        return False
    below_three_quarters, below_three_fifths = 4 * blocks < 3 * sms, 5 * blocks < 3 * sms
    if k > n:
        return below_three_quarters
    if k < n:
        return False
    return below_three_fifths if capability == (8, 0) else below_three_quarters and not below_three_fifths


def _turing(blocks: int, sms: int, n: int, k: int) -> int:
    if blocks >= 3 * sms:
        return 128 if k < n else 64
    return 64 if blocks >= sms // 2 else 32


def _a100(blocks: int, sms: int, n: int, k: int) -> int:
    if blocks >= 3 * sms:
        return 128
    if blocks >= sms:
        return 64 if k < n else 32
    very_tall = k >= 3 * n and 4 * blocks > sms
    square = k == n and blocks >= 48 and 5 * blocks < 3 * sms
    tall = k > n and sms <= 3 * blocks and 2 * blocks < sms
    if very_tall or square or tall:
        return 0
    wide = k <= n if 2 * blocks < sms else k < n
    return 128 if wide else 16


def _ampere(blocks: int, sms: int, _n: int, _k: int) -> int:
    return 128 if blocks >= sms else 64 if blocks >= sms // 2 else 16


def _hopper(blocks: int, sms: int, n: int, k: int) -> int:
    if blocks >= sms:
        return 64 if blocks >= 3 * sms else 48 if blocks >= 2 * sms else 32
    if blocks < sms // 2 or (k >= n and 4 * blocks < 3 * sms):
        return 0
    return 16


def _blackwell(blocks: int, sms: int, n: int, k: int) -> int:
    if blocks >= 2 * sms:
        return 256 if blocks >= 3 * sms else 128
    if 5 * blocks >= 4 * sms:
        return 96 if k >= n else 64
    if blocks >= sms // 2:
        return 64 if 2 * k >= n and blocks >= 128 else 8
    return 16 if k > 2 * n and blocks > 64 else 8


def _spark(blocks: int, sms: int, n: int, k: int) -> int:
    return 256 if blocks >= sms else _ada(blocks, sms, n, k)


def _ada(blocks: int, sms: int, n: int, k: int) -> int:
    """Also what no other rule names."""
    if blocks >= 2 * sms:
        return 256 if blocks >= 3 * sms else 128
    if 5 * blocks >= 4 * sms:
        if k > 2 * n or blocks >= 200:
            return 128
        square = 128 if sms >= 60 else 32
        return square if k >= n else 64
    if blocks >= sms // 2:
        narrow = 8 if blocks >= 64 else 32
        return 64 if k > 2 * n else narrow
    if k > n and blocks <= 48:
        return 12 if k >= 3 * n else 10
    return 16 if k > 2 * n or blocks < 48 else 8


_LADDERS = {
    (7, 5): _turing,
    (8, 0): _a100,
    (8, 6): _ampere,
    (9, 0): _hopper,
    (12, 0): _blackwell,
    (12, 1): _spark,
}
