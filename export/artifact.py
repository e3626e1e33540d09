"""One export from start to end: written aside, verified, measured, and only then given its name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint import Checkpoint
from compressor.errors import CheckFailed
from compressor.run import read_json, staged, write_json

from .memory import peak_memory
from .settings import Settings

if TYPE_CHECKING:
    from compressor.runtime import Runtime

MANIFEST = "export.json"
Measure = Callable[["Runtime"], dict[str, Any]]


def export(
    student: Path | str,
    settings: Settings,
    out: Path | str,
    *,
    about: Mapping[str, str] | None = None,
    measure: Measure | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Export a Hugging Face folder into the folder `out` and return its manifest, which lies there as export.json.

    about: what GGUF metadata shall say of it, such as name. measure: a runtime -> figures for the manifest, such as
    fidelity. progress is told the weights written.
    An older artifact in `out` is replaced once the new one is verified. Raises UserError for a model that the format
    cannot hold, CheckFailed where a check fails; then nothing is left behind.
    """
    from .formats import FORMATS
    from .verify import verify

    student, out = Path(student), Path(out)
    checkpoint = Checkpoint(student)
    checkpoint.check()
    format = FORMATS[settings.format]
    started = time.monotonic()
    with staged(out) as folder:
        with peak_memory() as memory:
            extra = {"about": about} if settings.format == "gguf" else {}
            format.write(student, folder, settings, progress=progress, **extra)
        written = time.monotonic() - started
        try:
            checks = verify(student, folder, settings, format)
        except CheckFailed as failed:
            raise CheckFailed(
                f"{settings.name} of {student} is not the student, so it was not kept: {failed}"
            ) from None
        runtime = format.open(folder)
        parameters = checkpoint.shape.parameters
        manifest = {
            **settings.to_dict(),
            "student": checkpoint.fingerprint(),
            "parameters": parameters,
            "bytes": runtime.nbytes,
            "bits_per_weight": 8 * runtime.nbytes / parameters,
            "checks": checks,
            "seconds": {"write": round(written, 2), "verify": round(time.monotonic() - started - written, 2)},
            "peak_memory_bytes": memory.peak,
            **(measure(runtime) if measure else {}),
            "files": {
                str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
            },
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path | str) -> dict[str, Any] | None:
    """What an artifact's export.json says, or None for a folder without one. UserError for a broken one."""
    path = Path(folder) / MANIFEST
    return read_json(path) if path.is_file() else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
