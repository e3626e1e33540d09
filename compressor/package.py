"""Shipping: the model card, the checksums, and the push to the Hub.

The student is a stock Hugging Face folder; this adds README.md (the card) and SHA256SUMS, which `sha256sum
-c` reads. A push is private unless asked otherwise, and no token is ever printed, logged or written.
"""

import hashlib
from pathlib import Path
from typing import Any

from yaml import YAMLError

from .errors import CheckFailed, UserError
from .report import columns, headline, markdown_table, model_rows, shape_rows
from .run import write_text

CHECKSUMS = "SHA256SUMS"


def write_card(
    folder: Path | str, *, report: dict[str, Any], teacher: str, recipe: str = "", licence: str | None = None
) -> Path:
    """Write README.md into a student's folder: what it is, how good, how to load it, how it was made.

    teacher: its Hub id, folder or `demo`. recipe: the resolved recipe as YAML. licence: the teacher's, if
    known.
    """
    name = report["name"] or Path(folder).resolve().parent.name
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += ["tags: [compressor, pruning, distillation]"]
    if _is_hub_id(teacher):
        front += [f"base_model: {teacher}", "base_model_relation: finetune"]
    if licence:
        front.append(f"license: {licence}")
    parts = ["\n".join([*front, "---"]), f"# {name}"]
    parts.append(f"A student pruned and distilled from `{teacher}` with compressor. Run: {report['status']}.")
    parts.append("\n".join(f"- **{figure}** {meaning}" for figure, meaning in headline(report)))
    parts.append("It keeps a stock architecture, so it loads without custom code:")
    parts.append(
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")\n```'
    )
    parts += ["## Quality", markdown_table(["", *columns(report)], model_rows(report))]
    before = "`pruned` is the model before distillation"
    if "distilled" in report:
        before += ", `distilled` the one before alignment (SFT, DPO)"
    parts.append(f"Skills are shares of exact successes with 95 % bootstrap intervals; {before}.")
    parts += ["## Shape", markdown_table(["", "teacher", "student"], shape_rows(report))]
    if recipe:
        parts += ["## Recipe", f"```yaml\n{recipe.strip()}\n```"]
    parts += [
        "## Limits",
        "It inherits its teacher's knowledge, errors and licence, and was judged only by the measures above.",
    ]
    path = Path(folder) / "README.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def licence_of(folder: Path) -> str | None:
    """The licence that the model card in a teacher's folder names, if there is one."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None  # a card that cannot be read says nothing
    return found if isinstance(found, str) else None


def _is_hub_id(teacher: str) -> bool:
    return teacher.count("/") == 1 and not teacher.startswith((".", "/", "~")) and not Path(teacher).exists()


def write_checksums(folder: Path | str) -> Path:
    """Write SHA256SUMS over every file of the folder; `sha256sum -c SHA256SUMS` checks them."""
    folder = Path(folder)
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}" for file in _files(folder)]
    if not lines:
        raise UserError(f"{folder} holds no files; expected a model folder; finish the run first")
    path = folder / CHECKSUMS
    write_text(path, "\n".join(lines) + "\n")
    return path


def check_checksums(folder: Path | str) -> int:
    """The number of files that match SHA256SUMS; CheckFailed naming those that do not."""
    folder = Path(folder)
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{folder} has no {CHECKSUMS}; expected one; run compressor package on its run") from error
    wrong = []
    for line in lines:
        wanted, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or _sha256(file) != wanted:
            wrong.append(name)
    if wrong:
        raise CheckFailed(f"{folder}: {', '.join(wrong)} missing or changed since {CHECKSUMS} was written")
    return len(lines)


def _files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != CHECKSUMS and not f.name.startswith(".")]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def push(folder: Path | str, repo: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a student's folder to the Hub repository `owner/name` and return its address.

    The folder must match its checksums. The token comes from `token`, HF_TOKEN or `hf auth login`.
    Raises UserError when the Hub refuses, and when `private` is asked for and the repository is already
    public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage] - httpx or httpx2
    )

    check_checksums(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"{repo} exists and is public; expected a private repository; choose another or push publicly"
            )
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=[".*"],
            commit_message="Student made with compressor",
        )
    except (HFValidationError, HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if secret := token or get_token():
            reason = reason.replace(secret, "***")
        raise UserError(
            f"could not push to {repo}: {reason}; expected a repository you may write to; log in with `hf auth login`"
        ) from None
    return f"{api.endpoint}/{repo}"
