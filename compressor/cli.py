"""The commands. Heavy imports wait until a command runs, and this is the one place where errors become exit codes.

Exit codes: 0 done; 1 a check failed; 2 the user can fix it. Data goes to stdout, talk to stderr.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CheckFailed, UserError

app = typer.Typer(
    name="compressor",
    help="Turn a large open-weight language model into a small one that fits a device, and prove it.",
    epilog="With --debug, an error shows its traceback.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # the shell's 128 + SIGINT
TARGET_HELP = "4b, 350m, 50%, 2GiB@int4, layers=16, hidden=3072,ffn=9216, or a published shape by name."
WHAT_HELP = "A run folder, a model folder, a Hub id, or `demo`."

Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Hub id, folder, or `demo` (embedded). [default: meta-llama/Llama-3.1-8B]"),
]
Target = Annotated[str | None, typer.Option(metavar="SIZE", help=TARGET_HELP)]
Data = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Hub dataset id, JSONL, text or parquet file, a folder of them, or `demo`."),
]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="YAML", help="A YAML recipe, or the name of a shipped one.")
]
Correct = Annotated[
    str | None,
    typer.Option(metavar="MODE", help="Train the teacher on the data too: full, lora or norms. [default: off]"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the recipe: section.key=value; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _recipe_values(
    teacher: str | None, target: str | None, data: str | None, recipe: str | None, settings: list[str] | None
) -> dict[str, Any]:
    """Nested values from the command line laid over the recipe file."""
    from .recipe import load_values, merged, set_value

    values: dict[str, Any] = load_values(recipe) if recipe else {}
    for setting in settings or []:
        set_value(values, setting)
    values |= {key: value for key, value in (("teacher", teacher), ("target", target)) if value is not None}
    if data is not None:
        values = merged(values, {"data": {"source": data}})
    if "target" not in values:
        raise UserError("no target; expected --target X, for example --target 50% or --target 4b")
    return values


@app.command()
def plan(
    teacher: Teacher = None,
    target: Target = None,
    data: Data = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """What would happen: shapes, bytes, memory, time. Needs only the teacher's config."""
    from . import pipeline
    from .plan import render
    from .progress import stdout

    planned = pipeline.plan(_recipe_values(teacher, target, data, recipe, settings))
    if as_json:
        _print_json(planned.to_dict())
    else:
        render(planned, stdout())


@app.command()
def distill(
    teacher: Teacher = None,
    target: Target = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/TEACHER-TARGET]")] = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="kl (the teacher's distributions), sft (data), seqkd (the teacher's answers), gkd or minillm (the "
            "student's own)."
        ),
    ] = None,
    signal: Annotated[
        str | None, typer.Option(help="online, or what a cache keeps of the teacher: topk, sampled or hidden.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder of compressor cache. [default: the run's]")
    ] = None,
    correct: Correct = None,
    align: Annotated[
        str | None, typer.Option(metavar="STAGES", help="Align the student after: sft, dpo, or sft,dpo.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(metavar="FORMATS", help="Export the student too: onnx-int4,gguf-q8_0, ...")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Hold the exports to a device, such as raspberry-pi-5-8gb.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan.")] = False,
    as_json: Json = False,
) -> None:
    """Prune the teacher to the target size, distill it back to health, judge it. Run it again to resume."""
    settings = [*(settings or [])]
    dials = {"method": method, "signal": signal, "cache": cache}
    settings += [f"distill.{key}={json.dumps(value)}" for key, value in dials.items() if value is not None]
    settings += [f"correct.mode={json.dumps(correct)}"] if correct else []
    settings += [f"align.stages=[{align}]"] if align is not None else []
    if export is not None:
        settings.append(f"export.formats=[{export}]")
    if device is not None:
        settings.append(f"export.device={json.dumps(device)}")
    if dry_run:
        return plan(teacher, target, data, recipe, settings, as_json)
    from . import pipeline

    values = _recipe_values(teacher, target, data, recipe, settings)
    try:
        report = pipeline.distill(values, out=out, say=_say)
    except CheckFailed as failed:
        if as_json:
            _print_json(failed.result)
        raise
    if not report:  # this process only helped to train
        return
    if as_json:
        _print_json(report)
    else:
        print(report["files"]["html"])


