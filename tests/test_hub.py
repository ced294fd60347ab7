from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import TOKEN, HubServer, Repository, status
from study import StudyUNet, randomize

from unetlib import Preprocessing, UNet, hub, list_pretrained, pretrained
from unetlib.pretrained import CARD, CONFIG, WEIGHTS, model_info

huggingface_hub = pytest.importorskip("huggingface_hub")


def take_for_the_hub(monkeypatch, url: str) -> None:
    """Point huggingface_hub at another address, as HF_ENDPOINT does when it is imported."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # older clients have a name of their own for it
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def server(monkeypatch):
    """A Hub on loopback that the client takes for the real one, and that waits for nobody."""
    from huggingface_hub import constants

    with HubServer() as server:
        take_for_the_hub(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # older clients have no Xet
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def files(model: UNet, folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.save_pretrained(folder).iterdir()}


@pytest.fixture
def model() -> UNet:
    model = randomize(UNet(features=(4, 8)))
    model.preprocessing = Preprocessing(size=(32, 48), class_names=("road", "car"))
    return model


@pytest.fixture
def repository(server, model, tmp_path) -> Repository:
    made = server.repositories["owner/name"] = Repository()
    made.commit(files(model, tmp_path / "saved"))
    return made


def assert_same(model: UNet, other: UNet) -> None:
    assert model.config == other.config
    assert model.preprocessing == other.preprocessing
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def models_in(cache: Path) -> list[Path]:
    """Weights and configs that a later run would find."""
    return [path for path in cache.rglob("*") if path.name in (WEIGHTS, CONFIG) and "snapshots" in path.parts]


# --- names


@pytest.mark.parametrize("name", ["owner/name", "o/n", "Some-one_1/cars.v2", "1/2"])
def test_repositories_by_their_form(name):
    assert hub.is_repository(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "/name",
        "owner/",
        "./name",
        "../name",
        "~/name",
        "a/b/c",
        "a/..",
        "../..",
        "a/b..c",
        "a//b",
        "a\\b",
        "C:/b",
        "a/b\n",
        "a/-b",
        "-a/b",
        "a /b",
        "a/b?c",
        "a/b#c",
        "a/%2e%2e",
        "ä/b",
        "a/b:c",
        "a/b@main",
        "a/b.pth",
        "a/b.safetensors",
        "/etc/passwd",
        "a/\x00",
    ],
)
def test_what_is_no_repository(name, cache):
    assert not hub.is_repository(name)
    with pytest.raises(ValueError, match="expected a repository 'owner/name'"):
        hub.fetch(name, (WEIGHTS,), cache_dir=cache)


@pytest.mark.parametrize(
    "revision", ["", "..", "../x", "a/../../b", "/etc/passwd", "a//b", "-x", "a b", "a\n", "refs/", "x\x00"]
)
def test_a_revision_cannot_leave_the_cache(server, repository, cache, revision):
    with pytest.raises(ValueError, match="revision must be a branch, a tag or a commit, such as 'main', got"):
        UNet.from_pretrained("owner/name", revision=revision, cache_dir=cache)
    assert server.requests == []


# --- downloads


def test_a_fresh_download_then_the_cache(server, repository, cache, model):
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))
    assert [request for request in server.requests if request.startswith("GET /owner")] == [
        f"GET /owner/name/resolve/{repository.branches['main']}/config.json"
    ]
    server.requests.clear()
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))
    assert server.requests == ["HEAD /owner/name/resolve/main/model.safetensors"]  # where does main point?


def test_what_a_broken_off_download_left_out_is_fetched(server, repository, cache, model):
    hub.fetch("owner/name", (WEIGHTS,), cache_dir=cache)
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        UNet.from_pretrained("owner/name", local_files_only=True, cache_dir=cache)
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))


def test_cached_weights_are_not_hashed_each_time(server, repository, cache, model, monkeypatch):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    monkeypatch.setattr(hub, "_hashes", lambda *_: pytest.fail("hashes take as long as reading the file"))
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))


def test_files_in_folders_of_a_repository_lie_in_the_folder_of_its_commit(server, repository, cache):
    commit = repository.commit({"deep/er/a.txt": b"a", "b.txt": b"b"})
    for revision in (None, None, commit):
        folder = hub.fetch("owner/name", ("deep/er/a.txt", "b.txt"), revision=revision, cache_dir=cache)
        assert (folder.name, (folder / "deep/er/a.txt").read_text(), (folder / "b.txt").read_text()) == (commit, "a", "b")
    assert sum(request.startswith("GET /owner") for request in server.requests) == 2  # each file once
    assert hub.fetch("owner/name", ("deep/er/a.txt",), local_files_only=True, cache_dir=cache) == folder


def test_a_pinned_revision_that_is_cached_makes_no_call(server, repository, cache, model, tmp_path):
    first = repository.branches["main"]
    repository.commit(files(UNet(features=(5,)), tmp_path / "other"))
    assert_same(model, UNet.from_pretrained("owner/name", revision=first, cache_dir=cache))
    server.requests.clear()
    assert_same(model, UNet.from_pretrained("owner/name", revision=first, cache_dir=cache))
    assert server.requests == []
    assert UNet.from_pretrained("owner/name", cache_dir=cache).config.features == (5,)


def test_branches_and_pull_requests_are_revisions(server, repository, cache, tmp_path):
    repository.commit(files(UNet(features=(5,)), tmp_path / "other"), branch="refs/pr/1")
    for options in ({}, {"local_files_only": True}):
        assert UNet.from_pretrained("owner/name", revision="refs/pr/1", cache_dir=cache, **options).config.features == (5,)
    assert UNet.from_pretrained("owner/name", cache_dir=cache).config.features == (4, 8)


def test_local_files_only_asks_nobody(server, repository, cache, model):
    with pytest.raises(FileNotFoundError, match="'owner/name' at 'main' is not in the cache, and local_files_only=True asks"):
        UNet.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)
    assert server.requests == []
    UNet.from_pretrained("owner/name", cache_dir=cache)
    server.requests.clear()
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache, local_files_only=True))
    assert server.requests == []
    with pytest.raises(ValueError, match="force_download=True needs the network that local_files_only=True forbids"):
        UNet.from_pretrained("owner/name", cache_dir=cache, local_files_only=True, force_download=True)


def test_force_download_replaces_what_the_cache_has(server, repository, cache, model):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    for path in models_in(cache):
        path.resolve().write_bytes(b"spoilt")
    server.requests.clear()
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache, force_download=True))
    assert sum(request.startswith("GET") for request in server.requests) == 2


def test_a_branch_that_moves_is_followed_and_its_files_are_of_one_commit(server, repository, cache, model, tmp_path):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    new = files(UNet(features=(5,)), tmp_path / "new")

    def move(handler):  # while the weights are fetched, the branch moves on
        repository.commit({CONFIG: b"{}"})
        return True

    repository.commit(new)
    server.faults["GET /storage"] = [move]
    assert UNet.from_pretrained("owner/name", cache_dir=cache).config.features == (5,)
    assert server.faults == {"GET /storage": []}


def test_a_private_repository_opens_to_its_token(server, repository, cache, model):
    repository.private = True
    with pytest.raises(
        FileNotFoundError, match=r"there is no 'owner/name' .* or it is private: .* `hf auth login` or pass token="
    ):
        UNet.from_pretrained("owner/name", cache_dir=cache)
    with pytest.raises(PermissionError, match="refuses 'owner/name' with status 401: check the token"):
        UNet.from_pretrained("owner/name", cache_dir=cache, token="hf_wrong")
    assert models_in(cache) == []
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache, token=TOKEN))


# --- faults: one clear error each, and nothing half-written


def make_gated(server, repository):
    repository.gated = True


def fail(pattern, *answers):
    return lambda server, repository: server.faults.update({pattern: list(answers)})


FAULTS = {
    "no such repository": (
        "owner/other",
        None,
        lambda *_: None,
        FileNotFoundError,
        r"there is no 'owner/other' on the Hugging",
    ),
    "no such revision": ("owner/name", "v9", lambda *_: None, FileNotFoundError, "has no revision 'v9': expected a branch"),
    "no weights": ("owner/text", None, lambda *_: None, FileNotFoundError, r"has no model\.safetensors at 'main', so it is no"),
    "gated": ("owner/name", None, make_gated, PermissionError, "is gated: accept its terms on its page, then log in"),
    "401": ("owner/name", None, fail("resolve", status(401)), PermissionError, "refuses 'owner/name' with status 401"),
    "403": ("owner/name", None, fail("resolve", status(403)), PermissionError, "refuses 'owner/name' with status 403"),
    "500 for ever": (
        "owner/name",
        None,
        fail("resolve", *[status(500)] * 99),
        OSError,
        "answers 500 for 'owner/name': try again",
    ),
    "no commit": ("owner/name", None, fail("HEAD", status(200)), OSError, "names no commit; is it a Hugging Face Hub"),
    "truncated body": ("owner/name", None, fail("GET /storage", *[hub_server.truncated] * 9), OSError, "not be brought whole"),
    "wrong hash": (
        "owner/name",
        None,
        fail("GET /storage", hub_server.altered),
        OSError,
        "with another hash than the Hub gave",
    ),
    "gone in mid-file": ("owner/name", None, fail("GET /storage", hub_server.gone), ConnectionError, "cannot be reached for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_clear_error_and_leaves_no_model(server, repository, cache, fault):
    name, revision, break_it, kind, message = FAULTS[fault]
    server.repositories["owner/text"] = Repository()
    server.repositories["owner/text"].commit({CARD: b"# text"})
    break_it(server, repository)
    with pytest.raises(kind, match=message) as error:
        UNet.from_pretrained(name, revision=revision, cache_dir=cache)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert f"Without a network there are the zoo ({', '.join(list_pretrained())})" in str(error.value)
    assert [path for path in models_in(cache) if path.name == WEIGHTS] == []
    blobs = [path for path in cache.rglob("blobs/*") if path.suffix != ".incomplete"]  # older clients go on from there
    assert [path for path in blobs if path.stat().st_size > 1000] == []
    with pytest.raises(FileNotFoundError, match="is not in the cache"):
        UNet.from_pretrained(name, revision=revision, cache_dir=cache, local_files_only=True)


@pytest.mark.parametrize(
    ("pattern", "answers"),
    [("HEAD", [status(500), status(503)]), ("GET /storage", [status(500)]), ("GET /owner", [status(502)])],
)
def test_500_then_success(server, repository, cache, model, pattern, answers, monkeypatch):
    server.faults[pattern], waits = [*answers], []
    monkeypatch.setattr(time, "sleep", waits.append)
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))
    assert server.faults == {pattern: []}  # all of them have happened
    assert waits == [0.5, 2.0][: len(answers)]


@pytest.mark.parametrize("etag", [hub_server.git_hash, lambda data: hashlib.sha1(data).hexdigest(), lambda data: "1" * 32])
def test_configs_hashed_as_git_or_a_mirror_does(server, repository, cache, model, monkeypatch, etag):
    monkeypatch.setattr(hub_server, "git_hash", etag)
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))


def test_a_config_with_a_wrong_hash_is_thrown_away(server, repository, cache, monkeypatch):
    monkeypatch.setattr(hub_server, "git_hash", lambda data: "1" * 40)
    with pytest.raises(OSError, match=r"config\.json of 'owner/name' arrived with another hash"):
        UNet.from_pretrained("owner/name", cache_dir=cache)
    assert [path.name for path in models_in(cache)] == [WEIGHTS]


@pytest.mark.parametrize("fault", ["500 for ever", "wrong hash", "truncated body", "gone in mid-file"])
def test_a_failed_update_leaves_the_old_model(server, repository, cache, model, tmp_path, fault, caplog):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    repository.commit(files(randomize(UNet(features=(4, 8)), seed=3), tmp_path / "new"))
    FAULTS[fault][2](server, repository)
    if fault == "500 for ever":  # the Hub does not even say that there is something new
        assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))
        assert "answers 500 for 'owner/name'" in caplog.text
        assert f"taking commit {next(iter(repository.commits))[:8]} from the cache" in caplog.text
    else:
        with pytest.raises(OSError, match="'owner/name'"):
            UNet.from_pretrained("owner/name", cache_dir=cache)
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache, local_files_only=True))


@pytest.mark.skipif(huggingface_hub.__version__.startswith("0."), reason="huggingface_hub before 1.0 does not go on by itself")
def test_a_body_that_breaks_off_is_taken_up_again(server, repository, cache, model):
    def break_off(handler):
        data = handler.server.objects[handler.path.rpartition("/")[2]]
        handler.close_connection = True
        handler.answer(200, data[:1000], length=len(data))

    server.faults["GET /storage"] = [break_off]
    assert_same(model, UNet.from_pretrained("owner/name", cache_dir=cache))
    assert server.faults == {"GET /storage": []}


# --- no Hub


@pytest.fixture
def unreachable(monkeypatch) -> list[str]:
    """An address where nobody listens; the connections tried."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        take_for_the_hub(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
    tried: list[str] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: (tried.append("x"), connect(self, address))[1])
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it would wait {seconds} s"))
    return tried


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_without_network_an_unknown_repository_fails_at_the_first_connection(unreachable, cache, revision):
    with pytest.raises(
        ConnectionError, match=r"cannot be reached for 'owner/name' .* the zoo \(carvana, .*\), what the cache has"
    ):
        UNet.from_pretrained("owner/name", revision=revision, cache_dir=cache)
    assert len(unreachable) == 1


