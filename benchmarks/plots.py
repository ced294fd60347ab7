"""Draw what the other benchmarks measured, as SVG files: time, roofline, and quality against cost.

python benchmarks/plots.py                                    # benchmarks/results/forward-*.json to docs/plots
python benchmarks/plots.py --results /tmp/figures --out /tmp/figures
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import file_part, new_plot, save_plot, sizes

HERE = Path(__file__).parent
RESULTS, PLOTS = HERE / "results", HERE.parent / "docs" / "plots"
Row = dict[str, Any]


def median(row: Row) -> float:
    return float(np.median(row["seconds"]))


def pixels(row: Row) -> int:
    batch, height, width = sizes(row["shape"])
    return batch * height * width


def in_order(rows: Iterable[Row], field: str) -> list[str]:
    """The values of a field, each once, in the order of the rows."""
    return list(dict.fromkeys(row[field] for row in rows))


def add_legend(figure: Any, panels: Sequence[Any]) -> None:
    """One for all panels, outside them; a contestant may be missing in some."""
    lines = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")


def draw_time(rows: Sequence[Row], file: Path) -> None:
    """Milliseconds of a pass against the pixels in it: a panel for each precision, a line for each contestant.

    Larger batches are squares, single pictures dots.
    """
    precisions = in_order(rows, "precision")
    figure, panels = new_plot("pixels in a pass", "ms", precisions)
    for panel, precision in zip(panels, precisions):
        for colour, peer in enumerate(in_order(rows, "peer")):
            own = sorted((row for row in rows if (row["precision"], row["peer"]) == (precision, peer)), key=pixels)
            if own:
                panel.plot([pixels(row) for row in own], [1e3 * median(row) for row in own], color=f"C{colour}", label=peer)
            for row in own:
                batched = sizes(row["shape"])[0] > 1
                panel.plot(pixels(row), 1e3 * median(row), color=f"C{colour}", marker="s" if batched else "o", markersize=4)
    add_legend(figure, panels)
    save_plot(figure, file)


def draw_roofline(rows: Sequence[Row], roofs: dict[str, Any], file: Path) -> None:
    """FLOP/s against FLOP per byte that the convolutions must move, under what this machine was measured to reach."""
    precisions = in_order(rows, "precision")
    figure, panels = new_plot("FLOP a byte", "GFLOP/s", precisions)
    for panel, precision in zip(panels, precisions):
        own = [row for row in rows if row["precision"] == precision]
        ceiling, slope = roofs["flop_per_second"][precision], roofs["bytes_per_second"]
        points: dict[str, list[tuple[float, float]]] = {}  # of each contestant, since one may be another network
        for row in own:
            flop = sizes(row["shape"])[0] * row["flop_per_picture"]
            points.setdefault(row["peer"], []).append((flop / row["bytes_per_pass"], flop / median(row) / 1e9))
        bounds = [ceiling / slope, *(intensity for found in points.values() for intensity, _ in found)]
        x = np.geomspace(min(bounds) / 4, 4 * max(bounds))
        panel.plot(x, np.minimum(ceiling, slope * x) / 1e9, color="black", linewidth=1)
        for colour, peer in enumerate(in_order(rows, "peer")):
            if peer in points:
                panel.plot(*zip(*points[peer]), color=f"C{colour}", marker="o", markersize=4, linestyle="", label=peer)
    add_legend(figure, panels)
    save_plot(figure, file)


def draw_forward(results: dict[str, Any], folder: Path, stem: str = "forward") -> list[Path]:
    """Both plots of each network in what forward.py wrote; the files."""
    files = []
    for network in in_order(results["rows"], "network"):
        rows = [row for row in results["rows"] if row["network"] == network]
        name = f"{stem}-{file_part(network)}"
        files += [folder / f"{name}-time.svg", folder / f"{name}-roofline.svg"]
        draw_time(rows, files[-2])
        draw_roofline(rows, results["roofs"], files[-1])
    return files


def read_scores() -> list[Row]:
    """The rows of scores.csv; "gflop" is None where the cost is not known."""
    with open(HERE / "scores.csv", encoding="utf-8", newline="") as file:
        return [
            row | {"dice": float(row["dice"]), "gflop": float(row["gflop"]) if row["gflop"] else None}
            for row in csv.DictReader(file)
        ]


def draw_scores(file: Path) -> None:
    """Mean Dice against the cost of one picture; a line where the cost is not known."""
    figure, (panel,) = new_plot("GFLOP of a forward pass", "mean Dice", ["Carvana"])
    panel.set(xlim=(10, 3000), yscale="linear")
    panel.set_xticks((10, 100, 1000), ("10", "100", "1000"))
    panel.margins(y=0.12)  # room for the highest name
    for row in read_scores():
        if row["gflop"] is None:
            panel.axhline(row["dice"], color="grey", linestyle=":")
            note, where = f"{row['name']}, cost not stated", (20, row["dice"])
        else:
            note, where = row["name"], (row["gflop"], row["dice"])
            panel.plot(*where, "o", color="C0" if note.startswith("unetlib") else "grey")
        panel.annotate(note, where, (5, 3), textcoords="offset points", fontsize="small")
    save_plot(figure, file)


def draw_all(results: Path, folder: Path) -> None:
    """Every plot of the JSON files there, and the one of published scores."""
    draw_scores(folder / "scores.svg")
    for file in sorted(results.glob("forward-*.json")):
        draw_forward(json.loads(file.read_text(encoding="utf-8")), folder, file.stem)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=PLOTS, help="folder for the SVG files")
    args = parser.parse_args(argv)
    for folder in (args.results, args.out):
        if not folder.is_dir():
            parser.error(f"there is no folder {str(folder)!r}")
    draw_all(args.results, args.out)


if __name__ == "__main__":
    main()
