"""Imported once by the server that case processes are forked from, so that a case does not wait for its imports.

CUDA must not be touched before a fork. PyTorch's check for a GPU goes through NVML when it is told to; bitsandbytes
asks CUDA for the compute capability as it is imported (bitsandbytes/cuda_specs.py), and peft imports bitsandbytes, so
both are left to each case, and only what they need is imported here.
"""

from __future__ import annotations

import contextlib
import os
from importlib import import_module

from vramplan.probes.probe_runner import ENVIRONMENT

os.environ |= ENVIRONMENT
# With several GPUs in sight the Trainer would use them all (DataParallel); a probe measures the first.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

for _name in (
    "torch",
    "torch._functorch.aot_autograd",
    "torch._inductor.codecache",
    "triton",
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
):
    with contextlib.suppress(Exception):  # what is missing or broken is told by the case that needs it
        import_module(_name)
