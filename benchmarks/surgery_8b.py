"""Surgery on an 8B checkpoint: peak memory, and time against copying the same bytes.

A synthetic Llama-3.1-8B (random bf16 weights, four shards, 16 GB) is written into a temporary folder under
--dir and cut to llama-3.1-minitron-4b-width. Baseline: shutil.copyfile of the very shards that surgery
reads (16 GB in, 16 GB out; surgery writes 9 GB), each copy synced to disk as surgery syncs its shards.
Every run has a process of its own, whose peak resident memory (imports included) is reported; copy and
surgery alternate, and before each run the input is dropped from the page cache, so both start from the
disk. seconds exclude interpreter and imports. Needs about 33 GB of free disk and deletes everything.

    python benchmarks/surgery_8b.py --dir /tmp --json
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

TEACHER, STUDENT = "llama-3.1-8b", "llama-3.1-minitron-4b-width"
NOISE_VALUES = 2**25  # 64 MiB of bf16 that every tensor draws from, each from its own offset


def shapes(layers: int | None) -> tuple[dict[str, Any], Any, Any]:
    """Teacher config, teacher Shape, student Shape; fewer layers for a rehearsal."""
    from compressor.architecture import named_config
    from compressor.shape import Shape

    configs = [named_config(TEACHER), named_config(STUDENT)]
    if layers is not None:
        configs = [config | {"num_hidden_layers": layers} for config in configs]
    return configs[0], Shape.from_config(configs[0]), Shape.from_config(configs[1])


def create(folder: Path, layers: int | None) -> dict[str, Any]:
    """Write the synthetic teacher."""
    import torch

    from compressor import families
    from compressor.checkpoint import Described, write_checkpoint

    config, shape, _ = shapes(layers)
    noise = (0.02 * torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0))).bfloat16()

    def chunks(number: int, count: int) -> Iterator[torch.Tensor]:
        start = 7919 * number % NOISE_VALUES
        while count:
            piece = noise[start : start + count]
            yield piece
            count, start = count - len(piece), 0

    tensors = []
    for number, (name, axes) in enumerate(families.tensors(shape)):
        sizes = tuple(map(shape.size, axes))
        count = sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
        tensors.append(Described(name, "BF16", sizes, lambda n=number, c=count: chunks(n, c)))
    write_checkpoint(folder, tensors, config=config)
    return {"input_bytes": weight_bytes(folder)}


def surgery(source: Path, out: Path, layers: int | None) -> dict[str, Any]:
    """Cut with random scores: scattered channels, the hardest case for reading and gathering."""
    import numpy  # noqa: F401 - imports are not part of the time
    import torch  # noqa: F401

    from compressor.checkpoint import Checkpoint
    from compressor.scores import Scores
    from compressor.surgery import prune, select

    _, teacher, student = shapes(layers)
    start = time.perf_counter()
    checkpoint = Checkpoint(source)
    kept = select(Scores.random(teacher), teacher, student)
    prune(checkpoint, out, kept=kept, shape=student)
    return {"seconds": time.perf_counter() - start, "output_bytes": weight_bytes(out)}


def check(source: Path, out: Path, layers: int | None) -> dict[str, Any]:
    """A few rows of the student against plain indexing of the teacher's."""
    import torch

    from compressor.checkpoint import Checkpoint
    from compressor.scores import Scores
    from compressor.surgery import select

    _, teacher, student = shapes(layers)
    kept = select(Scores.random(teacher), teacher, student)
    before, after = Checkpoint(source), Checkpoint(out)
    last = student.num_layers - 1
    name = f"model.layers.{last}.mlp.up_proj.weight"
    for row in (0, student.ffn // 2, student.ffn - 1):
        old = kept.ffn[last][row]
        expected = before.rows(name, old, old + 1)[:, list(kept.hidden)]
        assert torch.equal(after.rows(name, row, row + 1), expected), name
    assert after.shape == student
    return {"student_parameters": student.parameters}


def copy(source: Path, out: Path, layers: int | None) -> dict[str, Any]:
    """The baseline: every shard, copied by the kernel and synced."""
    start = time.perf_counter()
    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)
    return {"seconds": time.perf_counter() - start, "output_bytes": weight_bytes(out)}


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "create": lambda source, out, layers: create(source, layers),
    "surgery": surgery,
    "copy": copy,
    "check": check,
}


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_cache(folder: Path) -> None:
    """Forget the pages of these files, where the system lets a user do so."""
    for path in folder.glob("*.safetensors"):
        sync(path)
        handle = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def child(run: str, source: Path, out: Path, layers: int | None) -> dict[str, Any]:
    """Run one step in a fresh process. This parent stays small: Linux counts it into the child's peak."""
    command = [sys.executable, __file__, "--run", run, "--source", str(source), "--out", str(out)]
    command += [] if layers is None else ["--layers", str(layers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    print(f"{run}: {json.dumps(result)}", file=sys.stderr)
    return result


def benchmark(folder: Path, *, rounds: int, layers: int | None) -> dict[str, Any]:
    teacher, out = folder / "teacher", folder / "out"
    made = child("create", teacher, out, layers)
    runs: dict[str, list[dict[str, Any]]] = {"copy": [], "surgery": []}
    for turn in range(rounds):
        # copy first, then surgery first: a drift of the machine falls on both
        for run in ("copy", "surgery") if turn % 2 == 0 else ("surgery", "copy"):
            drop_cache(teacher)
            runs[run].append(child(run, teacher, out, layers))
            if run == "surgery":
                child("check", teacher, out, layers)
            shutil.rmtree(out)
    # other work on the machine only adds time, so the fastest run of each says most
    seconds, copy_seconds = (min(result["seconds"] for result in runs[run]) for run in ("surgery", "copy"))
    return {
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in runs["surgery"]),
        "seconds": round(seconds, 2),
        "copy_seconds": round(copy_seconds, 2),
        "ratio": round(seconds / copy_seconds, 3),
        "input_bytes": made["input_bytes"],
        "output_bytes": runs["surgery"][0]["output_bytes"],
        "rounds": {run: [round(result["seconds"], 2) for result in results] for run, results in runs.items()},
        "cpu_seconds": {run: [result["cpu_seconds"] for result in results] for run, results in runs.items()},
        "teacher": TEACHER,
        "student": STUDENT,
        "layers": layers or "all",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Surgery on an 8B checkpoint")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where 33 GB are free")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each; the fastest count")
    parser.add_argument("--layers", type=int, help="fewer layers on both sides: a rehearsal, not the claim")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        result = RUNS[options.run](options.source, options.out, options.layers)
        unit = 1 if sys.platform == "darwin" else 1024
        usage = resource.getrusage(resource.RUSAGE_SELF)
        result["peak_rss_bytes"] = usage.ru_maxrss * unit
        result["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 2)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(prefix="surgery-", dir=options.dir) as folder:
        result = benchmark(Path(folder), rounds=options.rounds, layers=options.layers)
    if options.json:
        print(json.dumps(result))
    else:
        print(f"peak memory {result['peak_rss_bytes'] / 2**30:.2f} GiB (limit 2)")
        times = f"surgery {result['seconds']} s, copy {result['copy_seconds']} s"
        print(f"{times}, ratio {result['ratio']} (limit 1.5)")


if __name__ == "__main__":
    main()
