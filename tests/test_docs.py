from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from needs import needs_data
from PIL import Image

import unetlib
from unetlib.synthetic import render_scene

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CARDS = sorted((ROOT / "src" / "unetlib" / "zoo").glob("*/README.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *CARDS]
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]  # of the site
# pieces of others; no stable names
INTERNAL = {"arguments", "boundary", "console", "counts", "files", "gradients", "passes", "pictures", "terms"}
FRAGMENTS = {DOCS / "losses-and-metrics.md", *CARDS}  # their blocks are parts of programs
MODULES = sorted({module.name for module in pkgutil.iter_modules(unetlib.__path__)} - INTERNAL)
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def path_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    where: str
    code: str
    runs: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{path_of(page)}:{text.count(chr(10), 0, found.start()) + 1}", found[2], not found[1])
        for found in BLOCK.finditer(text)
    ]


WITH_CODE = [page for page in PAGES if blocks(page)]
RUNNING = [page for page in WITH_CODE if page not in FRAGMENTS and any(block.runs for block in blocks(page))]


def public_names(module_name: str) -> list[str]:
    module = importlib.import_module(f"unetlib.{module_name}")
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


# ---- code in the pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_CODE, ids=path_of)
def test_code_parses_and_its_imports_resolve(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block.code, block.where)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert known, f"{block.where}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("page", RUNNING, ids=path_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after another, in a folder that has the files they name."""
    monkeypatch.chdir(tmp_path)
    picture, mask = render_scene(0, size=(48, 72))
    Path("examples").mkdir()
    Image.fromarray(picture).save("examples/car.jpg")
    mask_name = "a.png" if page == ROOT / "README.md" else "a_mask.png"
    for images, masks, name in (("pictures", "masks", mask_name), ("streets", "labels", "a.png")):
        Path(images).mkdir()
        Path(masks).mkdir()
        Image.fromarray(picture).save(Path(images) / "a.jpg")
        Image.fromarray(mask).save(Path(masks) / name)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.runs:
            exec(compile(block.code, block.where, "exec"), names)
    if page.name == "quickstart.md":
        assert names["scores"]["dice"] > 0.7  # type: ignore[index]  # it has learned something


