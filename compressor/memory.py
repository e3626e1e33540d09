"""Memory by the kernel's own count: what this process holds and has held at most, and what is free."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


def reset_peak() -> None:
    """Start counting the peak anew, at what is resident now; only Linux can."""
    with suppress(OSError):
        CLEAR.write_text("5")


def resident(key: str = "VmRSS") -> int | None:
    """Bytes of resident memory now (VmRSS) or at most so far (VmHWM); None where the system does not tell."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), flags=re.M)
    except OSError:
        return _most() if key == "VmHWM" else None
    return int(found[1]) * 1024 if found else None


def available_memory() -> int | None:
    """Bytes that a new process could take without swapping; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), flags=re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _most() -> int | None:
    """The peak since the process began, where there is no /proc; macOS counts bytes, others KiB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Peak:
    """Filled in when the block of `peak_memory` ends."""

    peak: int | None = None


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most resident memory of the process while the block runs, what it held before included."""
    reset_peak()
    found = Peak()
    yield found
    found.peak = resident("VmHWM")
