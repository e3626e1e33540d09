"""What an export and a benchmark found, as tables on stdout."""

from __future__ import annotations

from typing import Any

from compressor.progress import stdout
from compressor.units import duration, size


def render_export(result: dict[str, Any]) -> None:
    """Print {"path", "manifest"}: the checks, the size, and the fidelity where it was measured."""
    from rich.table import Table
    from rich.text import Text

    manifest = result["manifest"]
    console = stdout()
    table = Table(title=Text(f"{manifest['format']}-{manifest['precision']}, verified"), title_justify="left")
    table.add_column("check")
    table.add_column("found")
    for check in manifest["checks"]:
        table.add_row(Text(check["check"]), Text(check["detail"]))
    for row in fidelity_rows(manifest):
        table.add_row(*map(Text, row))
    console.print(table)
    for warning in manifest["warnings"]:
        console.print(Text(f"warning: {warning}"))
    print(result["path"])


def fidelity_rows(manifest: dict[str, Any]) -> list[list[str]]:
    """Size, peak memory of the export, and what was measured of the artifact, as pairs of text."""
    bits = f"{size(manifest['bytes'])}, {manifest['bits_per_weight']:.2f} bits per weight"
    rows = [["size on disk", bits]]
    peak = manifest["peak_memory_bytes"]
    if peak["write"] is not None:
        words = f"{size(peak['write'])} to write, {size(peak['verify'])} to verify, libraries included"
        rows.append(["peak memory", words])
    rows.append(
        [
            "time",
            f"{duration(manifest['seconds']['write'])} to write, {duration(manifest['seconds']['verify'])} to verify",
        ]
    )
    for name in ("student", "teacher"):
        found = (manifest.get("agreement") or {}).get(name)
        if found:
            kl = ", ".join(f"{number(found[key])} {words}" for key, words in KL)
            rows.append([f"KL divergence from the {name}", kl])
            rows.append([f"top-1 agreement with the {name}", f"{found['top1']:.2%}"])
            if found["perplexity_ratio"] is not None:
                rows.append([f"perplexity against the {name}'s", f"{found['perplexity_ratio'] - 1:+.2%}"])
    for skill, score in (manifest.get("skills") or {}).items():
        rows.append([skill, f"{score['score']:.1%} ({score['low']:.1%} to {score['high']:.1%})"])
    return rows


KL = (("kl", "mean"), ("kl_median", "median"), ("kl_p99", "p99"))


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return "-" if value is None else f"{value:.3g}"


def render_bench(result: dict[str, Any]) -> None:
    """Print what `bench` found: a column an artifact; budgets, ratios and the best fit below."""
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    found = result["artifacts"]
    where, method = result["machine"], result["method"]
    title = f"{where['processor']}, {where['threads']} threads, median of {method['repeats']}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for artifact in found:
        table.add_column(Text(artifact["what"]), justify="right", overflow="fold")
    for row in bench_rows(result):
        table.add_row(*map(Text, row))
    console.print(table)
    for ratio in result["ratios"]:
        console.print(Text(ratio_line(ratio)))
    for artifact in found:
        for line in artifact["budget"]:
            console.print(Text(f"{'met   ' if line['passed'] else 'MISSED'} {budget_line(artifact['what'], line)}"))
    fit = result["fit"]
    if fit:
        if fit["what"]:
            console.print(Text(f"best fit: {fit['what']}, by {fit['by']}"))
        else:
            console.print(Text(f"nothing fits; {fit['why']}"))


def ratio_line(ratio: dict[str, Any]) -> str:
    """The faster of two first."""
    one, two, values = ratio["first"], ratio["second"], [ratio[key] for key in ("speed_up", "low", "high")]
    if values[0] < 1:
        one, two, values = two, one, [1 / values[0], 1 / values[2], 1 / values[1]]
    middle, low, high = values
    words = f"{ratio['measure']} at {ratio['prompt']} tokens: {one} is {middle:.2f} times as fast as {two}"
    return f"{words} ({low:.2f} to {high:.2f}, pair by pair)"


