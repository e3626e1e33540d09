"""One artifact in a process of its own, driven by JSON lines: what `bench` measures and nothing else.

{"do": "load", "what": ..., "threads": 2}     -> {"load_s": ..., facts}
{"do": "run", "prompt": 128, "new": 32}       -> {"ttft_s": ..., "decode_s": ...}
{"do": "memory"}                              -> {"peak_rss_bytes": ..., ...}
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from compressor.child import answer
from compressor.memory import reset_peak, resident


class Artifact:
    """The commands, by name. Peak memory counts from before the artifact is opened on."""

    def __init__(self) -> None:
        self.runtime: Any = None
        self.baseline: int | None = None

    def load(self, what: str, threads: int) -> dict[str, Any]:
        """Open an artifact; what its libraries take to be imported is told apart (`baseline_rss_bytes`)."""
        import torch

        from compressor import runtime as runtimes

        from .machine import versions

        torch.set_num_threads(threads)
        _import_runtime(Path(what))
        self.baseline = resident()
        reset_peak()
        started = time.perf_counter()
        self.runtime = runtimes.load(what, threads=threads)
        loaded = time.perf_counter() - started
        return {
            "load_s": loaded,
            "runtime": runtimes.name_of(self.runtime),
            "parameters": self.runtime.parameters,
            "bytes": self.runtime.nbytes,
            "context": self.runtime.context,
            "baseline_rss_bytes": self.baseline,
            "kv_bytes_per_value": self.runtime.kv_bytes_per_value,
            "memory_bytes": self.runtime.memory_bytes,
            "every_logit": self.runtime.every_logit,
            "versions": versions(),
        }

    def run(self, prompt: int, new: int) -> dict[str, Any]:
        """Read `prompt` tokens and decode `new`: seconds to the first, and from the first to the last."""
        ids = [3 + (7919 * i) % 250 for i in range(prompt)]
        started = time.perf_counter()
        first = last = started
        count = 0
        for _ in self.runtime.tokens(ids, max_new_tokens=new, ignore_eos=True):
            last = time.perf_counter()
            first = first if count else last
            count += 1
        return {"ttft_s": first - started, "decode_s": last - first, "tokens": count}

    def memory(self) -> dict[str, Any]:
        """Peak resident memory, and how much of it is a file mapped rather than read."""
        peak, mapped = resident("VmHWM"), _mapped(self.runtime.folder)
        unmapped = None if peak is None or mapped is None else peak - mapped + (self.runtime.nbytes if mapped else 0)
        return {"peak_rss_bytes": peak, "mapped_bytes": mapped, "peak_rss_without_mmap_bytes": unmapped}


def _import_runtime(what: Path) -> None:
    """Import what the artifact's runtime needs, so that load time and memory above the baseline are the model's."""
    from importlib import import_module
    from importlib.util import find_spec

    from transformers import AutoConfig, AutoModelForCausalLM

    from compressor.checkpoint import load_tokenizer

    load_tokenizer(what)  # transformers imports by need: this is what it needs for a tokenizer
    if (what / "genai_config.json").exists():
        import_module("onnxruntime_genai")
        import_module("onnx_ir")
    elif list(what.glob("*.gguf")) and find_spec("llama_cpp"):
        import_module("llama_cpp")
    else:
        mapping: Any = AutoModelForCausalLM._model_mapping
        mapping[type(AutoConfig.from_pretrained(what, local_files_only=True))]  # and for a model


def _mapped(folder: Path) -> int | None:
    """Resident bytes of memory-mapped files in the artifact's folder; None where the system does not tell."""
    try:
        text = Path("/proc/self/smaps").read_text()
    except OSError:
        return None
    home, total, inside = str(folder.resolve()), 0, False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = home in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    answer(Artifact())
