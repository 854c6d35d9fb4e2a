"""First chats, made of what documented Python says of itself."""

from __future__ import annotations

from ziphius.alignment.chats import dialogues, docstring_chats
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


def test_a_dialogue_is_whole_records_one_after_another() -> None:
    records = [
        {"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]}
        for n in range(5)
    ]
    made = dialogues(records, 40, seed=1)
    assert {len(record["messages"]) for record in made} == {4, 6}
    for record in made:
        turns = record["messages"]
        pairs = [{"messages": turns[at : at + 2]} for at in range(0, len(turns), 2)]
        assert all(pair in records for pair in pairs)
        assert len({turn["content"] for turn in turns}) == len(turns)  # no record twice
    assert made == dialogues(records, 40, seed=1) != dialogues(records, 40, seed=2)


def test_too_few_records_make_no_dialogue() -> None:
    assert dialogues([{"messages": []}] * 2, 40, seed=1) == []
