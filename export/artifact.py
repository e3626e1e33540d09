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
from compressor.units import size

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
    progress: Callable[[str, int, int | None], object] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Export a Hugging Face folder into the folder `out` and return its manifest, which lies there as export.json.

    about: what GGUF metadata shall say of it, such as name. measure: a runtime -> figures for the manifest, such as
    fidelity. progress is told what is being done, how much of it is done, and of how much (None: unknown).
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
    done = 0

    def wrote(weights: int) -> None:
        nonlocal done
        done += weights
        progress("writing", done, None)

    with staged(out) as folder:
        with peak_memory() as memory:
            extra = {"about": about} if settings.format == "gguf" else {}
            format.write(student, folder, settings, progress=wrote, **extra)
        written = time.monotonic() - started
        progress("verifying", 0, None)
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


def record(manifest: dict[str, Any], timed: dict[str, Any], *, path: str) -> dict[str, Any]:
    """One entry of a report's exports[]: what the artifact is, how near to the student, how fast, how large."""
    agreement = manifest["agreement"]
    student, teacher = agreement["student"] or {}, agreement["teacher"] or {}
    return {
        "format": manifest["format"],
        "precision": manifest["precision"],
        "path": path,
        "bytes": manifest["bytes"],
        "kl_student": student.get("kl"),
        "kl_teacher": teacher.get("kl"),
        "top1": student.get("top1"),
        "perplexity": manifest["perplexity"],
        "skills": {skill: found["score"] for skill, found in manifest["skills"].items()},
        "overall": (manifest["overall"] or {}).get("score"),
        "runtime": timed["runtime"],
        "load_s": timed["load_s"],
        "prompt": timed["headline"]["prompt"],
        "ttft_ms": 1e3 * timed["headline"]["ttft_p50_s"],
        "decode_tokens_per_s": timed["headline"]["decode_tokens_per_s"],
        "peak_rss_bytes": timed["memory"]["peak_rss_bytes"],
        "estimate": timed["estimate"].get("device"),
        "budget": timed["budget"],
    }


def describe(record: dict[str, Any]) -> str:
    """A record in one line."""
    name = f"{record['format']}-{record['precision']}"
    if record.get("failed"):
        return f"{name}: not kept"
    parts = [size(record["bytes"])]
    if record["overall"] is not None:
        parts.append(f"skills {record['overall']:.1%}")
    if record["kl_student"] is not None:
        parts.append(f"KL {record['kl_student']:.3g} to the student")
    parts += [f"{record['decode_tokens_per_s']:,.0f} tokens/s", f"TTFT {record['ttft_ms']:.0f} ms"]
    parts.append(f"{size(record['peak_rss_bytes'])} peak memory")
    return f"{name}: {', '.join(parts)}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
