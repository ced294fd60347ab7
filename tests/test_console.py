from __future__ import annotations

import io
import os
import sys

from unetlib.console import print_any_letter, printable


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
