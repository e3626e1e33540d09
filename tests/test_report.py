"""The report: every promised key is there and documented, pages stand alone, hostile text stays text."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from compressor import report
from compressor.errors import UserError
from compressor.shape import Shape

TEACHER = Shape("llama", 6, 192, 512, 8, 4, 32, 1024, tied=True)
STUDENT = Shape("llama", 4, 128, 256, 8, 4, 32, 1024, tied=True)
HOSTILE = "<script>alert('x')</script> & | **b**"
DOCS = Path(__file__).parents[1] / "docs" / "report.md"


def result(score: float, *, teacher: bool = False) -> dict:
    entry = {"score": score, "low": max(0, score - 0.04), "high": min(1, score + 0.03), "n": 100}
    return {
        "parameters": (TEACHER if teacher else STUDENT).parameters,
        "bytes": 2 * (TEACHER if teacher else STUDENT).parameters,
        "perplexity": 3.25 / score,
        "bits_per_byte": 0.8 / score,
        "heldout_tokens": 51_000,
        "agreement": None if teacher else {"kl": 0.1 / score, "top1": score},
        "skills": {name: dict(entry) for name in report.SKILLS},
        "overall": dict(entry, n=400),
        "samples": [{"skill": "rag", "prompt": HOSTILE, "answer": HOSTILE + str(score), "passed": score > 0.5}],
    }


@pytest.fixture
def run_folder(tmp_path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    evaluation = {"teacher": result(0.97, teacher=True), "pruned": result(0.05), "student": result(0.95)}
    kept = report.kept_summary(
        layers=(0, 1, 4, 5),
        hidden=range(0, 128),
        ffn=[range(i, 512, 2) for i in (0, 1, 0, 1)],
        heads=[range(8)] * 4,
        teacher=TEACHER,
    )
    shape = {"teacher": TEACHER.to_dict(), "student": STUDENT.to_dict(), "kept": kept}
    facts = {
        "stages": {"importance": {"seconds": 12.5}, "distill": {"seconds": 185.0}, HOSTILE: {"seconds": 1.0}},
        "versions": {"torch": "2.13.0"},
        "seeds": {"run": 0},
        "fingerprints": {"teacher": "ab"},
    }
    lines = [{"step": i, "tokens": i * 2000, "loss": 3 / (i + 1), "lr": 1e-3} for i in range(1, 60)]
    for line in lines[::10]:
        line |= {"heldout_kl": line["loss"] * 1.1, "heldout_ce": line["loss"] + 1}
    for name, value in (("evaluation", evaluation), ("shape", shape), ("run", facts)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def paths(value: object, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [prefix]
    return [p for key, inner in value.items() for p in paths(inner, f"{prefix}.{key}" if prefix else key)]


def test_report_json_holds_what_is_promised(run_folder):
    report.write(run_folder, status="done")
    written = json.loads((run_folder / "report.json").read_text())
    assert written["schema_version"] == 1
    for model in ("teacher", "pruned", "student"):
        assert {"parameters", "bytes", "perplexity", "bits_per_byte"} <= written[model].keys()
        for skill in ("instruction", "roleplay", "rag", "tools"):
            assert {"score", "low", "high", "n"} <= written[model]["skills"][skill].keys()
    assert written["recovery"]["overall"] == pytest.approx(0.95 / 0.97)
    assert written["recovery"]["skills"]["rag"] == pytest.approx(0.95 / 0.97)
    assert written["agreement"] == {"kl": pytest.approx(0.1 / 0.95), "top1": 0.95}
    assert written["tokens"] == {"distill": 118_000, "heldout": 51_000}
    assert written["seconds"]["distill"] == 185.0
    assert written["shape"]["student"]["hidden"] == 128
    assert written["kept"]["layers"] == {"of": 6, "kept": [0, 1, 4, 5]}
    assert written["status"] == "done"


def test_the_documentation_names_every_key(run_folder):
    text = DOCS.read_text()
    named = set(re.findall(r"`([\w.]+)`", text))
    known = {part for name in named for part in (name, *name.split("."))}
    written = report.write(run_folder)
    free = {"seconds", "versions", "seeds", "fingerprints"}  # their inner keys name stages, libraries, ...
    for path in paths({k: ({} if k in free else v) for k, v in written.items()}) + sorted(free):
        assert set(path.split(".")) - {""} <= known, path
    for sample in written["samples"]:
        assert set(sample) | set(sample["student"]) <= known
    assert f"version {report.SCHEMA_VERSION}" in text


def test_alignment_puts_the_distilled_student_beside_the_student(run_folder):
    without = report.write(run_folder)
    assert without["align"] is None
    assert "distilled" not in without
    evaluation, facts = (json.loads((run_folder / name).read_text()) for name in ("evaluation.json", "run.json"))
    evaluation["distilled"] = result(0.91)
    losses = {"steps": 40, "rows": 900, "heldout_rows": 60, "loss": [0.7, 0.4], "heldout_loss": [0.69, 0.44]}
    dpo = losses | {"best_step": 36, "heldout_margin": [0.0, 1.5], "heldout_accuracy": [0.0, 0.875], "seconds": 9.0}
    sides = {"chosen_teacher": 100, "chosen_student": 860, "rejected_student": 960}
    pairs = {"prompts": 2000, "pairs": 960, "tied": 1000, "nothing_whole": 40} | sides
    sft = losses | {"best_step": 0, "seconds": 8.0}
    facts["stages"]["align"] = {"seconds": 17.0, "sft": sft, "pairs": pairs, "dpo": dpo}
    for name, value in (("evaluation", evaluation), ("run", facts)):
        (run_folder / f"{name}.json").write_text(json.dumps(value))
    test_the_documentation_names_every_key(run_folder)
    written = report.write(run_folder)
    assert written["distilled"]["overall"]["score"] == 0.91
    assert written["recovery"] == without["recovery"]
    page = (run_folder / "report.md").read_text()
    assert "|  | teacher | pruned | distilled | student |" in page
    assert "- sft: 900 rows in 40 steps, held-out loss 0.69 to 0.44; none better than what came in" in page
    assert "- pairs: 960 made of 2,000 prompts; chosen from 100 of the teacher's and 860 of the student's" in page
    assert "reward margin 0 to 1.5, reward accuracy 0 to 0.875; step 36 kept" in page
    html = (run_folder / "report.html").read_text()
    assert "<th>distilled</th>" in html
    assert "<h2>Alignment</h2>" in html


def test_what_was_not_measured_is_null_and_a_dash(run_folder):
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    for model in evaluation.values():
        model.update(perplexity=None, bits_per_byte=None, agreement=None, skills={}, overall=None, samples=[])
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    (run_folder / "metrics.jsonl").unlink()
    written = report.write(run_folder)
    assert written["student"]["skills"]["rag"]["score"] is None
    assert written["recovery"] == {"overall": None, "skills": dict.fromkeys(report.SKILLS)}
    assert written["agreement"] == {"kl": None, "top1": None}
    assert written["tokens"]["distill"] == 0
    assert "| perplexity | - | - | - |" in (run_folder / "report.md").read_text()
    page = (run_folder / "report.html").read_text()
    assert "Loss against tokens" not in page
    assert page.count("<svg") == 1


class Page(HTMLParser):
    """Collects tags and attributes, and fails on a tag closed out of order."""

    VOID = ("meta", "br", "img", "link", "use", "path")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def test_the_page_is_one_file_with_escaped_text_and_both_colour_schemes(run_folder):
    report.write(run_folder, status=HOSTILE)
    text = (run_folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.stack == []
    assert not [tag for tag, _ in page.seen if tag in ("script", "link", "iframe", "img")]
    for _, attributes in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "&lt;script&gt;" in text
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_holds_every_plot_in_the_pages_own_colours(run_folder):
    report.write(run_folder)
    text = (run_folder / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    titles = [re.search(r'aria-label="([^"]*)"', drawing).group(1) for drawing in drawings]
    assert titles == [
        "Skill scores with 95 % intervals",
        "Loss against tokens of distillation",
        "Shapes of teacher and student side by side",
    ]
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--ink)" in drawing
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", drawing)
        assert "<text" in drawing
    for words in ("held-out KL", "roleplay", "parameters"):
        assert any(words in drawing for drawing in drawings), words
    for words in ("What was kept", "layer 4", "Time per stage", "3 min 5 s", "recovered"):
        assert words in text, words


def test_the_same_run_gives_the_same_page(run_folder):
    report.write(run_folder)
    first = (run_folder / "report.html").read_bytes()
    report.write(run_folder)
    assert (run_folder / "report.html").read_bytes() == first


def test_markdown_escapes_cells_and_shows_intervals(run_folder):
    report.write(run_folder)
    text = (run_folder / "report.md").read_text()
    assert "| rag | 97.0 % (93.0-100.0) | 5.0 % (1.0-8.0) | 95.0 % (91.0-98.0) |" in text
    assert "\\<script>" in text
    assert "<script>" not in text.replace("\\<script>", "")
    assert "- layers: 4 of 6 (0, 1, 4, 5)" in text


def test_one_evaluation_is_printed_with_what_was_measured_only(capsys):
    report.render_evaluation({"what": "a/[b]", "against": "demo", "result": result(0.5) | {"perplexity": None}})
    out = capsys.readouterr().out
    assert "a/[b] against demo" in out
    assert "50.0 % (46.0-53.0)" in out
    assert "perplexity" not in out


def test_kept_strips_say_where_channels_stayed():
    kept = report.kept_summary(
        layers=(0, 5),
        hidden=range(96),
        ffn=[range(512), range(0, 512, 4)],
        heads=[(0, 1), (4, 5)],
        teacher=TEACHER,
    )
    assert kept["hidden"]["strips"] == [[1.0] * 32 + [0.0] * 32]
    assert kept["ffn"]["strips"] == [[1.0] * 64, [0.25] * 64]
    assert kept["heads"] == {
        "of": 8,
        "kept": 2,
        "strips": [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]],
    }


def test_metrics_of_a_resumed_run_count_once_and_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert report.read_metrics(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1"):
        report.read_metrics(path)


def test_a_missing_model_or_file_is_one_line(run_folder):
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    del evaluation["pruned"]
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match="holds no pruned"):
        report.write(run_folder)
    (run_folder / "shape.json").unlink()
    with pytest.raises(UserError, match=r"shape\.json"):
        report.write(run_folder)


def export_entry(name: str, **changes) -> dict:
    return {
        "format": name.split("-")[0],
        "precision": name.split("-")[1],
        "path": f"export/{name}",
        "bytes": 1_000_000,
        "kl_student": 0.05,
        "kl_teacher": 0.4,
        "top1": 0.9,
        "perplexity": 3.1,
        "skills": {"rag": 0.9},
        "overall": 0.9,
        "runtime": "onnxruntime-genai",
        "load_s": 0.1,
        "prompt": 128,
        "ttft_ms": 9.0,
        "decode_tokens_per_s": 2000.0,
        "peak_rss_bytes": 400_000_000,
        "estimate": None,
        "budget": [],
        "warnings": [],
    } | changes


def test_exports_stand_in_every_form_of_the_report(run_folder):
    untimed = dict.fromkeys(("load_s", "ttft_ms", "decode_tokens_per_s", "peak_rss_bytes"))
    entries = [
        export_entry("onnx-int4"),
        export_entry("gguf-q8_0", runtime="transformers", warnings=[HOSTILE], **untimed),
        {"format": "onnx", "precision": "fp32", "path": None, "failed": HOSTILE},
    ]
    (run_folder / "export").mkdir()
    (run_folder / "export" / "exports.json").write_text(json.dumps(entries))
    written = report.write(run_folder)
    assert written["exports"] == entries
    page = (run_folder / "report.html").read_text()
    assert "2,000 tokens/s" in page
    assert "Exports: size against quality" in page
    assert "<script>alert" not in page
    markdown = (run_folder / "report.md").read_text()
    assert "| onnx-fp32 | not kept |" in markdown
    assert "| gguf-q8\\_0 | transformers |" in markdown
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text()))
    assert set(entries[0]) | {"failed"} <= documented
