"""Peak memory, as PyTorch sees it. Imports nothing of the package, of which there may be two versions."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = "cpu"
"""Where memory is counted."""


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that PyTorch holds at most during a call beyond what it held before.

    Scratch memory inside of oneDNN and MKL is not counted.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
