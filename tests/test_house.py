"""What holds the house together: the arrows between rooms, the commands the documents show, the names we may use."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
GROUND = {
    "child",
    "errors",
    "memory",
    "progress",
    "recipe",
    "run",
    "shape",
    "families",
    "checkpoint",
    "data",
    "runtime",
    "units",
}
TOOLS = {"losses", "signals", "train", "scores"}
STAGES = {"teacher", "importance", "architecture", "surgery", "distill", "answers", "onpolicy", "align"}
JUDGING = {"evaluate", "report", "package", "demo", "plan"}
DOORS = {"cli", "pipeline"}
# room -> the rooms it may import besides its own layer's rules
MAY = {
    "ground": GROUND,
    "tools": GROUND | TOOLS,
    "stages": GROUND | TOOLS,
    "judging": GROUND | JUDGING,
}
# the exceptions, each with its reason
EXCEPTIONS = {
    ("plan", "architecture"),  # plan chooses the shape that distill would choose
    ("plan", "signals"),  # plan counts the bytes that a cache would keep
    ("data", "demo"),  # `demo` is a data source like any other
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "compressor").with_suffix("").parts[0]


def layer_of(room: str) -> str:
    layers = {"ground": GROUND, "tools": TOOLS, "stages": STAGES, "judging": JUDGING, "doors": DOORS}
    return next(name for name, rooms in layers.items() if room in rooms)


def imported_rooms(path: Path) -> set[str]:
    package = path.relative_to(ROOT).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [module] if module.count(".") else [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("compressor.")}
    return rooms


def sources() -> list[Path]:
    return [
        path
        for path in sorted((ROOT / "compressor").rglob("*.py"))
        if path.name != "__init__.py" or room_of(path) != "__init__"
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = room_of(path)
    layer = layer_of(room)
    if layer == "doors":
        return
    allowed = MAY[layer] | {room}
    bad = {other for other in imported_rooms(path) if other not in allowed and (room, other) not in EXCEPTIONS}
    assert not bad, f"{room} ({layer}) imports {bad}"


BESIDE = [*sorted((ROOT / "export").rglob("*.py")), *sorted((ROOT / "serve").rglob("*.py"))]


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_export_and_serve_rest_on_ground_and_judging(path):
    """They use what any model is read, run and judged with, serve the demo's tasks too; `__main__` is a door."""
    doors = {"__main__.py": {"cli"}, "presets.py": {"demo"}}
    allowed = GROUND | {"evaluate"} | doors.get(path.name, set())
    assert imported_rooms(path) <= allowed


def test_only_the_doors_import_export_or_serve_and_only_inside_functions():
    for path in sources():
        tree = ast.parse(path.read_text())
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        if any(name.split(".")[0] in ("export", "serve") for name in names):
            assert room_of(path) in DOORS, path
        top = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
        top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
        assert not any(name.split(".")[0] in ("export", "serve") for name in top), path


def test_every_room_has_a_layer():
    rooms = {room_of(path) for path in sources()}
    assert rooms - {"__init__"} == GROUND | TOOLS | STAGES | JUDGING | DOORS


def test_packages_are_listed_and_no_script_has_a_shell_builtins_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    code = [path for package in ("compressor", "export", "serve") for path in (ROOT / package).rglob("*.py")]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in code}
    data = {"compressor.configs", "compressor.recipes"}
    assert listed == found | data
    builtins = set(subprocess.check_output(["bash", "-c", "compgen -b"], text=True).split())
    assert not builtins & set(project["project"]["scripts"])


def test_every_dependency_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.findall(r'^  "[a-z][\w.-]*[^"]*",.*$', text.split("[project.scripts]")[0], flags=re.M)
    assert lines
    assert not [line for line in lines if "#" not in line]


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these requirements pull in here, by their normalised names."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if requirement.marker and not requirement.marker.evaluate():
            continue
        key = f"{name}[{','.join(sorted(extras))}]"
        if key in found:
            continue
        found.add(key)
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.name.startswith(("nvidia", "cuda", "triton")):
                continue  # a CUDA build of torch brings its own, of one exact version each
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                waiting.append(needed)
    return {key.partition("[")[0] for key in found}


def test_the_constraints_pin_everything_that_gets_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = closure([*project["project"]["dependencies"], *project["dependency-groups"]["dev"]])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    assert wanted <= pinned, wanted - pinned


def test_the_constraints_pin_exact_versions_and_torch_above_all():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ;.*)?", line) for line in lines)
    assert "torch==2.13.0" in lines


def fenced_commands(document: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / document).read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]


def test_the_readme_shows_its_commands():
    commands = fenced_commands("README.md")
    assert {"make demo", "make test"} <= set(commands)
    assert any(command.startswith("compressor plan") for command in commands)


@pytest.mark.parametrize(
    "command",
    sorted({c for d in DOCUMENTS for c in fenced_commands(d) if c.startswith(("compressor ", "make "))}),
)
def test_documented_commands_exist_with_the_options_they_are_shown_with(command):
    words = shlex.split(command)
    if words[0] == "make":
        dry = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr
        return
    import typer.main

    from compressor.cli import app

    group = typer.main.get_command(app)
    name, *arguments = words[1:]
    assert name in group.commands, name  # pyright: ignore[reportAttributeAccessIssue]
    known = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    known.make_context(name, [a for a in arguments if a != "--debug"], resilient_parsing=False)


@pytest.mark.parametrize(
    "command",
    [c for c in fenced_commands("README.md") if c.startswith("compressor plan") or c.endswith("--help")],
)
def test_planning_commands_of_the_readme_run(command):
    done = subprocess.run(
        [sys.executable, "-m", "compressor.cli", *shlex.split(command)[1:]], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_tree_in_the_readme_is_true():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(compressor/\n.*?)```", text, flags=re.S)
    assert tree
    shown = {line.split()[0].rstrip("/") for line in tree.group(1).splitlines()[1:] if re.match(r"  \S", line)}
    inside = {p.name for p in (ROOT / "compressor").iterdir() if p.name not in ("__pycache__", "__init__.py")}
    assert shown == inside


def test_the_help_in_the_docs_is_the_help_of_the_program():
    from compressor.cli import help_page
    from compressor.recipe import reference_page

    assert (ROOT / "docs" / "recipe.md").read_text() == reference_page()
    assert (ROOT / "docs" / "commands.md").read_text() == help_page()


def test_help_answers_without_heavy_imports():
    code = (
        "import sys; from compressor.cli import run; run(['--help']); "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=False).returncode == 0
