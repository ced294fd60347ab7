from __future__ import annotations

import argparse
import functools
import io
import json
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save, save_file
from study import StudyUNet, randomize

from unetlib import Preprocessing, UNet, UNetConfig, trust
from unetlib.pretrained import model_info

fuzz = settings(max_examples=80)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return randomize(UNet(features=(2,))).save_pretrained(tmp_path_factory.mktemp("trust") / "small")


@pytest.fixture
def folder(tmp_path) -> Path:
    return randomize(UNet(features=(2,))).save_pretrained(tmp_path / "model")


def rewrite(folder: Path, **sections: object) -> Path:
    """Another config.json; `model` is merged into the one there."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in sections.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- shape bombs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"features": [10**6], "bottleneck": 10**6}, r"asks for [\d,]{18} numbers where there are [\d,]{3}: of another shape"),
        ({"features": [10**12], "bottleneck": 10**12}, "asks for a network that cannot be"),
        ({"features": [10**30], "bottleneck": 10**30}, "asks for a network that cannot be"),
        ({"features": [4] * 25}, "missing encoder"),
        ({"features": [4] * 1000}, "features has 1000 levels; more than 30 fit no picture"),
        ({"in_channels": 10**10}, "do not fit their config"),
        ({"out_channels": 10**10}, "do not fit their config"),
    ],
)
def test_a_config_that_asks_for_terabytes_is_refused_without_asking_for_memory(folder, model, reason):
    resource = pytest.importorskip("resource", reason="peak memory is read from the system's resource usage")
    derived = dict.fromkeys(("bottleneck", "up_features", "mid_features", "decoder_features"))
    rewrite(folder, model={**derived, **model})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=reason):
        UNet.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**20 / (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("preprocessing", [{"size": [10**6, 10**6]}, {"size": [1, 10**9]}, {"scale": 1000.0}])
def test_pictures_enlarged_to_terabytes_are_refused(folder, preprocessing):
    with pytest.raises(ValueError, match="pictures are enlarged too far"):
        UNet.from_pretrained(rewrite(folder, preprocessing=preprocessing))


def test_what_is_as_large_as_may_be_is_read():
    assert trust.read_json("{" + " " * (trust.TEXT_LIMIT - 2) + "}") == {}
    for preprocessing in ({"size": (2**14, 2**14)}, {"scale": 16.0}):
        config, _ = trust.read_config({"model": {"features": [1] * 30}, "preprocessing": preprocessing})
        assert config.depth == 30
    for model, preprocessing in (([1] * 31, {}), ([1], {"size": (2**14, 2**14 + 1)}), ([1], {"scale": 16.1})):
        with pytest.raises(ValueError, match=r"more than 30 fit no picture|are enlarged too far"):
            trust.read_config({"model": {"features": model}, "preprocessing": preprocessing})


def test_a_number_beyond_floats_is_no_value():
    with pytest.raises(ValueError, match="a value is not possible"):
        trust.read_config({"model": {}, "preprocessing": {"threshold": 10**400}})


def test_a_number_seen_as_a_terabyte_is_refused(tmp_path):
    state = StudyUNet(features=(4, 8)).state_dict()
    state["downs.0.conv.0.weight"] = torch.zeros(1).expand(4, 10**9, 3, 3)
    torch.save(state, tmp_path / "bomb.pth")
    with pytest.raises(
        ValueError, match=r"bomb\.pth: 'downs.0.conv.0.weight' claims the shape \(4, 1000000000, 3, 3\), and has less"
    ):
        UNet.from_pretrained(tmp_path / "bomb.pth")


def test_many_tensors_that_share_their_data_are_refused(tmp_path):
    shared = torch.zeros(2 * 10**5)
    state = {
        name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in StudyUNet(features=(32, 64)).state_dict().items()
    }
    state["bottleneck.conv.0.weight"] = torch.zeros(128, 64, 3, 3)  # all together are less than twice the file
    torch.save(state, tmp_path / "shared.pth")
    with pytest.raises(ValueError, match=r"shared\.pth describes tensors of [\d,]+ bytes, and has [\d,]+"):
        UNet.from_pretrained(tmp_path / "shared.pth")


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save(StudyUNet(features=(4, 8)).state_dict(), tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part) + bytes(10**6))
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as a checkpoint"):
        UNet.from_pretrained(tmp_path / "bomb.pth")


def test_tensors_that_are_not_plain_are_refused(tmp_path):
    state = StudyUNet(features=(4, 8)).state_dict()
    zeros = torch.zeros(1, 4, 1, 1)
    for odd in (zeros.to("meta"), zeros.to_sparse(), zeros * 1j, torch.nested.as_nested_tensor(zeros)):
        torch.save({"state_dict": {**state, "final_conv.weight": odd}}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"odd\.pth: 'final_conv\.weight' is not a plain tensor of real numbers"):
            UNet.from_pretrained(tmp_path / "odd.pth")


# --- code


class Number:
    """Pickles as NumPy's numbers do, of any type."""

    def __init__(self, dtype: str, data: bytes) -> None:
        self.dtype, self.data = np.dtype(dtype), data

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (self.dtype, self.data)


