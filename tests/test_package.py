from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import unetlib

ROOT = Path(__file__).parents[1]
SOURCE = Path(unetlib.__file__).parent
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py"
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


# --- imports are light and silent


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    done = run("import json, sys, unetlib; print(json.dumps(sorted(sys.modules)))")
    assert done.stderr == ""
    loaded = set(json.loads(done.stdout))  # one line of JSON and nothing else
    assert "unetlib" in loaded
    assert not loaded & {"torch", "torchvision", "PIL", "numpy", "huggingface_hub", "safetensors", "matplotlib", "tqdm"}


def test_a_network_by_name_needs_neither_torchvision_nor_pillow_nor_the_hub():
    done = run(
        "import json, sys\n"
        "from unetlib import UNet, list_pretrained\n"
        "UNet(features=(2,)); list_pretrained()\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert done.stderr == ""
    loaded = set(json.loads(done.stdout))
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"torchvision", "PIL", "huggingface_hub", "matplotlib", "torch._dynamo"}


# --- public names


@pytest.mark.parametrize("name", unetlib.__all__)
def test_every_public_name_resolves(name):
    value = getattr(unetlib, name)
    assert name in dir(unetlib)
    assert getattr(value, "__name__", "").rpartition(".")[2] == name
    assert value.__doc__


@pytest.mark.parametrize("name", [name for name in unetlib.__all__ if isinstance(getattr(unetlib, name), type)])
def test_the_types_of_constructors_are_there_at_run_time(name):
    """For programs that build objects from configuration files by them."""
    assert "return" in typing.get_type_hints(getattr(unetlib, name).__init__)


def test_type_checkers_know_what_comes_out(tmp_path):
    pytest.importorskip("mypy")
    types = {
        "UNet.from_pretrained('carvana')": "UNet",
        "model.eval()(x)": "Tensor",
        "model.predict('car.jpg')": "NDArray[Any]",
        "model.predict(['car.jpg'])": "list[NDArray[Any]]",
        "model.predict('car.jpg', out='car.tif')": "Path",
        "optimize_for_inference(model)(x)": "Tensor",
        "model.config.features": "tuple[int, ...]",
        "BCEDiceLoss()(x, x)": "Tensor",
        "(BCEDiceLoss() + 0.5 * DiceLoss())(x, x)": "Tensor",
        "SegmentationMetrics().compute()": "dict[str, float]",
        "evaluate(model, CarvanaDataset('train', 'train_masks'))": "dict[str, float]",
        "split_by_car(CarvanaDataset('train', 'train_masks'))[0].subset([0])": "CarvanaDataset",
        "next(iter(CarvanaDataset('train', 'train_masks')))": "tuple[Any, Any]",
    }
    program = """
from pathlib import Path
from typing import Any
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import assert_type
from unetlib import BCEDiceLoss, CarvanaDataset, DiceLoss, SegmentationMetrics, UNet, split_by_car
from unetlib.inference import evaluate, optimize_for_inference

def check(model: UNet, x: Tensor) -> None:
"""
    program += "".join(f"    assert_type({value}, {kind})\n" for value, kind in types.items())
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_are_listed_once():
    assert len(set(unetlib.__all__)) == len(unetlib.__all__)


@pytest.mark.parametrize("room", ["losses", "metrics", "convert", "unet", "datasets"])
def test_rooms_open_by_themselves(room):
    assert run(f"import unetlib; print(unetlib.{room}.__name__)").stdout.strip() == f"unetlib.{room}"


def test_the_version_is_that_of_the_installed_package():
    assert unetlib.__version__ == importlib.metadata.version("unetlib")


def test_the_version_is_told_without_loading_pytorch():
    assert run("import sys, unetlib; unetlib.__version__; print('torch' in sys.modules)").stdout == "False\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'unetlib' has no attribute 'Unet'"):
        unetlib.Unet  # noqa: B018


def test_type_checkers_see_the_names_that_the_lazy_table_gives():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(node.module, alias.asname or alias.name) for node in block.body for alias in node.names}
    assert seen == {(module, name) for name, module in unetlib._HOME_OF.items()} | {(None, name) for name in unetlib._MODULES}
    # One that they saw would make names of all that are misspelt.
    assert not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)