@app.command()
def cache(
    out: Annotated[Path, typer.Option(help="Folder of the cache; one that was ended goes on.")],
    teacher: Teacher = None,
    target: Target = None,
    data: Data = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    signal: Annotated[str | None, typer.Option(help="topk, sampled or hidden. [default: the recipe's]")] = None,
    correct: Correct = None,
    as_json: Json = False,
) -> None:
    """Keep what the teacher says of all that distill would show it, to train from without the teacher."""
    from . import pipeline

    settings = [*(settings or []), *([f"distill.signal={json.dumps(signal)}"] if signal else [])]
    settings += [f"correct.mode={json.dumps(correct)}"] if correct else []
    result = pipeline.cache(_recipe_values(teacher, target, data, recipe, settings), out=out, say=_say)
    _print_json(result) if as_json else print(result["folder"])


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(help=WHAT_HELP)],
    against: Annotated[str | None, typer.Option(help="The teacher to compare with. [default: a run's own]")] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="instruction, rag, tools, roleplay, or a FILE.jsonl of tasks; repeatable."),
    ] = None,
    data: Data = None,
    prompts: Annotated[
        int | None,
        typer.Option(help="Tasks per skill, and prompts of --generation. [default: a run's own, or 100]", min=1),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens. [default: a run's own, or 100000]", min=1)
    ] = None,
    generation: Annotated[
        bool,
        typer.Option(
            "--generation",
            help="Judge sampled answers too: Rouge-L, repetition, length, calibration and, with a teacher, exposure "
            "bias; needs data.",
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Draws the tasks of a suite. [default: a run's own, or 0]")] = None,
    as_json: Json = False,
) -> None:
    """Judge a model: perplexity, agreement with its teacher, the four skills with confidence intervals."""
    from . import pipeline

    result = pipeline.evaluate(
        what,
        against=against,
        suites=suite,
        data=data,
        prompts=prompts,
        tokens=tokens,
        seed=seed,
        generation=generation,
        say=_say,
    )
    if as_json:
        _print_json(result)
    else:
        from .report import render_evaluation

        render_evaluation(result)


@app.command()
def export(
    format: Annotated[str, typer.Argument(help="onnx, bitsandbytes or gguf.")],
    what: Annotated[str, typer.Argument(help=WHAT_HELP)],
    precision: Annotated[
        str | None,
        typer.Option(
            help="onnx: fp32, fp16, int8, int4. bitsandbytes: nf4, int8. gguf: f16, q8_0, q4_k_m, q4_0, ... "
            "[default: int4, nf4, q8_0]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder. [default: RUN/export/FORMAT-PRECISION, else exports/NAME-...]")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="onnx int8, int4: weights that share a scale. [default: 64]")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="onnx int4: rtn, search, k_quant, hqq, or gptq, which needs data. [default: rtn]")
    ] = None,
    sensitive: Annotated[
        str | None,
        typer.Option(
            help="onnx int4: what stays at 8 bits: head, first, last, comma between; or none. [default: head]"
        ),
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="onnx: in the layout of transformers.js, for browsers too.")
    ] = False,
    tokenizer_pre: Annotated[
        str | None, typer.Option(help="gguf: llama.cpp's name of the tokenizer's splitting rule. [default: found]")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The teacher to compare with. [default: a run's own]")] = None,
    data: Data = None,
    prompts: Annotated[int | None, typer.Option(help="Tasks per skill. [default: a run's own, or 100]", min=1)] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens. [default: a run's own, or 100000]", min=1)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure fidelity and skills of the verified artifact.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write a model in a format that devices run; verified against the model, or not written."""
    from export import settings_of

    from . import pipeline

    settings = settings_of(
        format,
        precision,
        block=block_size,
        algorithm=algorithm,
        sensitive=sensitive,
        web=web or None,
        tokenizer_pre=tokenizer_pre,
    )
    result = pipeline.export(
        what,
        settings,
        out=out,
        against=against,
        data=data,
        prompts=prompts,
        tokens=tokens,
        measured=measure,
        say=_say,
    )
    if as_json:
        _print_json(result)
    else:
        from export.tables import render_export

        render_export(result)


@app.command()
def bench(
    what: Annotated[
        list[str], typer.Argument(help="Run folders, model folders, exported folders, Hub ids, or `demo`.")
    ],
    device: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Hold memory and disk to a device and estimate its latency."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="memory=1GiB, disk=2GB, ttft=500ms, load=5s, decode=20, prefill=100; repeatable."),
    ] = None,
    versus: Annotated[bool, typer.Option("--vs", help="Run them in turn and compare pair by pair.")] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Name the best that fits, of a run its artifacts too, or the target that would."),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="[default: the processors there are]", min=1)] = None,
    repeats: Annotated[int | None, typer.Option(help="Runs at each prompt length. [default: 5]", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Measure latency and memory, each artifact in a fresh process; exit 1 where a budget is missed."""
    from . import pipeline

    def show(result: dict[str, Any]) -> None:
        from export.tables import render_bench

        _print_json(result) if as_json else render_bench(result)

    try:
        result = pipeline.bench(
            what, device=device, budgets=budget, versus=versus, fit=fit, threads=threads, repeats=repeats, say=_say
        )
    except CheckFailed as failed:
        if failed.result:
            show(failed.result)
        raise
    show(result)


@app.command()
def serve(
    what: Annotated[
        list[str] | None, typer.Argument(help="A run folder (teacher, student, artifacts), or models by name.")
    ] = None,
    left: Annotated[str | None, typer.Option(help="A model: folder, exported folder, Hub id or `demo`.")] = None,
    right: Annotated[str | None, typer.Option(help="A model to put beside it.")] = None,
    port: Annotated[int, typer.Option(help="Of the page.", min=1, max=65535)] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs --auth.")] = "127.0.0.1",
    auth: Annotated[
        str | None, typer.Option(envvar="COMPRESSOR_AUTH", metavar="USER:PASSWORD", help="What the page asks for.")
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="A saved comparison (JSON), shown without any model.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each model. [default: its runtime's choice]", min=1)] = None,
) -> None:
    """Open a page that puts models side by side: one question, answers at their own pace, checks, blind votes."""
    import signal

    from serve import launch

    if what and (left or right):
        raise UserError("models are named both ways; expected WHAT, or --left and --right; leave one out")
    if bool(left) != bool(right):
        raise UserError("one of --left and --right is missing; expected both; name two models")
    if replay and (what or left):
        raise UserError("--replay shows no models; expected no others beside it; leave them out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as a container's first process it would be ignored
    whats = [*(what or []), *(name for name in (left, right) if name)]
    launch(whats, host=host, port=port, auth=auth, replay=replay, threads=threads, say=_say)


@app.command()
def package(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    push: Annotated[str | None, typer.Option(help="Hub repository to push the student to (private when new).")] = None,
    as_json: Json = False,
) -> None:
    """Write the student's model card and checksums; push it to the Hub if asked."""
    from . import pipeline

    result = pipeline.package(run, push=push, say=_say)
    if as_json:
        _print_json(result)
    else:
        print(result["folder"])


def main() -> None:
    """The console script: runs a command and turns project errors into one line and an exit code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line
        arguments.remove("--debug")
    sys.exit(run(arguments, debug=debug))


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code; with `debug`, errors keep their traceback."""
    try:
        if app(arguments or ["--help"], standalone_mode=False) == INTERRUPTED:  # typer catches it and returns this
            raise KeyboardInterrupt
    except (UserError, CheckFailed) as error:
        if debug:
            raise
        _say(f"error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, UserError) else 1
    except typer.TyperException as error:  # a mistake in the command line itself
        _say(f"error: {' '.join(error.format_message().split()).rstrip('.')}; see compressor --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; the same command again takes a run up where it was, and starts anything else anew")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _say(f"error: {error.strerror}: {error.filename or 'the run folder'}; free space or choose another --out")
        return 2
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's: naming the class would import torch
            raise
        _say(
            "error: the device ran out of memory; expected room for weights and a micro-batch; lower "
            "distill.micro_batch or data.context, or set distill.gradient_checkpointing=true"
        )
        return 2
    return 0


def help_page() -> str:
    """docs/commands.md: the help of every command, as the program prints it."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands", "Written by `make docs` from the program's own help; a test holds the two equal."]
    for name, command in [("", group), *group.commands.items()]:
        context = command.make_context(f"compressor {name}".strip(), [], terminal_width=100, resilient_parsing=True)
        parts.append(f"## {context.info_name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
