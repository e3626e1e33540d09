"""Size against quality of int4 ONNX by block size, algorithm and what stays at 8 bits, on a run or a model folder.

    python benchmarks/int4_quality.py runs/demo --blocks 32,64,128 --algorithms rtn,search --prompts 200

Each artifact is verified and measured by `compressor.export`, so the figures are those a user gets. Speed is measured
by benchmarks/decode_speed.py, on a model large enough for its weights to matter.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import compressor
from compressor.report import markdown_table
from export import Settings

HEADER = ["block", "algorithm", "8 bits", "bytes", "bits", "KL", "KL p99", "top-1", "perplexity", "skills"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--blocks", default="32,64,128")
    parser.add_argument("--algorithms", default="rtn,search,k_quant,hqq,gptq")
    parser.add_argument("--sensitive", default="none;head;head,first,last", help="settings, semicolons between")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    if not (Path(arguments.what) / "run.json").exists() and not arguments.data:
        parser.error("a model folder needs --data FILE; a run folder brings its own")
    rows = []
    choices = (arguments.blocks.split(","), arguments.algorithms.split(","), arguments.sensitive.split(";"))
    for block, algorithm, parts in product(*choices):
        sensitive = () if parts == "none" else tuple(parts.split(","))
        settings = Settings("onnx", "int4", block=int(block), algorithm=algorithm, sensitive=sensitive)
        with tempfile.TemporaryDirectory() as folder:
            found = compressor.export(
                arguments.what,
                settings,
                out=Path(folder) / "artifact",
                data=arguments.data,
                prompts=arguments.prompts,
                tokens=arguments.tokens,
            )["manifest"]
        near = found["agreement"]["student"]
        skills = f"{found['overall']['score']:.1%}" if found["overall"] else "-"
        sizes = [f"{found['bytes']:,}", f"{found['bits_per_weight']:.2f}"]
        distances = [f"{near['kl']:.4f}", f"{near['kl_p99']:.3f}", f"{near['top1']:.1%}"]
        rows.append([block, algorithm, parts, *sizes, *distances, f"{near['perplexity_ratio'] - 1:+.1%}", skills])
        print(" ".join(rows[-1]), flush=True)
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main()