def test_without_network_the_cache_serves(unreachable, cache, tmp_path, caplog):
    root, commit = cache / "models--owner--name", "a" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    UNet(features=(5,)).save_pretrained(root / "snapshots" / commit)
    assert UNet.from_pretrained("owner/name", cache_dir=cache).config.features == (5,)
    assert "taking commit aaaaaaaa from the cache" in caplog.text
    assert UNet.from_pretrained("owner/name", revision=commit, cache_dir=cache).config.features == (5,)
    assert len(unreachable) == 1
    with pytest.raises(ConnectionError):
        UNet.from_pretrained("owner/name", cache_dir=cache, force_download=True)
    (root / "refs" / "main").write_text("../../outside")
    with pytest.raises(ConnectionError):
        UNet.from_pretrained("owner/name", cache_dir=cache)


def test_without_network_info_comes_from_the_cache_too(unreachable, cache):
    root, commit = cache / "models--owner--name", "a" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    UNet(features=(5,)).save_pretrained(root / "snapshots" / commit)
    (root / "snapshots" / commit / CARD).unlink()
    info = model_info("owner/name", cache_dir=cache)
    assert (info.config.features, info.card) == ((5,), {})


def test_the_home_of_a_user_who_is_not_here_is_no_cache(unreachable):
    with pytest.raises(FileNotFoundError, match="'~nobody-of-that-name' names the home folder of a user who is not here"):
        UNet.from_pretrained("owner/name", cache_dir="~nobody-of-that-name")
    assert not unreachable


