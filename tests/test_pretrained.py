from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import socket
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from study import StudyUNet, randomize
from torch.nn.utils import prune

from unetlib import Preprocessing, UNet, export_state_dict, hub, list_pretrained, pretrained
from unetlib.pretrained import model_info

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def model() -> UNet:
    model = randomize(UNet(2, 3, (4, 6), bottleneck=5, norm="batch", activation="silu", dropout=0.25))
    model.preprocessing = Preprocessing(size=(24, 40), mean=(0.4, 0.5), std=0.25, class_names=("sky", "road", "car"))
    return model


@pytest.fixture
def folder(tmp_path, model) -> Path:
    return model.save_pretrained(tmp_path / "saved")


@pytest.fixture
def zoo(tmp_path, monkeypatch) -> Path:
    """A zoo of two models, which differ in their features."""
    zoo = tmp_path / "zoo"
    for name, features in (("carvana", (3,)), ("carvana-small", (2,))):
        randomize(UNet(features=features)).save_pretrained(zoo / name)
    (zoo / "no-model").mkdir()
    monkeypatch.setattr(pretrained, "ZOO", zoo)
    return zoo


@pytest.fixture
def no_network(monkeypatch):
    """Neither the Hub's client nor a connection."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it raises ImportError
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def assert_same(model: UNet, other: UNet, exact: bool = True) -> None:
    assert model.config == other.config
    assert model.preprocessing == other.preprocessing
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]) or not exact, name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- save and load


def test_a_saved_model_comes_back_exactly(model, folder, no_network):
    loaded = UNet.from_pretrained(folder)
    assert_same(model, loaded)
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(2, 2, 17, 22)
    assert torch.equal(loaded(x), model(x))


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    UNet.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_holds_three_files_and_the_config_twice(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model"] == model.config.to_dict()
    assert config["preprocessing"] == model.preprocessing.to_dict()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["unetlib"]) == config


def test_the_weights_file_alone_is_enough(model, folder, tmp_path):
    alone = (folder / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert_same(model, UNet.from_pretrained(alone))
    assert_same(model, UNet.from_pretrained(str(alone)))


def test_the_config_file_goes_before_the_header(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["preprocessing"]["threshold"] = 0.25
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert UNet.from_pretrained(folder).preprocessing.threshold == 0.25


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_storage_loads_as_float32_within_its_rounding(model, folder, tmp_path, dtype, rounding):
    half = model.save_pretrained(tmp_path / "half", dtype=dtype)
    assert (half / "model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
    assert next(model.parameters()).dtype == torch.float32
    loaded = UNet.from_pretrained(half)
    assert_same(model, loaded, exact=False)
    for name, tensor in model.state_dict().items():
        stored = tensor.to(dtype).float() if tensor.ndim > 1 else tensor
        assert torch.equal(loaded.state_dict()[name], stored), name
        torch.testing.assert_close(stored, tensor, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.double])
def test_a_network_of_another_precision_comes_back_in_float32(model, tmp_path, convert):
    expected = {name: tensor.float() for name, tensor in convert(model).state_dict().items() if tensor.is_floating_point()}
    loaded = UNet.from_pretrained(model.save_pretrained(tmp_path / "other"))
    for name, tensor in expected.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_channels_last_network_comes_back(model, tmp_path):
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = UNet.from_pretrained(model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "last"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
def test_a_loaded_network_does_not_hang_on_its_file(model, tmp_path, form):
    if form == "folder":
        path, file = tmp_path, model.save_pretrained(tmp_path) / "model.safetensors"
    else:
        path = file = tmp_path / "study.pth"
        torch.save(export_state_dict(UNet(features=(4, 8)), "study"), path)
    loaded = UNet.from_pretrained(path)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    file.write_bytes(bytes(file.stat().st_size))  # in place, as by a training script that writes its best weights again
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, "float16", torch.float8_e4m3fnuz])
def test_a_storage_type_that_is_no_float_is_refused(model, tmp_path, dtype):
    with pytest.raises(ValueError, match=r"dtype must be a floating point type such as torch\.float16, got"):
        model.save_pretrained(tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


def replace_head(model):
    model.head = torch.nn.Conv2d(4, 5, 1)


def prune_head(model):
    prune.l1_unstructured(model.head, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "named"), [(replace_head, r"head\.weight is \(5, 4, 1, 1\)"), (prune_head, "head.weight_orig")]
)
def test_what_would_not_load_is_not_written_over_what_does(model, folder, change, named):
    before, changed = contents(folder), copy.deepcopy(model)
    change(changed)
    with pytest.raises(ValueError, match=rf"this model.*{named}.*build a UNet with the options that it has now"):
        changed.save_pretrained(folder)
    assert contents(folder) == before


class Deeper(UNet):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.auxiliary = torch.nn.Conv2d(self.config.bottleneck, 2, 1)


class Doubled(UNet):
    def forward(self, x):
        return 2 * UNet.forward(self, x)


class Another(UNet):
    def __init__(self, options):
        super().__init__(**options)


def change_activation(model):
    model.bottleneck.act2 = torch.nn.Mish()


def change_padding(model):
    model.encoder[0].conv1.padding_mode = "reflect"


def change_norm(model):
    model.encoder[0].norm1.eps = 0.1


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_activation, "bottleneck.act2"), (change_padding, "encoder.0.conv1"), (change_norm, "encoder.0.norm1")],
)
def test_what_would_load_as_another_network_is_not_saved(model, tmp_path, change, named):
    change(model)
    with pytest.raises(ValueError, match=f"its module '{named}' is not that of a UNet of its config. A layer was replaced"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_changes_no_result_of_the_loaded_network_is_saved(model, tmp_path):
    changed = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).requires_grad_(False)
    changed.checkpoint_gradients = True
    changed.encoder[0].norm1.momentum = 0.01
    changed.encoder[0].register_forward_hook(lambda *_: None)
    assert_same(model, UNet.from_pretrained(changed.save_pretrained(tmp_path / "saved")))


def test_subclasses_are_saved_as_they_or_a_unet_load(tmp_path, caplog):
    for kind in (Deeper, Doubled):
        network = kind(features=(4,))
        network.seen = torch.zeros(3)  # what a class keeps is its own matter
        assert_same(network, kind.from_pretrained(network.save_pretrained(tmp_path / kind.__name__)))
        name = kind.__name__
        assert f"a {name} is more than its config says: load it by {name}.from_pretrained, not by UNet's" in caplog.text
    caplog.clear()
    another = Another({"features": (4,)})
    assert_same(another, UNet.from_pretrained(another.save_pretrained(tmp_path / "another")))
    assert not caplog.text
    with pytest.raises(ValueError, match=r"Another\.from_pretrained needs a constructor .*, UNet\.from_pretrained does not$"):
        Another.from_pretrained(tmp_path / "another")


def test_what_neither_its_class_nor_a_unet_would_load_is_not_saved(tmp_path):
    class Both(Another):
        forward = Doubled.forward

    class Wider(UNet):
        def __init__(self, width=2, **options):
            super().__init__(**options)
            self.auxiliary = torch.nn.Linear(width, 1)

    with pytest.raises(ValueError, match=r"A Both is built from its config alone, .*, and a UNet has another forward$"):
        Both({"features": (4,)}).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"unexpected auxiliary.* A Wider is built from its config alone, without arguments"):
        Wider(3, features=(4,)).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_saved_must_load(model, tmp_path):
    changed = copy.deepcopy(model)
    changed.preprocessing = Preprocessing(scale=20.0)
    with pytest.raises(ValueError, match="enlarged too far"):
        changed.save_pretrained(tmp_path / "saved")
    for wrapper, place in ((torch.nn.DataParallel, "module"), (torch.compile, "_orig_mod")):
        with pytest.raises(TypeError, match=rf"expected a UNet, got an? \w+; take it out of its wrapper, as in model\.{place}"):
            pretrained.save_pretrained(wrapper(model), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_weight_beyond_the_storage_type_is_refused(model, folder):
    before, changed = contents(folder), copy.deepcopy(model)
    torch.nn.init.constant_(changed.head.weight, 1e5)
    with pytest.raises(ValueError, match=r"float16 is too small for the weights in head\.weight; give dtype=torch\.bfloat16"):
        changed.save_pretrained(folder, dtype=torch.float16)
    assert contents(folder) == before
    loaded = UNet.from_pretrained(changed.save_pretrained(folder, dtype=torch.bfloat16))
    assert loaded.head.weight.max().item() == pytest.approx(1e5, rel=0.01)


def test_the_device_is_taken(folder):
    for device in ("meta", torch.device("meta")):
        assert next(UNet.from_pretrained(folder, device=device).parameters()).device.type == "meta"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", torch.device("cuda", 99)])
def test_a_device_that_is_not_here_is_named_before_anything_is_read(no_network, device):
    with pytest.raises(ValueError, match=rf"^device {device} is not to be had here; give cpu, or cuda where"):
        UNet.from_pretrained("owner/name", device=device)


# --- model card


def test_a_card_is_written_with_what_the_model_is(folder, model):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: unetlib\n")
    for part in (
        "# saved\n",
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "(4, 6)",
        "at 24x40",
        "2 channels in, 3 out",
    ):
        assert part in card


def test_a_card_is_named_after_the_folder_and_tells_the_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = UNet(features=(2,))
    model.preprocessing = Preprocessing(scale=0.5)
    card = (model.save_pretrained(".") / "README.md").read_text(encoding="utf-8")
    assert f"# {tmp_path.name}\n" in card
    assert "at 0.5 times its size" in card


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are text there")
def test_a_folder_whose_name_is_no_text_has_a_card(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for features in ((4,), (5,)):  # the second time the card is known again
        UNet(features=features).save_pretrained(folder)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "# caf\\udce9\n" in card
        assert f"widths ({features[0]},)" in card


def test_a_card_that_was_written_for_the_network_that_is_replaced_goes_with_it(tmp_path):
    folder = UNet(out_channels=6, features=(4,)).save_pretrained(tmp_path / "land")
    UNet(out_channels=3, features=(4,)).save_pretrained(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "3 channels in, 3 out" in card
    changed = card.replace("Its classes", "Made by hand. Its classes")
    (folder / "README.md").write_text(changed, encoding="utf-8")
    UNet(out_channels=2, features=(4,)).save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == changed


def test_an_existing_card_is_kept_unless_another_is_given(folder, model):
    (folder / "README.md").write_text("mine", encoding="utf-8")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    model.save_pretrained(folder, card="né à neuf")
    assert (folder / "README.md").read_text(encoding="utf-8") == "né à neuf"


@pytest.mark.parametrize("config", ["{}", '{"model_type": "unet"}', '{"model": null}', "[]", "3", "", "\xff", '{"model": {}'])
def test_a_card_beside_a_config_of_another_kind_is_kept(tmp_path, model, config):
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert_same(model, UNet.from_pretrained(model.save_pretrained(tmp_path)))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


# --- whole or not at all


def test_a_write_that_fails_midway_leaves_the_old_files_and_no_others(folder, monkeypatch):
    before = contents(folder)

    def fail(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        UNet(features=(2,)).save_pretrained(folder)
    assert contents(folder) == before


def test_a_model_is_not_saved_in_the_place_of_a_file(tmp_path, model):
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(FileExistsError, match=r"model\.pt is a file, and a model is saved as a folder; give another name"):
        model.save_pretrained(tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == b"weights"


def test_a_name_that_is_empty_is_not_the_working_directory(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the folder's name is empty; for the working directory give '\.'"):
        model.save_pretrained("")
    assert not contents(tmp_path)
    assert set(contents(model.save_pretrained("."))) == set(FILES)


def test_a_card_that_cannot_be_written_leaves_weights_and_config_as_they_were(folder):
    before = contents(folder)
    with pytest.raises(UnicodeEncodeError):
        UNet(features=(2,)).save_pretrained(folder, card="\ud800")
    assert contents(folder) == before


def test_saving_again_replaces_weights_and_config(folder):
    other = randomize(UNet(features=(2,)), seed=5)
    other.save_pretrained(folder)
    assert_same(other, UNet.from_pretrained(folder))
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_files_have_the_modes_that_the_umask_gives(tmp_path, model):
    old = os.umask(0o027)
    try:
        folder = model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


# --- names by their form


def test_the_zoo_is_its_folders_with_a_config(zoo):
    assert list_pretrained() == ["carvana", "carvana-small"]


def test_a_zoo_name_loads_without_network(zoo, no_network):
    assert UNet.from_pretrained("carvana").config.features == (3,)
    assert UNet.from_pretrained("carvana-small").config.features == (2,)


def test_a_folder_called_like_a_zoo_model_does_not_hijack_the_name(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UNet(features=(5,)).save_pretrained("carvana")
    assert UNet.from_pretrained("carvana").config.features == (3,)
    for path in ("./carvana", "carvana/", Path("carvana"), tmp_path / "carvana", "carvana/model.safetensors"):
        assert UNet.from_pretrained(path).config.features == (5,)


def test_a_bare_word_is_never_a_folder(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UNet(features=(5,)).save_pretrained("mine")
    with pytest.raises(ValueError, match=r"no model is called 'mine'; the zoo has: carvana, carvana-small\..* type './mine'"):
        UNet.from_pretrained("mine")
    assert UNet.from_pretrained("./mine").config.features == (5,)


@pytest.mark.parametrize(("name", "near"), [("carvan", "carvana"), ("Carvana", "carvana"), ("carvana_small", "carvana-small")])
def test_a_name_near_one_of_the_zoo_is_pointed_to_it(zoo, name, near):
    with pytest.raises(ValueError, match=f"no model is called '{name}'.*Did you mean '{near}'"):
        UNet.from_pretrained(name)


def test_a_name_far_from_all_is_not(zoo):
    with pytest.raises(ValueError, match="no model is called 'xyz'") as error:
        UNet.from_pretrained("xyz")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["./absent", "../absent", "~/absent-model", "a/b/c", "absent/", "absent.pth", "owner/absent.safetensors"]
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(zoo, no_network, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*; the zoo's models are: carvana, carvana-small"):
        UNet.from_pretrained(name)


@pytest.mark.parametrize("name", ["bare.pt", "bare.safetensors"])
def test_what_to_type_for_a_file_reads_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model, twin = randomize(UNet(features=(5,))), UNet(features=(5,))
    save_file(model.state_dict(), name) if name.endswith("s") else torch.save({"model": model.state_dict()}, name)
    with pytest.raises(ValueError, match="looks like a unetlib UNet's") as error:
        UNet.from_pretrained(name)
    advice = re.findall(r"type (model\.load_state_dict\(.*\)) and ", str(error.value))[0]
    eval(advice, {"model": twin, "torch": torch, "safetensors": safetensors})
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_revision_behind_a_name_is_told_where_it_belongs(zoo, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"owner/name@v1\.0; for a revision .* type 'owner/name', revision='v1\.0'; the zoo"
    ):
        UNet.from_pretrained("owner/name@v1.0")
    (tmp_path / "owner").mkdir()
    UNet(features=(5,)).save_pretrained("owner/name@v1.0")
    assert UNet.from_pretrained("owner/name@v1.0").config.features == (5,)


@pytest.mark.parametrize("name", ["https://github.com/owner/name/unet.pth", "https://huggingface.co/a/b", "hf-hub:owner/name"])
def test_addresses_are_not_downloaded(zoo, no_network, name):
    with pytest.raises(ValueError, match=f"'{name}' is an address, .*: fetch the file .* type 'owner/name'"):
        UNet.from_pretrained(name)


def test_a_path_object_is_never_a_repository(no_network):
    with pytest.raises(FileNotFoundError, match="no file or folder owner/name"):
        UNet.from_pretrained(Path("owner/name"))


@pytest.mark.parametrize(
    "path", ["./runs/best", "runs/best/", "runs/../runs/best", Path("runs/best"), "runs/best/model.safetensors"]
)
def test_a_folder_in_a_folder_is_given_as_a_path(no_network, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    UNet(features=(5,)).save_pretrained("runs/best")
    assert UNet.from_pretrained(path).config.features == (5,)


def test_owner_and_name_is_a_repository_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UNet(features=(5,)).save_pretrained("runs/best")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda repo, files, **options: asked.append(repo) or Path("runs/best"))
    UNet.from_pretrained("runs/best")
    assert asked == ["runs/best"]


@pytest.mark.parametrize("name", ["carvana", "./mine", Path("owner/name"), "model.safetensors", "owner/model.pth"])
def test_only_a_repository_has_a_revision(zoo, no_network, name):
    with pytest.raises(ValueError, match=f"revision= is for a Hub repository 'owner/name'; '{name}' is none"):
        UNet.from_pretrained(name, revision="main")


@pytest.mark.parametrize("name", ["carvana", "./mine", "owner/name"])
def test_an_unknown_option_is_refused_whatever_the_name_stands_for(zoo, no_network, name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pretrained.from_pretrained(UNet, name, colour="red")


def test_home_is_expanded(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert UNet(features=(5,)).save_pretrained("~/mine") == tmp_path / "mine"
    assert UNet.from_pretrained("~/mine").config.features == (5,)
    with pytest.raises(FileNotFoundError, match="is no model folder"):
        UNet.from_pretrained("~")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x.pt", Path("~nobody-of-that-name/x.pt")])
def test_the_home_of_a_user_who_is_not_here_is_named(no_network, name):
    with pytest.raises(FileNotFoundError, match=r"^'~nobody-of-that-name/x\.pt' names the home folder of .* type '~/\.\.\.'$"):
        UNet.from_pretrained(name)


# --- lists and descriptions


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("*", ["carvana", "carvana-small"]), ("*-small", ["carvana-small"]), ("carvan?", ["carvana"]), ("x*", []), ("../*", [])],
)
def test_the_list_is_filtered_by_a_pattern(zoo, pattern, names):
    assert list_pretrained(pattern) == names


def test_info_of_a_folder_a_file_and_a_zoo_name(zoo, model, folder, no_network, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    info = model_info(folder)
    assert (info.config, info.preprocessing) == (model.config, model.preprocessing)
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.file_size == (folder / "model.safetensors").stat().st_size
    assert info.dtypes == ("float32", "int64")
    assert info.card["pipeline_tag"] == "image-segmentation"
    alone = model_info(folder / "model.safetensors")
    assert alone == dataclasses.replace(info, name=str(folder / "model.safetensors"), card={})
    assert model_info("carvana").config.features == (3,)


@pytest.mark.parametrize("name", ["study.safetensors", "study.pth"])
def test_info_of_a_study_checkpoint(tmp_path, name):
    study = StudyUNet(features=(4, 8))
    (save_file if name.endswith("safetensors") else torch.save)(study.state_dict(), tmp_path / name)
    info = model_info(tmp_path / name)
    assert info.config.features == (4, 8)
    assert info.parameters == sum(parameter.numel() for parameter in study.parameters())
    assert info.file_size == (tmp_path / name).stat().st_size


def test_info_reads_no_tensor(folder, monkeypatch):
    """Numbers that are not there are not missed."""
    path = folder / "model.safetensors"
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, header)
    os.truncate(path, size)  # a hole where the numbers were
    assert model_info(folder).file_size == size


def test_saving_works_where_the_package_is_not_installed(tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("unetlib.version.version", missing)
    folder = UNet(features=(2,)).save_pretrained(tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["unetlib"] == "unknown"
    assert UNet.from_pretrained(folder).config.features == (2,)


def test_a_link_in_the_folder_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    UNet(features=(2,)).save_pretrained(folder)
    assert outside.read_bytes() == b"precious"
    assert UNet.from_pretrained(folder).config.features == (2,)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless device on this system")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_something_endless_is_not_read(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError, match=f"it lacks {name}"):
        UNet.from_pretrained(folder)


# --- what does not fit


def test_a_folder_lacking_a_file_is_told_which_and_of_the_other_what_it_is_good_for(folder, model):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved is no model folder: it lacks config\.json; .* enough: give ") as error:
        UNet.from_pretrained(folder)
    assert_same(model, UNet.from_pretrained(str(error.value).rpartition("give ")[2]))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"saved is no model folder: it lacks model\.safetensors$"):
        UNet.from_pretrained(folder)


def test_the_folder_of_a_training_is_told_where_its_model_is(folder, tmp_path):
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "model")
    lacking = r"run is no model folder: it lacks .*safetensors; .*run.model is a model folder$"
    with pytest.raises(FileNotFoundError, match=lacking):
        UNet.from_pretrained(tmp_path / "run")
    torch.save({"model": UNet(features=(8,)).state_dict(), "step": 3}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"run.checkpoint\.pt: .* without its config.*; .*run.model is a model folder$"):
        UNet.from_pretrained(tmp_path / "run" / "checkpoint.pt")


def test_a_folder_without_a_model_is_told_both_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json and model\.safetensors"):
        UNet.from_pretrained(tmp_path)


def edit(folder: Path, change) -> Path:
    """Change the tensors in a weights file, and keep its header."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("head.weight"), "missing head.weight$"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra$"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(9)}),
            r"head.bias is \(9,\) of float32 where the config asks for \(3,\)$",
        ),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(3, dtype=torch.int64)}), r"head.bias is \(3,\) of int64"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, change, named):
    with pytest.raises(ValueError, match=f"the weights of .*saved.* do not fit their config, which asks for .*{named}"):
        UNet.from_pretrained(edit(folder, change))


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff" * 100])
def test_a_weights_file_of_rubbish_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or a damaged one"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("name", ["saved", "saved/model.safetensors", "study.pth"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 31057\n"
    for path in (folder / "model.safetensors", folder.parent / "study.pth"):
        path.write_text(pointer)
    with pytest.raises(ValueError, match=r"is a pointer of Git LFS, .* type `git lfs pull` in its folder"):
        UNet.from_pretrained(folder.parent / name)


