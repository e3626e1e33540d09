"""This machine: what figures were measured on, and how fast it reads memory and multiplies."""

from __future__ import annotations

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "gguf", "bitsandbytes")
READ_BYTES = 2**28  # beyond any cache
REPEATS = 5


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system of this machine; no name of host or user."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that run models, those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def speed(threads: int) -> tuple[float, float]:
    """(bytes per second read from memory, float32 FLOP per second of a matrix product): the best of five tries each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.ones(READ_BYTES // 4)
        square = torch.ones(1536, 1536)
        reading = min(_timed(lambda: values.sum()) for _ in range(REPEATS))
        product = min(_timed(lambda: square @ square) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(before)
    return READ_BYTES / reading, 2 * 1536**3 / product


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
