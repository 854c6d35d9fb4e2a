"""First chats, made of what documented Python says of itself."""

from __future__ import annotations

from ziphius.alignment.chats import docstring_chats
from ziphius.data.documents import Document

MODULE = '''
def open(path):
    """Open a file.

    More is said here.
    """

class Reader:
    """Reads lines."""

    def inner(self):
        """Is no definition of the module."""

def _hidden():
    """Is nobody's business."""

def silent():
    return 1

def long():
    """{long}"""
'''


def documents() -> list[Document]:
    text = MODULE.replace("{long}", "word " * 60)
    return [Document("pkg/io.py", text), Document("broken.py", "def (:"), Document("null.py", "\0")]


def test_public_definitions_are_asked_for_and_answered_by_their_first_line() -> None:
    records = docstring_chats(documents(), 10, seed=0)
    told = {r["messages"][1]["content"]: r["messages"][0]["content"] for r in records}
    assert told.keys() == {"Open a file.", "Reads lines."}
    assert "open" in told["Open a file."]
    assert "Reader" in told["Reads lines."]
    assert all("pkg.io" in question for question in told.values())
    assert [m["role"] for m in records[0]["messages"]] == ["user", "assistant"]


def test_a_seed_draws_as_many_as_are_wanted() -> None:
    assert len(docstring_chats(documents(), 1, seed=3)) == 1
    assert docstring_chats(documents(), 9, seed=3) == docstring_chats(documents(), 9, seed=3)
    assert docstring_chats([], 9, seed=3) == []
