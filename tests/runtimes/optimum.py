"""Does Optimum open an exported ONNX folder, and does it say what onnxruntime-genai says?

The demo teacher is exported plainly and for the web. An environment of its own, with Optimum and the transformers 4
that it needs, opens each folder as ORTModelForCausalLM and answers two questions greedily: prompts, tokens and the
tokenizer's ids on awkward texts must be the same as here.
    python tests/runtimes/optimum.py [--cache build/optimum]
Exit codes: 0 the same, 1 not, 2 the environment cannot be made. The first run installs it, with a torch of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = ("torch==2.13.0", "transformers==4.57.6", "optimum-onnx[onnxruntime]==0.1.0")
# how a user opens each folder
EXPORTS: dict[str, dict[str, str]] = {
    "plain": {"file_name": "model.onnx"},
    "web": {"subfolder": "onnx", "file_name": "model_q4.onnx"},
}
MOST_TOKENS = 48  # both answers end before, so that the end is put to the test as well
# One with a system message, and one with a function, which is the longest answer the demo teacher gives
CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "system", "content": "Answer from the passages and cite them."},
            {
                "role": "user",
                "content": "Nobody is surprised. Hugo owns a horse [1].\nInes owns a goat [2].\n"
                "What pet does Hugo have?",
            },
        ]
    },
    {
        "messages": [{"role": "user", "content": "Find a hotel in Turku for 7 nights."}],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "book_hotel",
                    "description": "Book a hotel for some nights",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}, "number": {"type": "integer"}},
                        "required": ["city", "number"],
                    },
                },
            }
        ],
    },
)

# --- in the environment of Optimum, which knows neither compressor nor export -----------------------------------------


def inside() -> None:
    """Read a task from stdin, answer it with Optimum, and write what was found to stdout, both as JSON."""
    task = json.load(sys.stdin)
    talk = os.dup(1)  # libraries print to stdout as well
    os.dup2(2, 1)
    import transformers

    found = {name: answers(Path(folder), task) for name, folder in task["folders"].items()}
    with os.fdopen(talk, "w", encoding="utf-8") as output:
        json.dump({"version": transformers.__version__, "found": found}, output)


def answers(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The ids of the texts, and of every conversation the prompt and the greedy answer; or the error."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM  # pyright: ignore
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = ORTModelForCausalLM.from_pretrained(
            folder, use_io_binding=False, local_files_only=True, **EXPORTS[folder.name]
        )
        told = model.embed_size_per_head != model.config.head_dim
        # Optimum 0.1.0 fills an empty cache of hidden size / heads columns a head, whatever head_dim the config
        # names (its issue 2379), and no folder can make it do otherwise: pruning changes the one and not the other
        model.embed_size_per_head = model.config.head_dim
        said = []
        for conversation in task["conversations"]:
            prompt = tokenizer.apply_chat_template(
                conversation["messages"], tools=conversation.get("tools"), add_generation_prompt=True
            )
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": task["most_tokens"], "do_sample": False}
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            said.append({"prompt": list(prompt), "tokens": output[0, len(prompt) :].tolist()})
        return {"texts": text_ids(tokenizer, task["texts"]), "said": said, "told": told}
    except Exception as error:  # whatever it is, it is what a user would see
        return {"error": f"{type(error).__name__}: {error}"}


def text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of every text, without the special tokens that a tokenizer puts around it and with them."""
    return [list(tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (False, True) for text in texts]


# --- in the project's environment -------------------------------------------------------------------------------------


def environment(cache: Path) -> Path:
    """The Python of an environment with `REQUIREMENTS`, made where it is not there. Raises UserError."""
    from compressor.errors import UserError

    # a link to another Python: resolving it would lose the environment
    python, mark = cache / "venv" / "bin" / "python", cache / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    if mark.is_file() and mark.read_text(encoding="utf-8") == wanted and python.exists():
        return python
    print(f"installing Optimum into {cache / 'venv'}, some minutes", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(cache / "venv")],
        [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise UserError(f"the environment of Optimum cannot be made ({why}); expected an index that pip can reach")
    mark.write_text(wanted, encoding="utf-8")
    return python


def expected(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What `answers` shall find, said by the project's own runtime: the answers end with their end token."""
    from compressor.runtime import OnnxRuntime, load, prompt_ids

    runtime = load(folder)
    assert isinstance(runtime, OnnxRuntime)
    said = []
    for conversation in task["conversations"]:
        prompt = prompt_ids(conversation, runtime.tokenizer)
        tokens = []
        for token in runtime.tokens(prompt, max_new_tokens=task["most_tokens"], ignore_eos=True):
            tokens.append(token)
            if token in runtime.stops:
                break
        said.append({"prompt": prompt, "tokens": tokens})
    return {"texts": text_ids(runtime.tokenizer, task["texts"]), "said": said}


def differences(found: dict[str, Any], wanted: dict[str, Any], texts: list[str]) -> list[str]:
    """What is wrong with the answers from one folder, a line each."""
    if "error" in found:
        return [f"Optimum fails: {found['error']}"]
    wrong = []
    for text, one, two in zip([*texts, *texts], found["texts"], wanted["texts"], strict=True):
        if one != two:
            wrong.append(f"transformers 4 reads {text[:40]!a} as {one[:12]}, expected {two[:12]}")
    for one, two in zip(found["said"], wanted["said"], strict=True):
        for what in ("prompt", "tokens"):
            if one[what] != two[what]:
                wrong.append(f"the {what} of Optimum: {one[what]}, expected {two[what]}")
    return wrong


def check(cache: Path) -> None:
    """Export, let Optimum answer, compare. Raises CheckFailed or UserError."""
    import transformers

    from compressor.checkpoint import DEMO_FOLDER
    from compressor.errors import CheckFailed
    from export import Settings, export
    from export.probes import TEXTS

    python = environment(cache)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work) / name for name in EXPORTS}
        for name, folder in folders.items():
            export(DEMO_FOLDER, Settings("onnx", "int4", web=name == "web"), folder)
        task = {
            "folders": {name: str(folder) for name, folder in folders.items()},
            "conversations": CONVERSATIONS,
            "texts": list(TEXTS),
            "most_tokens": MOST_TOKENS,
        }
        # isolated: neither this folder, whose optimum.py is not that package, nor the checkout is on its path
        done = subprocess.run(
            [str(python), "-I", __file__, "--inside"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        if done.returncode:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise CheckFailed(f"the environment of Optimum ended with {done.returncode}: {last}")
        answer = json.loads(done.stdout)
        wrong = []
        for name, folder in folders.items():
            found, wanted = answer["found"][name], expected(folder, task)
            lines = differences(found, wanted, task["texts"])
            wrong += [f"{name}: {line}" for line in lines]
            if not lines:
                counts = " and ".join(str(len(said["tokens"])) for said in found["said"])
                told = "; Optimum had to be told head_dim" if found["told"] else ""
                print(
                    f"{name}: same {counts} tokens, same ids on {len(TEXTS)} texts by transformers "
                    f"{answer['version']} and {transformers.__version__}{told}"
                )
    if wrong:
        raise CheckFailed("\n".join(wrong))


def main() -> int:
    """Run the check; the exit code says how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "optimum", help="where the environment lies")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside()
        return 0
    # transformers looks for a package called optimum, and this script is not it
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]
    from compressor.errors import CheckFailed, UserError

    try:
        check(options.cache.resolve())
    except (UserError, CheckFailed) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
