from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys

import pytest

from unetlib.console import add_tta, as_json, print_any_letter, printable


@pytest.mark.parametrize(
    ("words", "tta"), [([], False), (["--tta", "mirror"], "mirror"), (["--tta", "all"], True), (["--tta"], True)]
)
def test_tta_is_as_predict_takes_it(words, tta):
    parser = argparse.ArgumentParser()
    add_tta(parser)
    assert parser.parse_args(words).tta is tta


def test_another_tta_is_refused(capsys):
    parser = argparse.ArgumentParser()
    add_tta(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--tta", "flip"])
    assert "invalid choice: 'flip'" in capsys.readouterr().err


def test_letters_that_the_encoding_lacks_are_escapes(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    print_any_letter()
    print("é\u8f66\udc80", end="", flush=True)
    assert out.buffer.getvalue() == b"\xe9\\u8f66\\udc80"


def test_what_takes_all_letters_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_any_letter()


def test_a_name_that_is_no_text_becomes_one():
    name = os.fsdecode(b"caf\xe9-\xc3\xa9")
    assert printable(name) == "caf\\udce9-é"
    assert printable("車 é") == "車 é"


def test_what_is_no_number_is_null():
    scores = {"dice": [0.5, math.nan, {"empty": math.nan}], "name": "nan"}
    assert json.loads(as_json(scores, indent=2)) == {"dice": [0.5, None, {"empty": None}], "name": "nan"}
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json(math.inf, indent=0)
