"""Decode speed of int4 ONNX by block size and 8-bit parts, against transformers in float32 and llama.cpp's q4_0.

    python benchmarks/decode_speed.py --work DIR --variants 32:head,64:head,128:head,128:none

A random Llama of 317M parameters (hidden 1024, 16 layers, ffn 4096, 16/8 heads, vocabulary 32,000, untied): on a CPU
its weights are what decoding waits for. All run alternately, same weights, same threads; ratios are pair by pair.
llama.cpp takes part where llama-cpp-python is installed (`make llama-cpp`).
"""

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor.checkpoint import DEMO_FOLDER, copy_tokenizer
from compressor.report import markdown_table
from export import Settings
from export.bench import bench
from export.formats import FORMATS

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def random_model(folder: Path) -> None:
    """Write the random model once, in float32, with a tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    copy_tokenizer(DEMO_FOLDER, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and its artifacts")
    parser.add_argument("--variants", default="32:head,64:head,128:head,128:none", help="BLOCK:PART+PART, ...")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    student = arguments.work / "random-317m"
    random_model(student)
    names = {} if arguments.no_torch else {str(student): "transformers float32"}
    wanted = []
    for variant in arguments.variants.split(","):
        block, _, parts = variant.partition(":")
        sensitive = tuple(part for part in parts.split("+") if part != "none")
        wanted.append(
            (f"ONNX int4, block {block}, 8 bits: {parts}", Settings("onnx", "int4", int(block), sensitive=sensitive))
        )
    if find_spec("llama_cpp"):
        wanted.append(("llama.cpp q4_0", Settings("gguf", "q4_0")))
    for title, settings in wanted:
        folder = arguments.work / title.replace(" ", "-").replace(",", "").replace(":", "")
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            FORMATS[settings.format].write(student, folder, settings)
        names[str(folder)] = title
    result = bench(
        list(names),
        versus=True,
        threads=arguments.threads,
        repeats=arguments.repeats,
        points=[arguments.prompt],
        say=print,
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    last = list(names)[-1]
    ratios = {(ratio["first"], ratio["measure"]): ratio for ratio in result["ratios"] if ratio["second"] == last}
    rows = []
    for found in result["artifacts"]:
        point = found["headline"]
        cells = [f"{found['bytes'] / 1e6:.0f} MB", f"{1e3 * point['ttft_p50_s']:.0f} ms"]
        cells += [f"{point['decode_tokens_per_s']:.1f}", f"{found['memory']['peak_rss_bytes'] / 1e6:.0f} MB"]
        for measure in ("decode", "ttft"):
            ratio = ratios.get((found["what"], measure))
            cells.append(f"{ratio['speed_up']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else "1")
        rows.append([names[found["what"]], *cells])
    header = [
        "artifact",
        "size",
        "TTFT",
        "decode tokens/s",
        "peak memory",
        f"decode over {names[last]}",
        "TTFT over it",
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
