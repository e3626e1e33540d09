"""Does an exported web folder answer in a real browser as it does here?

The demo teacher is exported for the web, served beside transformers.js on 127.0.0.1, and asked one question by
headless Chromium in every dtype that WebAssembly runs. The prompt's ids and every greedy token must be those of
onnxruntime-genai (q4) and of plain onnxruntime (q8, q4f16) on the same files.
    python tests/runtimes/web.py [--cache build/web] [--chromium PATH]
Exit codes: 0 the same tokens, 1 others or none, 2 a program is missing. The first run installs transformers.js.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# transformers looks for a package called optimum; the script of that name beside this one is not it
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

from compressor.errors import CheckFailed, UserError  # noqa: E402

LIBRARY = "@huggingface/transformers"
GRAPHS = {"q4": "onnx/model_q4.onnx", "q8": "onnx/model_quantized.onnx", "q4f16": "onnx/model_q4f16.onnx"}
MOST_TOKENS = 48  # the answer has 29 with its end token, so that the end is put to the test as well
SECONDS = 300
# A function call is the longest answer the demo teacher gives, and one it is sure of: its second choice is more than
# 7 logits away at every token, which no runtime's rounding bridges.
CONVERSATION: dict[str, Any] = {
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
}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # whatever is not served here is not found
)


def program(*names: str) -> str:
    """The first of these that is installed. Raises UserError where none is."""
    for name in names:
        if found := shutil.which(name):
            return found
    raise UserError(f"{names[0]} is missing; expected it on the PATH; install it to run this check")


def install(cache: Path) -> str:
    """Have npm put transformers.js into the cache folder unless it is there; return its version."""
    wanted = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"][LIBRARY]
    there = cache / "node_modules" / LIBRARY / "package.json"
    if there.is_file() and json.loads(there.read_text(encoding="utf-8"))["version"] == wanted:
        return wanted
    program("node")
    npm = program("npm")
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", cache)
    print(f"installing transformers.js {wanted}, half a minute or so", flush=True)
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[0]
        raise UserError(f"npm could not install {LIBRARY} {wanted} ({why}); expected a registry it can reach")
    return wanted


def expected_answers(folder: Path) -> tuple[list[int], dict[str, list[int]]]:
    """The prompt's ids, and the greedy tokens of every dtype up to and with the end token."""
    from compressor.runtime import OnnxRuntime, load, prompt_ids

    runtime = load(folder)
    assert isinstance(runtime, OnnxRuntime)
    prompt = prompt_ids(CONVERSATION, runtime.tokenizer)
    tokens = {dtype: plain_tokens(folder / graph, prompt) for dtype, graph in GRAPHS.items()}
    tokens["q4"] = runtime.tokens(prompt, max_new_tokens=MOST_TOKENS, ignore_eos=True)
    return prompt, {dtype: until(found, runtime.stops) for dtype, found in tokens.items()}


def plain_tokens(graph: Path, prompt: list[int]) -> Iterator[int]:
    """Greedy tokens of a graph in plain onnxruntime; genai_config.json names another of the folder's graphs."""
    import torch

    from export.plain_onnx import PlainOnnx

    logits = PlainOnnx(graph).cached_logits
    ids = list(prompt)
    for _ in range(MOST_TOKENS):
        token = int(logits(torch.tensor(ids), prefill=len(prompt))[-1].argmax())
        yield token
        ids.append(token)


def until(tokens: Iterator[int], stops: set[int]) -> list[int]:
    """The tokens up to and with the first that ends an answer."""
    found = []
    for token in tokens:
        found.append(token)
        if token in stops:
            break
    return found