def bench_rows(result: dict[str, Any]) -> list[list[str]]:
    """Label, then a cell per artifact."""
    found = result["artifacts"]

    def row(label: str, cell: Any) -> list[str]:
        return [label, *(cell(artifact) for artifact in found)]

    rows = [
        row("runtime", lambda a: a["runtime"]),
        row("size on disk", lambda a: size(a["bytes"])),
        row("bits per weight", lambda a: f"{a['bits_per_weight']:.2f}"),
        row("load time", lambda a: duration(a["load_s"])),
    ]
    lengths = sorted({point["prompt"] for artifact in found for point in artifact["points"]})

    def at(artifact: dict[str, Any], length: int) -> dict[str, Any] | None:
        return next((point for point in artifact["points"] if point["prompt"] == length), None)

    for length in lengths:
        for label, cell in (
            ("TTFT p50 / p95", lambda p: f"{1e3 * p['ttft_p50_s']:.1f} / {1e3 * p['ttft_p95_s']:.1f} ms"),
            ("prefill", lambda p: f"{p['prefill_tokens_per_s']:,.0f} tokens/s"),
            (
                "decode",
                lambda p: f"{p['decode_tokens_per_s']:,.1f} ({p['decode_low']:,.1f}-{p['decode_high']:,.1f}) tokens/s",
            ),
        ):
            cells = [cell(point) if (point := at(artifact, length)) else "-" for artifact in found]
            rows.append([f"{label} at {length}", *cells])
    rows += [
        row("peak memory", lambda a: size(a["memory"]["peak_rss_bytes"])),
        row("  without memory-mapping", lambda a: size(a["memory"]["peak_rss_without_mmap_bytes"])),
        row("  above the libraries", lambda a: size(a["memory"]["above_baseline_bytes"])),
        row("  predicted", lambda a: size(a["memory"]["predicted"]["total"])),
        row("  predicted at full context", lambda a: size(a["memory"]["predicted_at_context"]["total"])),
        row("KV cache per token", lambda a: size(a["kv_bytes_per_token"])),
        row(
            "roofline missed here, decode",
            lambda a: f"{a['estimate']['host']['measured_over_roofline']['decode_s']:.1f} x",
        ),
        row(
            "roofline missed here, TTFT", lambda a: f"{a['estimate']['host']['measured_over_roofline']['ttft_s']:.1f} x"
        ),
    ]
    if result["device"]:
        name = result["device"]["name"]
        rows += [
            row(f"estimate, {name}, decode", lambda a: _span(a, "decode_s", lambda s: f"{1 / s:,.0f}", "tokens/s")),
            row(f"estimate, {name}, TTFT", lambda a: _span(a, "ttft_s", lambda s: f"{1e3 * s:,.0f}", "ms")),
        ]
    return rows


def _span(artifact: dict[str, Any], key: str, cell: Any, unit: str) -> str:
    """Expected, and the roofline that bounds it."""
    there = artifact["estimate"]["device"]
    return f"{cell(there['expected'][key])} {unit} (roofline {cell(there['roofline'][key])}, at the device's peak)"


def budget_line(what: str, line: dict[str, Any]) -> str:
    """One budget: what it is, what was found, and the margin."""
    cells = {
        "bytes": size,
        "seconds": lambda value: f"{1e3 * value:,.0f} ms",
        "rate": lambda value: f"{value:,.1f} tokens/s",
    }
    cell = cells[line["unit"]]
    if line["value"] is None:
        return f"{line['what']} of {what} could not be measured here; {cell(line['limit'])} allowed"
    found = f"{cell(int(line['value']) if line['unit'] == 'bytes' else line['value'])}"
    kind = " (estimate)" if line["estimate"] else ""
    limit = cell(int(line["limit"]) if line["unit"] == "bytes" else line["limit"])
    return f"{line['what']} of {what}: {found}{kind}, budget {limit}, margin {line['margin']:+.0%}"
