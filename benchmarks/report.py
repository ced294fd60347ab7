"""Fill docs/benchmarks.md from benchmarks/results/*.json and scores.csv, and draw its plots.

    python benchmarks/forward.py --json benchmarks/results/forward-cpu.json
    python benchmarks/predict.py --json benchmarks/results/predict-cpu.json
    python benchmarks/report.py

A file's kind is the word before its first dash: forward, predict or precisions. What stands between the page's two marks is
replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
from harness import file_part, mebibytes, sizes, spread
from plots import PLOTS, RESULTS, Row, in_order, median, pixels, read_scores
from predict import STAGES

from unetlib.files import whole_file

PAGE = plots.HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: written by benchmarks/report.py -->", "<!-- end -->"
MACHINE = ("gpu", "cpu", "threads", "python", "torch", "cuda", "cudnn", "onnxruntime", "openvino", "nncf", "monai")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def about(results: dict[str, Any]) -> str:
    """The command, with the variable that its pictures came from, and the machine in one line."""
    machine = results["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in MACHINE if name in machine)
    data = "UNETLIB_DATA=... " if "UNETLIB_DATA" in machine else ""
    return f"```bash\n{broken(data + results['command'])}\n```\n\n{facts}."


def broken(command: str, width: int = 76) -> str:
    """A long command over several lines, each begun by an option."""
    line, *options = re.split(" (?=--)", command)
    lines = []
    for option in options:
        if len(f"{line} {option}") > width:
            lines.append(line)
            line = f"    {option}"
        else:
            line += f" {option}"
    return " \\\n".join([*lines, line])


def times(rows: list[Row]) -> str:
    """A line for each contestant, a column for each shape."""
    shapes = sorted(in_order(rows, "shape"), key=lambda shape: pixels({"shape": shape}))
    found = {(row["peer"], row["shape"]): row for row in rows}
    lines = []
    for peer in in_order(rows, "peer"):
        cells = []
        for shape in shapes:
            row = found.get((peer, shape))
            cells.append(f"{1e3 * median(row):.2f} ({spread(row['speedup']).median:.2f})" if row else "-")
        lines.append([f"`{peer}`", *cells])
    return table(["ms (times the study's speed)", *shapes], lines)


def details(rows: list[Row], roofs: dict[str, Any]) -> str:
    """All that was measured of the shape with the most pixels."""
    largest = max(rows, key=pixels)["shape"]
    lines = []
    for row in (row for row in rows if row["shape"] == largest):
        time = spread(row["seconds"])
        pictures = sizes(largest)[0] / time.median
        speed = pictures * row["flop_per_picture"]
        cells = [f"`{row['peer']}`", f"{1e3 * time.low:.2f} to {1e3 * time.high:.2f}", f"{pictures:.2f}"]
        cells += [f"{speed / 1e9:.0f}", f"{speed / roofs['flop_per_second'][row['precision']]:.0%}"]
        cells += ["-" if row["error"] is None else f"{row['error']:.0e}", mebibytes(row["peak_bytes"])]
        lines.append(cells)
    header = [largest, "ms, quartiles", "pictures/s", "GFLOP/s", "of the roof", "relative error", "peak MiB"]
    return table(header, lines)


def quartiles(values: list[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*spread(values))


def best(results: dict[str, Any]) -> str:
    """Unetlib's fastest against the fastest peer, case by case."""
    lines = []
    for row in results["best"]:
        ratio = quartiles(row["ratio"])
        lines.append([row["network"], row["shape"], row["precision"], f"`{row['ours']}`", f"`{row['peer']}`", ratio])
    return table(["network", "shape", "precision", "unetlib's best", "best peer", "times its speed, quartiles"], lines)


