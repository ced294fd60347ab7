from __future__ import annotations

import pytest

from unetlib.files import whole_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole_and_replaces_the_one_before(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("after")
        assert (partial.name[0], partial.suffix, partial.parent) == (".", ".txt", tmp_path)
        assert (tmp_path / "a.txt").read_text() == "before"
    assert (tmp_path / "a.txt").read_text() == "after"
    assert names(tmp_path) == ["a.txt"]


def write_half(path, error):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_there_is_what_was_there(tmp_path, error):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(error):
        write_half(tmp_path / "a.txt", error)
    assert (tmp_path / "a.txt").read_text() == "before"
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a.txt") as one, whole_file(tmp_path / "a.txt") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"  # the last to be whole
    assert names(tmp_path) == ["a.txt"]