NUMBERS = [np.float64(0.5), np.float32(0.25), np.bool_(True), np.int64(-7), np.uint8(200), Number(">i2", b"\1\0")]


@pytest.mark.parametrize("core", [None, b"numpy.core.", b"numpy._core."])  # this NumPy's, and those of NumPy 1 and 2
def test_numbers_of_numpy_are_no_code(tmp_path, core):
    path, state = tmp_path / "best.pth", StudyUNet(features=(4, 8)).state_dict()
    torch.save({"state_dict": state, "scores": NUMBERS}, path, _use_new_zipfile_serialization=core is None)
    if core is not None:  # a file of the old form is a bare pickle
        path.write_bytes(re.sub(rb"numpy\._?core\.", core, path.read_bytes()))
    allowed = torch.serialization.get_safe_globals()
    scores = trust.read_checkpoint(path)["scores"]
    assert scores == [0.5, 0.25, True, -7, 200, 256]
    assert {type(score) for score in scores} == {float, bool, int}
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    assert UNet.from_pretrained(path).config.features == (4, 8)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        ([np.float64(1), argparse.Namespace(lr=0.1)], "argparse.Namespace"),
        (np.zeros(3), r"numpy\._?core\.multiarray\._reconstruct"),
        (np.str_("unet"), "numpy.dtype"),
        (np.datetime64("2020"), "numpy.dtype"),
    ],
)
def test_other_code_is_refused_and_the_way_out_works(tmp_path, value, code, monkeypatch):
    path = tmp_path / "last.pth"
    torch.save({"state_dict": StudyUNet(features=(4, 8)).state_dict(), "args": value}, path)
    with pytest.raises(ValueError, match=rf"asks for the code {code}, .* if you trust the file: torch\.save") as error:
        UNet.from_pretrained(path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # with which torch.load runs code unless told not to
    with pytest.raises(ValueError, match=f"asks for the code {code}"):
        UNet.from_pretrained(path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"torch\.save\(.*'weights\.pth'\)", str(error.value))[0], {"torch": torch})
    assert UNet.from_pretrained("weights.pth").config.features == (4, 8)


@pytest.mark.parametrize(
    ("dtype", "reason"), [("O", "the code numpy.dtype"), ("V8", "the code numpy.dtype"), ("f8", "damaged")]
)
def test_a_number_that_is_a_pointer_or_too_short_is_refused(tmp_path, dtype, reason):
    torch.save({"score": Number(dtype, bytes(7))}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd\.pth cannot be read as a checkpoint .*{reason}"):
        trust.read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("dtype", ["V8", "U4", "M8[s]", "f8"])
def test_only_the_type_that_a_pickle_writes_is_believed(tmp_path, dtype):
    """An OrderedDict, which torch allows, can be given any attributes."""

    class Pretended:
        def __reduce__(self):
            kind = OrderedDict()
            kind.type = dtype
            return np.float64(0).__reduce__()[0], (kind, bytes(16))

    torch.save({"score": Pretended()}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"asks for the code numpy\.dtype"):
        trust.read_checkpoint(tmp_path / "odd.pth")


def test_threads_do_not_take_the_names_from_each_other(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"score": np.float64(0.5)}, path)
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(lambda _: trust.read_checkpoint(path)["score"], range(200))] == [0.5] * 200


# --- versions


@pytest.mark.parametrize("version", ["0.2.0", "1.0", "1.0.0rc1", "99.0.0", "0.10.0"])
def test_a_newer_version_is_refused(folder, monkeypatch, version):
    monkeypatch.setattr("unetlib.version.version", lambda name: "0.1.5")
    with pytest.raises(ValueError, match=rf"unetlib {version} wrote it, and this is 0\.1\.5; install a newer version"):
        UNet.from_pretrained(rewrite(folder, unetlib=version))


