"""Memory and time of the fused distillation loss against the plain one (two log_softmax, kl_div, backward).

Every measurement runs in a fresh child process, plain and fused in turn: added memory is the peak
resident set of one forward and backward minus what was resident just before, time is the median of the
repeats that follow it. Only the ratios travel between machines. Linux only (/proc).
    python benchmarks/fused_loss.py --tokens 2048 --vocab 128256 --hidden 512 --json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is resident now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(name: str, *, tokens: int, vocab: int, hidden: int, repeats: int) -> dict[str, float]:
    """Run one loss in this process: added peak bytes, seconds, loss and the norm of the head's gradient."""
    import torch
    from torch.nn import functional

    from compressor.losses import Dense, fused_linear_divergence

    torch.manual_seed(0)
    scale = hidden**-0.5
    states = torch.randn(tokens, hidden, requires_grad=True)
    head = (torch.randn(vocab, hidden) * scale).requires_grad_()
    teacher_states, teacher_head = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * scale

    def plain():
        with torch.no_grad():
            target = functional.log_softmax(teacher_states @ teacher_head.t(), -1)
        log_q = functional.log_softmax(states @ head.t(), -1)
        return functional.kl_div(log_q, target, reduction="sum", log_target=True)

    def fused():
        return fused_linear_divergence(states, head, Dense(teacher_states, teacher_head)).loss

    def step() -> float:
        states.grad = head.grad = None
        loss = {"plain": plain, "fused": fused}[name]()
        loss.backward()
        return loss.item()

    (torch.ones(256, 256, requires_grad=True) @ torch.ones(256, 256)).sum().backward()  # wake threads and autograd
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    loss = step()
    added = resident_bytes("VmHWM") - before
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    norm = head.grad.double().norm().item()
    return {"added_bytes": added, "seconds": statistics.median(seconds), "loss": loss, "grad_norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="rows that count in the loss")
    parser.add_argument("--vocab", type=int, default=128256, help="ids of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="width of both models")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes in each child process")
    parser.add_argument("--rounds", type=int, default=2, help="plain/fused pairs of child processes")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--child", choices=("plain", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {
        "tokens": options.tokens,
        "vocab": options.vocab,
        "hidden": options.hidden,
        "repeats": options.repeats,
    }
    if options.child:
        print(json.dumps(measure(options.child, **sizes)))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "fused": []}
    for _ in range(options.rounds):
        for name, results in runs.items():
            flags = [f"--{key}={value}" for key, value in sizes.items()]
            child = subprocess.run(
                [sys.executable, __file__, f"--child={name}", *flags], check=True, stdout=subprocess.PIPE
            )
            results.append(json.loads(child.stdout))
    report = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    ratio = {key: report["fused"][key] / report["plain"][key] for key in ("added_bytes", "seconds")}
    result = {**sizes, **report, "ratio": ratio}
    if options.json:
        print(json.dumps(result))
        return
    for name, values in report.items():
        print(
            f"{name:6} adds {values['added_bytes'] / 1e9:.3f} GB, {values['seconds']:.2f} s, "
            f"loss {values['loss']:.7g}, gradient norm {values['grad_norm']:.7g}"
        )
    print(f"fused / plain: memory {ratio['added_bytes']:.3f}, time {ratio['seconds']:.2f}")


if __name__ == "__main__":
    main()