def forward_section(results: dict[str, Any], stem: str) -> str:
    roofs = results["roofs"]
    speeds = ", ".join(f"{1e-9 * speed:.0f} GFLOP/s in {name}" for name, speed in roofs["flop_per_second"].items())
    parts = [f"### {stem}", about(results), f"Roofs of this machine: {speeds}; {roofs['bytes_per_second'] / 1e9:.1f} GB/s."]
    parts += [best(results)]
    for network in in_order(results["rows"], "network"):
        drawn = f"plots/{stem}-{file_part(network)}"
        parts += [f"![Time of a pass of {network} against its pixels]({drawn}-time.svg)"]
        parts += [f"![Roofline of {network}]({drawn}-roofline.svg)"]
        own = [row for row in results["rows"] if row["network"] == network]
        for precision in in_order(own, "precision"):
            rows = [row for row in own if row["precision"] == precision]
            parts += [f"**{network}, {precision}**", times(rows), details(rows, roofs)]
    return "\n\n".join(parts)


def predict_section(results: dict[str, Any], stem: str) -> str:
    lines = []
    for row in results["rows"]:
        stages = [f"{1e3 * spread(row['stages'][stage]).median:.1f}" for stage in STAGES]
        ratio = quartiles(row["ratio"])
        lines.append([row["way"], f"{1e3 * median(row):.1f}", *stages, ratio])
    header = ["way", "ms", *STAGES, "unetlib is times as fast, quartiles"]
    width, height = results["picture"]
    seen = "x".join(map(str, results["seen"]))
    return "\n\n".join([f"### {stem}", about(results), f"A picture of {width}x{height}, seen at {seen}.", table(header, lines)])


def precisions_section(results: dict[str, Any], stem: str) -> str:
    lines = []
    for row in results["rows"]:
        ratio = quartiles(row["speedup"])
        change = row["dice"] - results["rows"][0]["dice"]
        lines.append([row["way"], f"{1e3 * median(row):.1f}", ratio, f"{row['dice']:.5f}", f"{change:+.5f}"])
    height, width = results["shape"][2:]
    seen = f"One picture at {height}x{width}; mean Dice of {results['pictures']} pictures."
    header = ["way", "ms", "times as fast as the first, quartiles", "Dice", "change"]
    return "\n\n".join([f"### {stem}", about(results), seen, table(header, lines)])


def scores_section() -> str:
    """What others published, and what their networks cost."""
    lines = []
    for row in sorted(read_scores(), key=lambda row: row["dice"]):
        gflop = "-" if row["gflop"] is None else f"{row['gflop']:.1f}"
        source = f"[{row['source']}]({row['page']})"
        lines.append([row["name"], f"{row['dice']:.4g}", row["measured_on"], gflop, row["cost_of"], source])
    header = ["", "mean Dice", "measured on", "GFLOP of a pass", "of what", "source"]
    plot = "![Mean Dice against GFLOP of a forward pass](plots/scores.svg)"
    return "\n\n".join(["### Quality against cost", plot, table(header, lines)])


def write_page(results: Path, page: Path) -> None:
    """Replace what stands between the marks of the page."""
    sections = [scores_section()]
    kinds = {"forward": forward_section, "predict": predict_section, "precisions": precisions_section}
    for kind, section in kinds.items():
        for file in sorted(results.glob(f"{kind}-*.json")):
            try:
                sections.append(section(json.loads(file.read_text(encoding="utf-8")), file.stem))
            except (ValueError, LookupError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise SystemExit(f"{file}: not a result of {kind}.py ({reason}); run it again with --json") from error
    if len(sections) == 1:
        raise SystemExit(f"there are no results in {results}; {', '.join(f'{kind}.py' for kind in kinds)} write them by --json")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page} must have the marks {BEGIN} and {END}")
    with whole_file(page) as partial:
        partial.write_text("\n\n".join([before + BEGIN, *sections, END + after]), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_page(RESULTS, PAGE)  # first, since it says which file is no result
    plots.draw_all(RESULTS, PLOTS)


if __name__ == "__main__":
    main()