class Server(ThreadingHTTPServer):
    """Serves the page with a task in it, the exported folder and the installed packages; takes the page's results."""

    def __init__(self, task: dict[str, Any], folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.task = task
        self.folders = {prefix: folder.resolve() for prefix, folder in folders.items()}
        self.results: dict[str, dict[str, Any]] = {}
        self.answered = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def page(self) -> bytes:
        # an answer may hold </script>
        task = json.dumps(self.task).replace("<", "\\u003c")
        html = (HERE / "page.html").read_text(encoding="utf-8")
        return html.replace('type="application/json">{}<', f'type="application/json">{task}<').encode()


class Handler(SimpleHTTPRequestHandler):
    """One request to `Server`."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        path = unquote(urlsplit(path).path)
        for prefix, folder in self.server.folders.items():
            file = (folder / path.removeprefix(prefix)).resolve()
            if path.startswith(prefix) and file.is_relative_to(folder):
                return str(file)
        return os.devnull  # which is no file to send, so 404

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        body = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.results = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def chromium(path: str, address: str, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A headless browser at an address, with a profile of its own; it and its children end with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, log.open("ab") as output:
        command = [path, *FLAGS, f"--user-data-dir={profile}", *options, address]
        browser = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            yield browser
        finally:
            if browser.poll() is None:
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()


def ask(server: Server, path: str, log: Path) -> None:
    """Open the page and wait until it has handed in its results. Raises CheckFailed where it never does."""
    with chromium(path, server.address, log) as browser:
        for _ in range(SECONDS):
            if server.answered.wait(1):
                return
            if browser.poll() is not None:
                raise CheckFailed(f"chromium ended with {browser.returncode} before the page answered; see {log}")
    raise CheckFailed(f"the page did not answer within {SECONDS} s; see {log}")


def judge(results: dict[str, dict[str, Any]], prompt: list[int], expected: dict[str, list[int]]) -> list[str]:
    """Mark every result with `same` and return what is wrong, a line each."""
    wrong = []
    for dtype, tokens in expected.items():
        found = results.setdefault(dtype, {"error": "the page gave no result"})
        found["same"] = found.get("prompt") == prompt and found.get("tokens") == tokens
        if "error" in found:
            wrong.append(f"{dtype}: transformers.js fails: {found['error']}")
        elif found["prompt"] != prompt:
            wrong.append(f"{dtype}: the browser's prompt is {found['prompt']}, expected {prompt}")
        elif found["tokens"] != tokens:
            wrong.append(f"{dtype}: the browser's tokens are {found['tokens']}, expected {tokens}")
    return wrong


def check(cache: Path, browser: str | None) -> None:
    """Export, serve, ask, judge, and leave a screenshot. Raises CheckFailed or UserError."""
    import transformers

    from compressor.checkpoint import DEMO_FOLDER
    from export import Settings, export

    path = program(browser) if browser else program("chromium", "chromium-browser", "google-chrome")
    version = install(cache)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    log, screenshot = cache / "chromium.log", cache / "screenshot.png"
    log.unlink(missing_ok=True)
    screenshot.unlink(missing_ok=True)
    settings = Settings("onnx", "int4", web=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "demo"
        export(DEMO_FOLDER, settings, folder)
        prompt, expected = expected_answers(folder)
        task = {
            **CONVERSATION,
            "name": settings.name,
            "source": "the demo teacher",
            "version": version,
            "model": folder.name,
            "dtypes": list(GRAPHS),
            "most_tokens": MOST_TOKENS,
            "library": f"/packages/{LIBRARY}/dist/transformers.min.js",
            "wasm": "/packages/onnxruntime-web/dist/",
        }
        with Server(task, {"/models/": folder.parent, "/packages/": cache / "node_modules"}) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            ask(server, path, log)
            wrong = judge(server.results, prompt, expected)
            server.task = task | {"results": server.results}
            with chromium(path, server.address, log, f"--screenshot={screenshot}", "--window-size=1280,900") as shot:
                shot.wait(SECONDS)
            server.shutdown()
    for dtype, found in server.results.items():
        if found["same"]:
            speed = len(found["tokens"]) / found["seconds"]
            print(f"{dtype}: same {len(prompt)} prompt ids, same {len(found['tokens'])} tokens, {speed:.0f} tokens/s")
    if wrong:
        raise CheckFailed("\n".join(wrong))
    if not screenshot.is_file():
        raise CheckFailed(f"chromium left no screenshot; see {log}")
    print(f"screenshot: {screenshot}")


def main() -> int:
    """Run the check; the exit code says how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "web", help="where npm installs to")
    parser.add_argument("--chromium", help="the browser, where it is not found by itself")
    options = parser.parse_args()
    try:
        check(options.cache.resolve(), options.chromium)
    except (UserError, CheckFailed) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