@pytest.mark.parametrize("keep", [4, 0.1, 0.9])
def test_a_cut_weights_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep > 1 else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or a damaged one"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"in_channels": 3.5}', "in_channels must be a positive integer"),
        (b'{"model": {}, "model": {}}', "'model' occurs twice"),
        (b'{"model": {"dropout": 1' + 400 * b"0" + b"}}", "a value is not possible"),
        (b'{"unetlib": 3, "model": {}}', "'unetlib' must be the version"),
        (b'{"model": 3}', "expects a JSON object, got int"),
        (b'{"model": {"width": 3}}', r"does not know \['width'\]"),
        (b'{"model": {"features": 4}}', "features must be a sequence"),
        (b'{"model": {}, "preprocessing": {"class_names": 3}}', "class_names must be a sequence"),
        (b'{"model": {}, "preprocessing": {"mean": [0, 1]}}', "mean has 2 numbers"),
    ],
)
def test_a_bad_config_is_named_with_the_reason(folder, config, reason):
    (folder / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=f"the config of .*model.safetensors is not one of a U-Net: .*{reason}"):
        UNet.from_pretrained(folder)


def test_a_file_of_another_kind_is_told_the_suffixes(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.h5 is no weights file by its name; expected \.safetensors, .*\.pth, \.tar"):
        UNet.from_pretrained(tmp_path / "weights.h5")


# --- checkpoints of the study


@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 1), (1, 4)])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_study_checkpoint_loads_by_path_and_gives_the_studys_outputs(
    tmp_path, monkeypatch, wrapped, in_channels, out_channels
):
    study = randomize(StudyUNet(in_channels, out_channels, features=(4, 8, 16)))
    optimizer = torch.optim.Adam(study.parameters())
    study(torch.randn(2, in_channels, 16, 16)).mean().backward()
    optimizer.step()
    checkpoint = {"state_dict": study.state_dict(), "optimizer": optimizer.state_dict()} if wrapped else study.state_dict()
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint, "my_checkpoint.pth.tar")
    for name in ("my_checkpoint.pth.tar", tmp_path / "my_checkpoint.pth.tar"):
        model = UNet.from_pretrained(name)
        assert model.preprocessing.size == (160, 240)
        assert not model.training
        for size in [(16, 24), (17, 23), (8, 8), (37, 50)]:
            x = torch.randn(2, in_channels, *size)
            assert torch.equal(model(x), study(x))


