"""Peak memory of writing each format, beside the size of the student: nothing verified, nothing measured but that.

    python benchmarks/export_memory.py STUDENT --formats onnx-int4,onnx-fp16,gguf-q8_0,bitsandbytes-nf4

Every export runs in a process of its own. The baseline is what its libraries take once imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor.checkpoint import Checkpoint, resolve
from compressor.memory import peak_memory, resident
from compressor.report import markdown_table
from export import parse
from export.formats import FORMATS


def write(student: str, text: str) -> None:
    """In the child: write one format and print the figures."""
    settings = parse(text)
    with tempfile.TemporaryDirectory() as warm:  # imports what the writer needs: the demo is small
        FORMATS[settings.format].write(resolve("demo"), Path(warm), settings)
    baseline = resident()
    with tempfile.TemporaryDirectory() as folder, peak_memory() as memory:
        FORMATS[settings.format].write(Path(student), Path(folder), settings)
    print(json.dumps({"baseline": baseline, "peak": memory.peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--formats", default="onnx-fp32,onnx-fp16,onnx-int8,onnx-int4,gguf-q8_0,bitsandbytes-nf4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        write(arguments.student, arguments.child)
        return
    shape = Checkpoint(arguments.student).shape
    half, matrix = 2 * shape.parameters, 4 * shape.hidden * max(shape.ffn, shape.vocab)
    rows = []
    for text in arguments.formats.split(","):
        command = [sys.executable, __file__, arguments.student, "--child", text]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        above = found["peak"] - found["baseline"]
        rows.append([text, f"{found['peak'] / 1e6:,.0f} MB", f"{above / 1e6:,.0f} MB", f"{above / half:.2f}"])
    print(f"student: {half / 1e6:,.0f} MB in 16 bits, largest matrix {matrix / 1e6:,.0f} MB in float32")
    print(markdown_table(["format", "peak", "above the libraries", "of the student in 16 bits"], rows))


if __name__ == "__main__":
    main()