def test_the_source_distribution_has_what_its_tests_read():
    sdist = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.hatch.build.targets.sdist]\n")[1].split("\n\n")[0]
    )
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 128:
        pytest.skip("not a clone")
    top = {name.partition("/")[0] for name in listed.stdout.split("\0")} - {"", ".gitignore", ".pre-commit-config.yaml"}
    assert top - {"pyproject.toml"} == set(ast.literal_eval(sdist.removeprefix("include = ")))


def test_the_table_names_each_things_own_module():
    for name, module in unetlib._HOME_OF.items():
        assert getattr(unetlib, name).__module__ == f"unetlib.{module}"


def test_the_wheel_has_what_is_no_python():
    """hatchling takes all of the package's folder but what git ignores; `pip install -e` needs none of it."""
    wheel = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.hatch.build.targets.wheel]\n")[1]
    assert wheel.split("\n\n")[0] == 'packages = ["src/unetlib"]'
    files = [str(path) for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {".cpp", ".safetensors", ".json", ".md"} <= {Path(file).suffix for file in files}
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a clone")
    assert ignored.stdout == ""


# --- arrows point one way: config, blocks, losses, metrics, datasets and transforms know nothing of those above them

ABOVE = {"unet", "convert", "pretrained", "inference", "visualize"}


def imported(module: str, *, functions: bool = False) -> Iterator[str]:
    """What a module imports: unetlib's own modules as `.name`, of others the first part; not those for type checkers."""
    package = module.split(".") if FILES[module].stem == "__init__" else module.split(".")[:-1]
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                path = alias.name.split(".")
                if isinstance(node, ast.ImportFrom):
                    inside = ["unetlib", *package[: len(package) - node.level + 1]] if node.level else []
                    path = [*inside, *(node.module or "").split("."), alias.name] if node.module else [*inside, alias.name]
                if path[0] != "unetlib":
                    yield path[0]
                    continue
                while path[1:] and ".".join(path[1:]) not in FILES:
                    name = path.pop()  # a name in the module before it, or one of the package's public names
                yield "." + (".".join(path[1:]) or unetlib._HOME_OF.get(name, name))
        elif functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def own(module: str, *, functions: bool = False) -> set[str]:
    return {name[1:] for name in imported(module, functions=functions) if name.startswith(".")}


def test_imports_are_read():
    below = {"arguments", "blocks", "config", "recompute"}
    assert own("unet") == below
    assert own("unet", functions=True) == below | {"inference", "pretrained"}
    assert "torch" in set(imported("blocks"))


def test_config_imports_the_standard_library_alone():
    assert set(imported("config", functions=True)) <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("config", set()),
        ("arguments", set()),
        ("files", set()),
        ("version", set()),
        ("blocks", {"arguments", "config"}),
        ("recompute", set()),
        ("unet", {"arguments", "blocks", "config", "recompute"}),
        ("convert", {"arguments", "config"}),
        ("trust", {"config", "version"}),
        ("adapt", {"arguments", "config"}),
        ("console", set()),
        ("hub", {"files", "trust", "version"}),
        ("cards", {"console", "hub", "trust", "version"}),
        ("tiling", {"arguments", "config"}),
        ("memory", {"config"}),
        ("symmetries", set()),
        ("rasters", {"arguments", "files", "imaging"}),
        ("pictures", {"arguments", "imaging", "rasters"}),
    ],
)
def test_the_networks_modules_import_only_what_is_below_them(module, allowed):
    assert own(module) <= allowed


@pytest.mark.parametrize(
    "module", ["config", "blocks", "losses", "metrics", "objects", "datasets", "cache", "transforms", "loading", "checkpoints"]
)
def test_the_ground_floor_knows_nothing_of_those_above(module):
    reached, pending = set(), {module}
    while pending:
        reached |= pending
        pending = {name for below in pending for name in own(below, functions=True)} - reached
    assert not reached & ABOVE


@pytest.mark.parametrize("module", ["pretrained", "inference"])
def test_loading_and_predicting_are_handed_a_model(module):
    assert "unet" not in own(module, functions=True)


def test_no_modules_import_each_other_in_a_circle():
    order = graphlib.TopologicalSorter({module: own(module) for module in FILES}).static_order()
    assert {"unet", "pretrained", "datasets"} <= set(order)  # a circle raises CycleError
