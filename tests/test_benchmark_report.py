from __future__ import annotations

import json
import re

import numpy as np
import plots
import pytest
import report

pytest.importorskip("matplotlib", reason="plots need matplotlib; `pip install .[test]` has it")

PEERS = ("study", "openvino", "unetlib")
MACHINE = {"cpu": "a CPU", "threads": 2, "python": "3.11", "torch": "2.14", "other": "left out"}


def forward_results():
    rows = []
    for shape, pixels in (("1x10x10", 100), ("2x10x20", 400)):
        for precision, times in (("float32", (4.0, 2.0, 3.0)), ("bfloat16", (2.0, 1.0, 1.5))):
            for peer, time in zip(PEERS, times):
                seconds = [pixels * 1e-6 * time * noise for noise in (0.9, 1.0, 1.1)]
                row = {"network": "study", "shape": shape, "precision": precision, "peer": peer, "seconds": seconds}
                row |= {"flop_per_picture": 10**6, "bytes_per_pass": 10**5 * pixels, "error": 1e-7, "peak_bytes": 3 * 2**20}
                rows.append(row | {"speedup": [times[0] / time] * 3})
    best = {"network": "study", "shape": "1x10x10", "precision": "float32", "ours": "unetlib", "peer": "openvino"}
    roofs = {"flop_per_second": {"float32": 1e10, "bfloat16": 2e10}, "bytes_per_second": 3e9}
    return {
        "command": "python benchmarks/forward.py --rounds 3",
        "machine": MACHINE,
        "roofs": roofs,
        "skipped": {},
        "rows": rows,
        "best": [best | {"ratio": [0.6, 0.67, 0.7]}],
    }


def predict_results():
    stages = {stage: [0.01, 0.02, 0.03] for stage in report.STAGES}
    row = {"seconds": [0.07, 0.08, 0.09], "ratio": [1.1, 1.2, 1.3], "different": 0.001, "stages": stages}
    rows = [{"way": way, **row} for way in ("study", "milesial", "unetlib")]
    command = "python benchmarks/predict.py"
    return {"command": command, "machine": MACHINE, "picture": [1918, 1280], "seen": [640, 960], "rows": rows}


def precisions_results():
    rows = [{"way": "float32", "seconds": [0.2] * 3, "speedup": [1.0] * 3, "dice": 0.99}]
    rows.append({"way": "openvino int8", "seconds": [0.04, 0.05, 0.06], "speedup": [3.0, 4.0, 5.0], "dice": 0.98988})
    command = "python benchmarks/precisions.py"
    machine = {**MACHINE, "UNETLIB_DATA": "set"}
    return {"command": command, "machine": machine, "shape": [1, 3, 640, 960], "pictures": 90, "rows": rows}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "forward-cpu.json").write_text(json.dumps(forward_results()))
    (folder / "predict-cpu.json").write_text(json.dumps(predict_results()))
    (folder / "precisions-cpu.json").write_text(json.dumps(precisions_results()))
    return folder


