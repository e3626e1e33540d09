"""One export from start to end: written aside, verified, measured, and only then given its name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.checkpoint import Checkpoint, count_parameters, load_tokenizer
from compressor.errors import CheckFailed, UserError
from compressor.memory import peak_memory
from compressor.run import alone, read_json, staged, write_json
from compressor.units import size

from .machine import versions
from .settings import Settings

if TYPE_CHECKING:
    from compressor.runtime import Runtime

MANIFEST = "export.json"
MEASURED = ("load_s", "ttft_ms", "decode_tokens_per_s", "peak_rss_bytes")  # left empty where another runtime stood in
Measure = Callable[["Runtime"], dict[str, Any]]


def export(
    student: Path | str,
    settings: Settings,
    out: Path | str,
    *,
    about: Mapping[str, str] | None = None,
    calibration: Callable[[], Iterable[Mapping[str, Any]]] | None = None,
    measure: Measure | None = None,
    progress: Callable[[str, int, int | None], object] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Export a Hugging Face folder into the folder `out` and return its manifest, which lies there as export.json.

    about: what GGUF metadata shall say of it, such as name. calibration: gives the batches that gptq rounds on.
    measure: a runtime -> figures for the manifest, such as fidelity. progress is told what is being done, how much
    of it is done, and of how much (None: unknown).
    An older artifact in `out` is replaced once the new one is verified. Raises UserError for a model that the format
    cannot hold and for an `out` that holds anything else than an export, CheckFailed where a check fails; then nothing
    is left behind.
    """
    from .formats import FORMATS
    from .verify import verify

    student, out = Path(student), Path(out).resolve()
    _check_place(out, student)
    load_tokenizer(student)  # a missing one is told before gigabytes are written
    checkpoint = Checkpoint(student)
    format = FORMATS[settings.format]
    format.check(checkpoint)
    started = time.monotonic()
    done = 0

    def wrote(weights: int) -> None:
        nonlocal done
        done += weights
        progress("writing", done, None)

    with alone(out), staged(out) as folder:
        with peak_memory() as memory:
            given = {"about": about, "calibration": calibration}
            format.write(student, folder, settings, progress=wrote, **{key: given[key] for key in format.asks})
        written = time.monotonic() - started
        progress("verifying", 0, None)
        try:
            with peak_memory() as judging:
                checks, runtime = verify(student, folder, settings, format)
        except CheckFailed as failed:
            raise CheckFailed(
                f"{settings.name} of {student} is not the student, so it was not kept: {failed}"
            ) from None
        parameters = count_parameters(student)
        manifest = {
            **settings.to_dict(),
            "student": checkpoint.fingerprint(),
            "parameters": parameters,
            "bytes": runtime.nbytes,
            "bits_per_weight": 8 * runtime.nbytes / parameters,
            "checks": checks,
            "warnings": [check["warning"] for check in checks if "warning" in check] + format.notes(student, settings),
            "seconds": {"write": round(written, 2), "verify": round(time.monotonic() - started - written, 2)},
            "peak_memory_bytes": {"write": memory.peak, "verify": judging.peak},
            "versions": versions(),
        }
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest["files"] = {str(path.relative_to(folder)): _digest(path) for path in files}
        write_json(folder / MANIFEST, manifest)
    if measure is not None:  # the artifact has its name by now: what is measured of it can be measured again
        manifest |= measure(format.open(out))
        write_json(out / MANIFEST, manifest)
    return manifest


def _check_place(out: Path, student: Path) -> None:
    """An export takes the place of an export, and of nothing else."""
    mine = not out.exists() or (out / MANIFEST).is_file() or (out.is_dir() and not any(out.iterdir()))
    if not mine or student.resolve().is_relative_to(out):
        raise UserError(
            f"{out} holds something else than an export; expected a new folder or an earlier export; "
            "choose another --out"
        )


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
        "warnings": manifest["warnings"],
    } | (dict.fromkeys(MEASURED) if timed["stand_in"] else {})


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
    if record["ttft_ms"] is None:
        parts.append("no times: its own runtime is not installed (make llama-cpp)")
    else:
        parts += [f"{record['decode_tokens_per_s']:,.0f} tokens/s", f"TTFT {record['ttft_ms']:.0f} ms"]
        parts.append(f"{size(record['peak_rss_bytes'])} peak memory")
    return f"{name}: {', '.join(parts)}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