def test_a_converted_checkpoint_can_be_saved_as_ours(tmp_path):
    study = randomize(StudyUNet(features=(4, 8)))
    torch.save(study.state_dict(), tmp_path / "study.pt")
    model = UNet.from_pretrained(tmp_path / "study.pt")
    assert_same(model, UNet.from_pretrained(model.save_pretrained(tmp_path / "ours")))


def test_a_study_checkpoint_in_safetensors(tmp_path):
    study = randomize(StudyUNet(features=(4, 8)))
    save_file(study.state_dict(), tmp_path / "study.safetensors")
    x = torch.randn(1, 3, 17, 18)
    assert torch.equal(UNet.from_pretrained(tmp_path / "study.safetensors")(x), study(x))


def test_a_study_checkpoint_in_half_precision_loads_as_float32(tmp_path):
    study = randomize(StudyUNet(features=(4, 8))).half()
    torch.save(study.state_dict(), tmp_path / "half.pth")
    x = torch.randn(1, 3, 17, 18)
    assert torch.equal(UNet.from_pretrained(tmp_path / "half.pth")(x), study.float()(x))


def test_a_checkpoint_lacking_tensors_is_told_which(tmp_path):
    state = StudyUNet(features=(4, 8)).state_dict()
    del state["ups.0.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"short\.pth: the study checkpoint .*decoder\.0\.upsample\.bias is missing"):
        UNet.from_pretrained(tmp_path / "short.pth")


def test_a_checkpoint_of_no_family_is_named(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt: this checkpoint of 1 entries is of no known family"):
        UNet.from_pretrained(tmp_path / "other.ckpt")


class Code:
    """Pickles to a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path):
    state = StudyUNet(features=(4, 8)).state_dict()
    torch.save({"state_dict": state, "epoch": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(
        ValueError, match=r"code\.pth cannot be read .* asks for the code \w+\.mkdir, .* never run; save its state"
    ):
        UNet.from_pretrained(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_network_is_refused(tmp_path, model):
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"asks for the code unetlib\.unet\.UNet"):
        UNet.from_pretrained(tmp_path / "whole.pt")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "cut.pth"
    torch.save(StudyUNet(features=(4, 8)).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep == 0 or keep > 1 else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as a checkpoint .*: it is damaged, or something else"):
        UNet.from_pretrained(path)


def test_a_checkpoint_that_is_no_dictionary_is_told_so(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, expected a state dict"):
        UNet.from_pretrained(tmp_path / "list.pth")


def test_all_files_may_be_read_by_the_same_people(tmp_path):
    UNet(features=(4,)).save_pretrained(tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