def test_the_page_shows_what_was_measured(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold figures\n{report.END}\n\nAfter.\n")
    report.write_page(results, page)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old figures" not in text
    assert "\npython benchmarks/forward.py --rounds 3\n" in text
    assert "\nUNETLIB_DATA=... python benchmarks/precisions.py\n" in text
    assert "cpu a CPU, threads 2, python 3.11, torch 2.14." in text
    assert "10 GFLOP/s in float32, 20 GFLOP/s in bfloat16; 3.0 GB/s" in text
    assert "| `study` | 0.40 (1.00) | 1.60 (1.00) |" in text  # milliseconds, times the study's speed
    assert "| `openvino` | 0.20 (2.00) | 0.80 (2.00) |" in text
    # 400 pixels of 2 pictures in 0.8 ms: 2500 pictures and 2.5 GFLOP a second, a quarter of the roof
    assert "| `openvino` | 0.76 to 0.84 | 2500.00 | 2 | 25% | 1e-07 | 3 |" in text
    assert "| study | 1x10x10 | float32 | `unetlib` | `openvino` | 0.67 (0.64 to 0.69) |" in text
    assert "A picture of 1918x1280, seen at 640x960." in text
    assert "| milesial | 80.0 | 20.0 | 20.0 | 20.0 | 20.0 | 1.20 (1.15 to 1.25) |" in text
    assert "One picture at 640x960; mean Dice of 90 pictures." in text
    assert "| openvino int8 | 50.0 | 4.00 (3.50 to 4.50) | 0.98988 | -0.00012 |" in text
    report.write_page(results, page)
    assert page.read_text() == text  # again is the same


def test_commands_are_whole_and_fit_the_page():
    for file in plots.RESULTS.glob("*.json"):
        command = json.loads(file.read_text(encoding="utf-8"))["command"]
        broken = report.broken(command)
        assert max(map(len, broken.splitlines())) <= 80
        assert broken.replace(" \\\n    ", " ") == command


def test_sources_are_short_links():
    for row in plots.read_scores():
        assert f"| [{row['source']}]({row['page']}) |" in report.scores_section()
        assert len(row["source"]) <= 24  # what the table has room for
        assert row["page"].startswith("https://github.com/") or (report.PAGE.parent / row["page"]).is_file()


def test_a_page_without_marks_is_left_alone(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(SystemExit, match="must have the marks"):
        report.write_page(results, page)
    assert page.read_text() == "text"


@pytest.fixture
def written(results, tmp_path, monkeypatch):
    """What `main` would replace: a page, and no plots."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "page.md").write_text(f"{report.BEGIN}old figures{report.END}")
    for name, path in (("RESULTS", "results"), ("PLOTS", "plots"), ("PAGE", "page.md")):
        monkeypatch.setattr(report, name, tmp_path / path)

    def written():
        assert not list(tmp_path.glob(".*"))  # no temporary file stays
        return (tmp_path / "page.md").read_text(), sorted(path.name for path in (tmp_path / "plots").iterdir())

    return written


def test_the_page_and_its_plots_are_written_together(written):
    report.main([])
    page, drawn = written()
    assert re.findall("^### .*", page, re.MULTILINE)[1:] == ["### forward-cpu", "### predict-cpu", "### precisions-cpu"]
    assert drawn == ["forward-cpu-study-roofline.svg", "forward-cpu-study-time.svg", "scores.svg"]


@pytest.mark.parametrize("option", ["--help", "--json"])
def test_a_wrong_option_and_a_question_write_nothing(written, option):
    with pytest.raises(SystemExit):
        report.main([option])
    assert written() == (f"{report.BEGIN}old figures{report.END}", [])


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("forward", '{"rows": [', "JSONDecodeError: Expecting"),
        ("predict", "{}", "KeyError: 'rows'"),
        ("precisions", "[]", "Type"),
    ],
)
def test_a_file_that_is_no_result_is_named(results, written, kind, text, reason):
    (results / f"{kind}-broken.json").write_text(text)
    with pytest.raises(SystemExit, match=rf"{kind}-broken\.json: not a result of {kind}\.py \({reason}.*again with --json"):
        report.main([])
    assert written() == (f"{report.BEGIN}old figures{report.END}", [])


def test_without_results_the_page_keeps_its_figures(results, written):
    for file in results.iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match=r"there are no results in \S+results; forward\.py, "):
        report.main([])
    assert written() == (f"{report.BEGIN}old figures{report.END}", [])


def test_a_page_that_cannot_be_written_whole_stays(written, monkeypatch):
    monkeypatch.setattr(report.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        report.main([])
    assert written() == (f"{report.BEGIN}old figures{report.END}", [])


def test_the_documentation_is_what_the_script_writes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    report.write_page(plots.RESULTS, page)
    assert page.read_text(encoding="utf-8") == report.PAGE.read_text(encoding="utf-8"), "run `python benchmarks/report.py`"
    named = set(re.findall(r"\]\(plots/([^)]+)\)", page.read_text(encoding="utf-8")))
    assert named == {path.name for path in plots.PLOTS.iterdir()}


def test_the_documentations_plots_show_what_was_measured(tmp_path):
    plots.draw_scores(tmp_path / "scores.svg")
    for file in sorted(plots.RESULTS.glob("forward-*.json"))[::3]:  # drawing takes a while
        plots.draw_forward(json.loads(file.read_text(encoding="utf-8")), tmp_path, file.stem)
    assert len(list(tmp_path.iterdir())) > 5
    version, text, place = r"Matplotlib v[\d.]+", r">([^<>\n]+)</text>", r'[ "](-?[\d.]+)(?=[ "\n])'
    for path in tmp_path.iterdir():
        again, there = path.read_text(encoding="utf-8"), (plots.PLOTS / path.name).read_text(encoding="utf-8")
        change = f"{path.name} has changed: run `python benchmarks/report.py`"
        assert re.findall(text, there), path.name
        assert sorted(re.findall(text, again)) == sorted(re.findall(text, there)), change
        if re.findall(version, again) == re.findall(version, there):  # another one may put things elsewhere
            places = [np.array(re.findall(place, svg), float) for svg in (again, there)]
            assert places[0].shape == places[1].shape, change
            assert np.abs(places[0] - places[1]).max() < 0.1, change


def test_plots_show_every_contestant(results, tmp_path):
    plots.main(["--results", str(results), "--out", str(tmp_path)])
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {"scores.svg", "forward-cpu-study-time.svg", "forward-cpu-study-roofline.svg"}
    for name in ("forward-cpu-study-time.svg", "forward-cpu-study-roofline.svg"):
        for text in (*PEERS, "float32", "bfloat16"):
            assert f">{text}<" in drawn[name]
    assert all(f">{row['name']}" in drawn["scores.svg"] for row in plots.read_scores())
    assert max(len(text) for text in drawn.values()) < 100_000


def test_points_lie_under_the_measured_roof(monkeypatch, tmp_path):
    """The plot's own numbers, read back from its axes."""
    figures = []
    monkeypatch.setattr(plots, "save_plot", lambda figure, file: figures.append(figure))
    found = forward_results()
    plots.draw_roofline(found["rows"], found["roofs"], tmp_path / "a.svg")
    panel = figures[0].axes[0]
    roof, *points = panel.get_lines()
    assert max(roof.get_ydata()) == 10  # GFLOP/s
    assert [line.get_label() for line in points] == list(PEERS)
    intensities = [1e6 / 1e7, 2e6 / 4e7]  # FLOP of the batch over its bytes
    assert list(points[1].get_xdata()) == pytest.approx(intensities)
    assert list(points[1].get_ydata()) == pytest.approx([1e6 / 2e-4 / 1e9, 2e6 / 8e-4 / 1e9])


def test_each_contestant_lies_at_its_own_intensity(monkeypatch, tmp_path):
    """A contestant that is another network, as monai's, moves other bytes."""
    figures = []
    monkeypatch.setattr(plots, "save_plot", lambda figure, file: figures.append(figure))
    found = forward_results()
    for row in found["rows"]:
        row["bytes_per_pass"] //= 1 + PEERS.index(row["peer"])
    plots.draw_roofline(found["rows"], found["roofs"], tmp_path / "a.svg")
    _, *points = figures[0].axes[0].get_lines()
    for count, line in enumerate(points, start=1):
        assert list(line.get_xdata()) == pytest.approx([count * 1e6 / 1e7, count * 2e6 / 4e7])


def test_networks_whose_paths_end_alike_have_plots_of_their_own(results, tmp_path):
    found = forward_results()
    found["rows"] = [{**row, "network": network} for network in ("runs/a/model", "runs/b/model") for row in found["rows"]]
    assert len({*plots.draw_forward(found, tmp_path, "forward-cpu")}) == 4
    section = report.forward_section(found, "forward-cpu")
    assert {tmp_path / name for name in re.findall(r"\]\(plots/([^)]+)\)", section)} == {*tmp_path.glob("*.svg")}
    assert section.count("**runs/a/model, float32**") == section.count("**runs/b/model, float32**") == 1


def test_bad_folders(capsys):
    with pytest.raises(SystemExit):
        plots.main(["--out", "no/such/folder"])
    assert "there is no folder 'no/such/folder'" in capsys.readouterr().err


# ---- costs of published networks, from their descriptions ----------------------------------------------------------------


def conv(before, width, pixels):
    return 2 * 9 * before * width * pixels


def petrosgk(side):
    """Two convolutions down, three after each concatenation, upsampling without weights; deeper for larger pictures."""
    widths = [width for width in (8, 16, 32, 64, 128, 256, 512, 1024) if width >= 8 * 1024 // side]
    total, before = 2 * side**2 * widths[0], 3
    for level, width in enumerate(widths):
        pixels = (side >> level) ** 2
        total += conv(before, width, pixels) + conv(width, width, pixels)
        if level < len(widths) - 1:
            total += conv(width + widths[level + 1], width, pixels) + 2 * conv(width, width, pixels)
        before = width
    return total


def ematvey():
    """A first convolution of stride 2, blocks of in-in and in-out; the last blocks at full size see the picture again."""
    widths, full = (16, 32, 64, 128, 256, 512, 1024, 1024), 1280 * 1920

    def block(before, width, pixels):
        return conv(before, before, pixels) + conv(before, width, pixels)

    half = full // 4
    total = conv(3, 16, half)
    for level in range(1, 8):
        pixels = full >> 2 * level
        total += block(widths[level - 1], widths[level], pixels)
        if level < 7:
            total += block(widths[level + 1] + widths[level], widths[level], pixels)
    total += conv(32 + 16, 32, half) + conv(32, 32, half) + 2 * 4 * 32 * 32 * half
    return total + conv(32, 32, full) + block(32 + 3, 32, full) + 2 * 32 * full


def test_costs_of_published_networks():
    from harness import flop

    from unetlib import UNet

    rows = {row["name"]: row for row in plots.read_scores()}
    expected = {f"petrosgk {side}": petrosgk(side) for side in (128, 256, 512, 1024)} | {"ematvey": ematvey()}
    expected["unetlib carvana"] = flop(UNet.from_pretrained("carvana"), 1280, 1918)
    assert {name for name, row in rows.items() if row["gflop"] is not None} == set(expected)
    for name, flops in expected.items():
        assert rows[name]["gflop"] == round(flops / 1e9, 1)
    assert all(row["source"] for row in rows.values())