def test_the_cache_is_for_all_who_may_read_it_and_is_not_written_for_nothing(server, repository, cache, model):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    ref = cache / "models--owner--name" / "refs" / "main"
    assert stat.S_IMODE(ref.stat().st_mode) == 0o666 & ~umask()
    before = ref.stat().st_ino
    assert_same(UNet.from_pretrained("owner/name", cache_dir=cache), model)
    assert ref.stat().st_ino == before  # as it must be where the cache cannot be written
    assert [path.name for path in ref.parent.iterdir()] == ["main"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_of_that_name_is_pointed_to_and_never_taken(unreachable, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UNet(features=(5,)).save_pretrained("runs/best")
    with pytest.raises(ConnectionError, match=r"A folder of that name lies here: type '\./runs/best' for it"):
        UNet.from_pretrained("runs/best", cache_dir=cache)


# --- model_info


def test_what_was_closed_is_not_taken_from_the_cache(server, repository, cache):
    UNet.from_pretrained("owner/name", cache_dir=cache)
    for change, error in (("private", FileNotFoundError), ("gated", PermissionError)):
        repository.private, repository.gated = change == "private", change == "gated"
        with pytest.raises(error, match="'owner/name'"):
            UNet.from_pretrained("owner/name", cache_dir=cache)


def test_info_fetches_no_tensor(server, repository, cache, model, tmp_path):
    info = model_info("owner/name", cache_dir=cache)
    assert info == model_info(tmp_path / "saved").__class__(**{**vars(model_info(tmp_path / "saved")), "name": "owner/name"})
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.card["library_name"] == "unetlib"
    assert not list(cache.rglob(WEIGHTS))
    with pytest.raises(FileNotFoundError, match="not in the cache"):  # so main must not point there yet
        UNet.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)
    UNet.from_pretrained("owner/name", cache_dir=cache)
    server.requests.clear()
    assert model_info("owner/name", cache_dir=cache, local_files_only=True) == info
    assert server.requests == []


def test_info_of_a_revision(server, repository, cache, tmp_path):
    first = repository.branches["main"]
    repository.commit(files(UNet(features=(5,)), tmp_path / "other"))
    assert model_info("owner/name", revision=first, cache_dir=cache).config.features == (4, 8)
    assert model_info("owner/name", cache_dir=cache).config.features == (5,)


def test_info_of_a_private_repository_wants_its_token(server, repository, cache):
    repository.private = True
    assert model_info("owner/name", cache_dir=cache, token=TOKEN).config.features == (4, 8)
    with pytest.raises(FileNotFoundError, match="or it is private"):
        model_info("owner/name", cache_dir=cache)


def test_info_of_a_repository_without_card(server, repository, cache):
    del repository.commits[repository.branches["main"]][CARD]
    assert model_info("owner/name", cache_dir=cache).card == {}


@pytest.mark.parametrize("weights", [b"", b"rubbish" * 100, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_info_of_a_damaged_file_on_the_hub(server, repository, cache, weights):
    repository.commit({WEIGHTS: weights})
    with pytest.raises(ValueError, match="owner/name"):
        model_info("owner/name", cache_dir=cache)


@pytest.mark.parametrize(("metadata", "error"), [(None, None), ([1], "metadata is a list")])
def test_info_of_strange_metadata_on_the_hub(server, repository, cache, model, tmp_path, metadata, error):
    made = files(model, tmp_path / "odd")
    length = int.from_bytes(made[WEIGHTS][:8], "little")
    header = json.dumps({**json.loads(made[WEIGHTS][8 : 8 + length]), "__metadata__": metadata}).encode()
    repository.commit({**made, WEIGHTS: len(header).to_bytes(8, "little") + header + made[WEIGHTS][8 + length :]})
    with nullcontext() if error is None else pytest.raises(ValueError, match=error):
        assert model_info("owner/name", cache_dir=cache).config == model.config


# --- uploads


def test_push_makes_a_repository_that_loads_again(server, cache, model):
    address = model.push_to_hub("owner/new", token=TOKEN, private=True, commit_message="First")
    made = server.repositories["owner/new"]
    assert address == f"{server.url}/owner/new/commit/{made.branches['main']}"
    assert made.private
    assert made.messages[-1] == "First"
    content = made.commits[made.branches["main"]]
    assert set(content) == {".gitattributes", CARD, CONFIG, WEIGHTS}
    card = content[CARD].decode()
    assert 'UNet.from_pretrained("owner/new")' in card
    for part in (
        "library_name: unetlib\n",
        "# new\n",
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        "road, car",
    ):
        assert part in card
    assert_same(model, UNet.from_pretrained("owner/new", token=TOKEN, cache_dir=cache))


def test_push_keeps_a_card_that_is_there_unless_another_is_given(server, repository, model):
    repository.commit({CARD: b"mine"})
    model.push_to_hub("owner/name", token=TOKEN)
    assert repository.commits[repository.branches["main"]][CARD] == b"mine"
    model.push_to_hub("owner/name", token=TOKEN, card="another")
    assert repository.commits[repository.branches["main"]][CARD] == b"another"


def test_push_as_pull_request(server, repository, cache, tmp_path):
    before = repository.branches["main"]
    address = UNet(features=(5,)).push_to_hub("owner/name", token=TOKEN, create_pr=True, dtype=torch.float16)
    assert address == f"{server.url}/owner/name/discussions/1"
    assert repository.branches["main"] == before
    assert UNet.from_pretrained("owner/name", revision="refs/pr/1", cache_dir=cache).config.features == (5,)


def test_push_goes_to_the_branch_that_is_named(server, repository, model):
    before = repository.branches["dev"] = repository.branches["main"]
    model.push_to_hub("owner/name", token=TOKEN, revision="dev")
    assert repository.branches["main"] == before
    assert repository.branches["dev"] != before


def test_push_is_one_commit(server, repository, model):
    model.push_to_hub("owner/name", token=TOKEN)
    assert len(repository.commits) == 2


@pytest.mark.parametrize(
    ("options", "fault", "kind", "message"),
    [
        ({"token": None}, {}, PermissionError, "refuses 'owner/name' with status 401"),
        ({"token": TOKEN}, {"/commit/": [status(403)]}, PermissionError, "refuses 'owner/name' with status 403"),
        ({"token": TOKEN}, {"/commit/": [status(500)]}, OSError, "answers 500 for 'owner/name'"),
        ({"token": TOKEN}, {"PUT": [status(400)]}, OSError, "'owner/name'"),
    ],
)
def test_a_push_that_fails_commits_nothing(server, repository, model, options, fault, kind, message):
    server.faults.update(fault)
    before = dict(repository.branches)
    with pytest.raises(kind, match=message) as error:
        model.push_to_hub("owner/name", **options)
    assert type(error.value) is kind
    assert repository.branches == before


def test_push_refuses_an_unknown_option(server, model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pretrained.push_to_hub(model, "owner/new", token=TOKEN, colour="red")
    assert server.requests == []


def test_push_has_a_title_of_its_own(server, tmp_path, model):
    hub.push(model.save_pretrained(tmp_path / "saved"), "owner/new", token=TOKEN)
    assert server.repositories["owner/new"].messages[-1] == "Upload a U-Net with unetlib"


@pytest.mark.parametrize("name", ["name", "../x", "a/b/c", "./owner/name", ""])
def test_push_wants_owner_and_name(server, model, name):
    with pytest.raises(ValueError, match="expected a repository 'owner/name'"):
        model.push_to_hub(name, token=TOKEN)
    assert server.requests == []


# --- models saved by huggingface_hub's mixin


def test_a_network_of_the_study_that_the_mixin_saved(server, cache, tmp_path):
    class Mixed(StudyUNet, huggingface_hub.PyTorchModelHubMixin):
        def __init__(self, in_channels: int = 3, out_channels: int = 1, features: tuple[int, ...] = (4, 8)) -> None:
            super().__init__(in_channels, out_channels, features)

    mixed = randomize(Mixed(in_channels=2, features=(3, 6)))
    mixed.save_pretrained(tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / CONFIG).read_text())["in_channels"] == 2
    server.repositories["owner/mixed"] = Repository()
    server.repositories["owner/mixed"].commit({path.name: path.read_bytes() for path in (tmp_path / "mixed").iterdir()})
    x = torch.randn(1, 2, 17, 22)
    for name in (tmp_path / "mixed", "owner/mixed"):
        assert torch.equal(UNet.from_pretrained(name, cache_dir=cache)(x), mixed.eval()(x))


def test_a_unet_that_the_mixin_saved(tmp_path):
    class Mixed(huggingface_hub.PyTorchModelHubMixin, UNet):
        def __init__(self, features: tuple[int, ...] = (4, 8), activation: str = "relu", comment: str = "") -> None:
            super().__init__(features=features, activation=activation)

    mixed = randomize(Mixed(features=(4, 6), activation="silu", comment="mine"))
    mixed.save_pretrained(tmp_path / "mixed")
    model = UNet.from_pretrained(tmp_path / "mixed")
    assert model.config == mixed.config
    x = torch.randn(1, 3, 17, 22)
    assert torch.equal(model(x), mixed.eval()(x))


def test_the_mixins_loader_reads_our_folder(tmp_path, model):
    """File names are the mixin's: a class of one's own reads our weights."""

    class Mixed(huggingface_hub.PyTorchModelHubMixin, UNet):
        def __init__(self, features: tuple[int, ...]) -> None:
            super().__init__(features=features)

    loaded = Mixed.from_pretrained(str(model.save_pretrained(tmp_path / "ours")), features=(4, 8), strict=True)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


# --- as users run it


def test_a_process_with_hf_endpoint(server, repository, cache, model):
    """One process as a user starts it: download, cache, pinned revision, and after the server is gone."""
    script = f"""
        from unetlib import UNet, hub
        hub.RETRIES = ()
        first = UNet.from_pretrained("owner/name")
        again = UNet.from_pretrained("owner/name", revision={repository.branches["main"]!r}, local_files_only=True)
        print(first.config == again.config, first.preprocessing.size)
        try:
            UNet.from_pretrained("owner/none")
        except FileNotFoundError as error:
            print(error)
        print(UNet(features=(3,)).push_to_hub("owner/pushed", token={TOKEN!r}))
        print(UNet.from_pretrained("owner/pushed").config.features)
    """
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "True (32, 48)"
    assert lines[1].startswith("there is no 'owner/none' on the Hugging Face Hub, or it is private")
    assert lines[2].startswith(f"{server.url}/owner/pushed/commit/")
    assert lines[3] == "(3,)"
    assert (cache / "hub" / "models--owner--name" / "refs" / "main").read_text() == repository.branches["main"]