def test_code_fits_the_types_of_the_library(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    options = "# mypy: allow-redefinition, allow-untyped-calls, allow-untyped-defs, disable-error-code=import-untyped"
    for page in RUNNING:
        program = "\n".join([options, *(block.code for block in blocks(page) if block.runs)])
        (tmp_path / re.sub(r"\W", "_", path_of(page))).with_suffix(".py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--pretty", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_data
def test_small_pictures_of_carvana_are_made_as_the_training_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ["UNETLIB_DATA"])
    monkeypatch.chdir(tmp_path)
    Path("benchmarks").symlink_to(ROOT / "benchmarks")
    names = (ROOT / "benchmarks" / "splits" / "carvana-val.txt").read_text().split()[:3]
    for source, target, ends in (("val", "train", ".jpg"), ("val_masks", "train_masks", "_mask.gif")):
        Path("kaggle", target).mkdir(parents=True)
        for name in names:
            Path("kaggle", target, Path(name).stem + ends).symlink_to(data / "carvana" / source / (Path(name).stem + ends))
    [block] = [block for block in blocks(DOCS / "training.md") if "LANCZOS" in block.code]
    exec(compile(block.code, block.where, "exec"), {})
    assert {path.name for path in Path("carvana_240x160", "val").iterdir()} == set(names)
    for name in names:
        for made in (Path("val", name), Path("val_masks", f"{Path(name).stem}_mask.png")):
            with Image.open("carvana_240x160" / made) as ours, Image.open(data / "carvana_240x160" / made) as theirs:
                assert ours.mode == theirs.mode
                apart = np.abs(np.asarray(ours).astype(float) - np.asarray(theirs).astype(float))
            assert apart.mean() < 0.1  # libraries of JPEG may round differently


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_page(module: str) -> None:
    assert f"::: unetlib.{module}" in (DOCS / "reference" / f"{module}.md").read_text(encoding="utf-8").splitlines()
    assert f"reference/{module}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_overview_has_every_name_of_the_package() -> None:
    overview = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    missing = [name for name in unetlib.__all__ if not re.search(rf"\[(`{name}`|unetlib\.{name})\]", overview)]
    assert not missing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed, reason=f"{needed} is not installed; `pip install .[docs]` has it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_every_public_name(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    described = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    expected = {f"unetlib.{module}.{name}" for module in MODULES for name in public_names(module)}
    assert len(expected) > 40
    assert expected <= described
    private = [name for name in described if re.search(r"\._[a-z]", name)]
    assert not private


def test_the_search_finds_descriptions_and_no_source_code(site: Path) -> None:
    code = "_checked_revision"  # which `fetch` calls
    assert code in (site / "reference" / "hub" / "index.html").read_text(encoding="utf-8")
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "A commit that is cached needs no network" in index
    assert code not in index


def test_the_site_has_the_cards_and_the_changelog(site: Path) -> None:
    for model in unetlib.list_pretrained():
        page = (site / "zoo" / model / "index.html").read_text(encoding="utf-8")
        assert f'<h1 id="{model}">{model}<' in page
        assert "library_name" not in page, "the lines of the snippet begin in the card's front matter"
    assert "notable changes" in (site / "changelog" / "index.html").read_text(encoding="utf-8")


def test_the_site_asks_no_other_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(MODULES)
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(?:https?:)?//[^>]*>')
    assert [found[0] for page in pages for found in loads.finditer(page.read_text(encoding="utf-8"))] == []
    styles = {sheet.name: sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css")}
    assert "extra.css" in styles
    assert [name for name, style in styles.items() if re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style)] == []


# ---- what the pages say about other files ----------------------------------------------------------------------------


def headings(page: Path) -> set[str]:
    """As links name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", OUTSIDE, ids=path_of)
def test_links_of_files_outside_the_site_lead_somewhere(page: Path) -> None:
    links = [
        link.partition("#") for link in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")) if "://" not in link
    ]
    assert links
    for name, _, heading in links:
        there = page.parent / name if name else page
        assert there.exists(), name
        assert not heading or heading in headings(there), f"{name}#{heading}"


def test_commands_have_scripts_and_options_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    named: dict[str, set[str]] = {}  # a script's options
    for page in {*PAGES, *OUTSIDE}:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, options in re.findall(r"\b((?:examples|benchmarks)/\w+\.py)([^\n`]*)", text):
            named.setdefault(script, set()).update(re.findall(r"(?<=\s)--[a-z][\w-]*", options))
    assert len(named) > 10
    missing = [script for script in named if not (ROOT / script).exists()]
    assert not missing
    for script, options in named.items():
        if options:
            with pytest.raises(SystemExit):
                runpy.run_path(str(ROOT / script))["main"]([])
            unknown = options - set(parsers.pop()._option_string_actions)
            assert not unknown, script


def test_the_home_page_has_every_extra() -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    table = (DOCS / "index.md").read_text(encoding="utf-8").split("### Extras")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == re.findall(r"^(\w+) = \[", extras, re.MULTILINE)


def test_ci_has_what_builds_the_site_before_it_tests() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ci.index(".[docs]") < ci.index("\npytest\n")


def test_the_lists_of_carvana_are_of_different_cars() -> None:
    splits = [(ROOT / "benchmarks" / "splits" / f"carvana-{part}.txt").read_text().split() for part in ("train", "val")]
    assert [len(set(names)) for names in splits] == [768, 90]
    train, val = ({name.split("_")[0] for name in names} for names in splits)
    assert not train & val


def test_the_training_page_has_every_option() -> None:
    files = ("train_carvana.py", "training_options.py")
    script = "".join((ROOT / "examples" / name).read_text(encoding="utf-8") for name in files)
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    options = re.findall(r'^ +(?:parser\.)?add(?:_argument)?\(\s*"(--[a-z-]+)"', script, re.MULTILINE)
    assert len(options) > 10
    assert sorted(re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)) == sorted(options)


def test_the_pictures_are_small_and_can_be_made_again() -> None:
    pictures = runpy.run_path(str(DOCS / "make_images.py"))["PICTURES"]
    committed = list((DOCS / "images").iterdir())
    assert {path.name for path in committed} == set(pictures)
    assert sum(path.stat().st_size for path in committed) < 500_000
    for name, make in pictures.items():
        again, there = make().astype(np.int16), np.asarray(Image.open(DOCS / "images" / name)).astype(np.int16)
        assert again.shape == there.shape, name
        assert np.abs(again - there).mean() < 4, f"{name} has changed: run `python docs/make_images.py`"