@pytest.mark.parametrize("version", ["0.1.0", "0.1.9", "0.0.1", "unknown"])
def test_the_same_and_older_versions_load(folder, monkeypatch, version):
    monkeypatch.setattr("unetlib.version.version", lambda name: "0.1.5")
    assert UNet.from_pretrained(rewrite(folder, unetlib=version)).config.features == (2,)


def test_a_field_of_a_later_version_is_named(folder):
    with pytest.raises(ValueError, match=r"does not know \['magic'\]; .* install a newer version of it"):
        UNet.from_pretrained(rewrite(folder, model={"magic": 1}))


# --- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["head.weight", "encoder.0.norm1.running_var"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_that_are_not_finite_are_refused_unless_allowed(tmp_path, value, key, dtype):
    model = UNet(features=(2,))
    model.state_dict()[key].view(-1)[-1] = value
    folder = model.save_pretrained(tmp_path / "model", dtype=dtype)
    with pytest.raises(
        ValueError, match=f"the weights of .*model' hold NaN or infinity in {key}; .* pass allow_nonfinite=True"
    ):
        UNet.from_pretrained(folder)
    loaded = UNet.from_pretrained(folder, allow_nonfinite=True)
    torch.testing.assert_close(loaded.state_dict()[key].view(-1)[-1], torch.tensor(value), equal_nan=True)


def test_a_number_beyond_float32_is_infinite(tmp_path):
    model = UNet(features=(2,)).double()
    with torch.no_grad():
        model.head.bias[0] = 1e300
    with pytest.raises(ValueError, match=r"hold NaN or infinity in head\.bias"):
        UNet.from_pretrained(model.save_pretrained(tmp_path / "model"))


# --- headers


def safetensors_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors_bytes("{" + ONE + ", " + ONE + "}", bytes(4)), "'a' occurs twice"),
        (
            safetensors_bytes('{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
            "'shape' occurs",
        ),
        (safetensors_bytes("{" + ONE + "}", bytes(2)), "(not fully covered|MetadataIncompleteBuffer)"),
        (safetensors_bytes("{" + ONE + "}", bytes(8)), "(not fully covered|MetadataIncompleteBuffer)"),
        (
            safetensors_bytes('{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}', bytes(4)),
            "(invalid shape|TensorInvalidInfo)",
        ),
        (
            safetensors_bytes('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)),
            "(invalid JSON|InvalidHeaderDeserialization)",
        ),
        (
            safetensors_bytes('{"a": {"dtype": "CODE", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
            "type CODE are not known",
        ),
        (safetensors_bytes("{}", length=2**63), "its header claims 9,223,372,036,854,775,808 bytes"),
        (safetensors_bytes(" " * 2 * 2**20), "its header claims 2,097,152 bytes"),
        (safetensors_bytes("[" * 100_000), "nested too deeply"),
        (safetensors_bytes("[]"), "expected a JSON object, got list"),
    ],
)
def test_a_header_that_lies_is_one_error(tmp_path, content, reason):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (UNet.from_pretrained, model_info):
        with pytest.raises(ValueError, match=rf"bad\.safetensors is no safetensors file, or a damaged one: .*{reason}"):
            read(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model":' * 100_000, "{" + " " * 2**20 + "}", '{"model": 1' + "0" * 10_000 + "}"]
)
def test_a_config_that_is_too_much_is_one_error(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the config of .*model\.safetensors is not one of a U-Net"):
        UNet.from_pretrained(folder)


# --- fuzzing: a ValueError or a network, and nothing else


def load(read: Callable[[Path], object], path: Path) -> object:
    """What was read, None where it was refused."""
    try:
        return read(path)
    except ValueError as error:
        refused = error
    assert type(refused) is ValueError
    assert len(str(refused)) < 10_000
    return None


numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 2**31, 2**63, 10**400, -1])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8
)


def some_of(cls):
    """Sections with the right names, and values right and wrong."""
    right = {"batch", "none", "instance", "relu", "leaky_relu", "bilinear", "nearest", "transpose"}
    likely = st.sampled_from(sorted(right)) | st.lists(st.integers(1, 4) | numbers, max_size=3) | st.integers(1, 4)
    fields = st.dictionaries(st.sampled_from(sorted(cls.__dataclass_fields__)), likely | values, max_size=4)
    return fields | values


configs = st.fixed_dictionaries(
    {}, optional={"model": some_of(UNetConfig), "preprocessing": some_of(Preprocessing), "unetlib": values}
)


@fuzz
@given(config=configs | values)
def test_any_config_is_a_network_or_a_value_error(small, tmp_path, config):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((small / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(UNet.from_pretrained, tmp_path)
    assert model is None or model.config.features == (2,)


@fuzz
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_config_are_a_network_or_a_value_error(small, tmp_path, text):
    (tmp_path / "model.safetensors").write_bytes((small / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes(text)
    load(UNet.from_pretrained, tmp_path)


@st.composite
def mutated(draw, original: bytes) -> bytes:
    """A file with some bytes changed, cut out or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(len(data), draw(st.sampled_from([16, 400, 10**9])))))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@fuzz
@given(data=st.data())
def test_any_safetensors_file_is_a_network_or_a_value_error(small, tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data.draw(mutated((small / "model.safetensors").read_bytes())))
    for read in (UNet.from_pretrained, model_info):
        load(read, path)


headers = st.dictionaries(
    st.sampled_from(["final_conv.weight", "downs.0.conv.0.weight", "encoder.0.conv1.weight", "bottleneck.conv.0.weight", "a"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E4M3", "C64", "X"]) | values,
            "shape": st.lists(st.integers(0, 4), max_size=5) | values,
            "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | values,
        },
    )
    | values,
    max_size=4,
)


@fuzz
@given(header=headers | values, size=st.integers(0, 64), metadata=values)
def test_any_header_is_a_network_or_a_value_error(tmp_path, header, size, metadata):
    if isinstance(header, dict):
        header["__metadata__"] = {"unetlib": json.dumps(metadata)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(json.dumps(header), bytes(size)))
    for read in (UNet.from_pretrained, model_info):
        assert load(read, path) is None


@fuzz
@given(
    shapes=st.dictionaries(
        st.sampled_from(sorted(StudyUNet(features=(2, 4)).state_dict())), st.lists(st.integers(0, 5), max_size=5), max_size=5
    )
)
def test_any_shapes_in_a_study_checkpoint_are_a_network_or_a_value_error(tmp_path, shapes):
    state = StudyUNet(features=(2, 4)).state_dict()
    save_file({**state, **{name: torch.zeros(shape) for name, shape in shapes.items()}}, tmp_path / "a.safetensors")
    load(UNet.from_pretrained, tmp_path / "a.safetensors")


@functools.cache  # addresses stand in legacy files, and their lengths must not change from example to example
def study_checkpoint(legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(StudyUNet(features=(2, 4)).state_dict(), stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@fuzz
@given(data=st.data(), legacy=st.booleans())
def test_any_checkpoint_is_a_network_or_a_value_error(tmp_path, data, legacy):
    path = tmp_path / "a.pth"
    path.write_bytes(data.draw(mutated(study_checkpoint(legacy))))
    load(UNet.from_pretrained, path)


# --- small readers


def test_versions_of_a_package_that_is_not_installed_are_not_compared(monkeypatch):
    monkeypatch.setattr(trust, "installed_version", lambda: "unknown")
    trust.check_version("99.0.0")


def test_a_file_is_not_read_beyond_the_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"x" * trust.TEXT_LIMIT)
    assert len(trust.read_small(path)) == trust.TEXT_LIMIT
    path.write_bytes(b"x" * (trust.TEXT_LIMIT + 1))
    with pytest.raises(ValueError, match="has more than 1,048,576 bytes"):
        trust.read_small(path)


def test_fit_names_the_first_keys_and_counts_the_rest():
    expected = {name: torch.zeros(2) for name in "abcdef"}
    with pytest.raises(
        ValueError, match=r"'m' do not fit .* 12 numbers where there are 3: missing a, b, c and 2 more; of another"
    ):
        trust.check_fit(expected, {"f": torch.zeros(3)}, "m")


@pytest.mark.parametrize("dtype", list(trust.DTYPES.values()))
def test_the_types_of_safetensors_are_known(tmp_path, dtype):
    (tmp_path / "a.safetensors").write_bytes(save({"a": torch.zeros(3).to(dtype)}))
    described = trust.read_safetensors(tmp_path / "a.safetensors", header_only=True).tensors["a"]
    loaded = trust.read_safetensors(tmp_path / "a.safetensors").tensors["a"]
    assert described.dtype == loaded.dtype == dtype
    assert described.device.type == "meta"
