"""Malformed records, each with the reason to skip it; empty if it is used."""

from llm.artifact import Json

NASTY = {
    b'{"text": "good", "more": 1}': "",
    b'{"text": "nul \\u0000 stays"}': "",
    b'{"text": "nul \x00 raw"}': "malformed JSON",
    b'{"text": "\xff\xfe"}': "",
    b'{"text": "half \\ud800 a pair"}': "",
    b'{"text": "a pair \\ud83d\\ude00"}': "",
    b'{"text": "no end \xe2\x80\xa8 of a line"}': "",
    b'{"text": ""}': "empty",
    b'{"text": " \\n\\t "}': "empty",
    b"   ": "empty",
    b'{"text": 3}': "wrong type",
    b'{"text": null}': "wrong type",
    b'{"text": ["x"]}': "wrong type",
    b'{"txet": "x"}': "missing key",
    b'["text"]': "not an object",
    b'"text"': "not an object",
    b"null": "not an object",
    b"{'text': 'python'}": "malformed JSON",
    b"[" * 100_000 + b"]" * 100_000: "malformed JSON",
    b'{"text": "x", "n": ' + b"9" * 6000 + b"}": "malformed JSON",
    b'{"text": "good", "more": 2}': "duplicate",
}
NOT_CLOSED = {b'{"text": "cut': "malformed JSON", b"[" * 100_000: "malformed JSON"}
"""Lines that would swallow the remainder of an array."""

CHATS: dict[str, tuple[Json, str]] = {
    "messages": ({"messages": [{"role": "user", "content": "q"},
                               {"role": "assistant", "content": "a"}]}, ""),
    "alpaca": ({"instruction": "Do.", "input": "this", "output": "Done."}, ""),
    "no input": ({"instruction": "Do it.", "output": "Done."}, ""),
    "empty input": ({"instruction": "Do that.", "input": "", "output": "Done."}, ""),
    "no output": ({"instruction": "Do."}, "missing key"),
    "no keys": ({"text": "x"}, "missing key"),
    "number": ({"instruction": "Do.", "output": 3}, "wrong type"),
    "null input": ({"instruction": "Do.", "input": None, "output": "x"}, "wrong type"),
    "blank output": ({"instruction": "Do.", "output": " \n"}, "empty answer"),
    "no list": ({"messages": "x"}, "wrong type"),
    "no objects": ({"messages": ["x"]}, "wrong type"),
    "no content": ({"messages": [{"role": "user"}]}, "missing key"),
    "parts": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "wrong type"),
    "no messages": ({"messages": []}, "no assistant message"),
    "no answer": ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message"),
    "role": ({"messages": [{"role": "tool", "content": "q"}]}, "unknown role"),
    "kind": ({"instruction": "Do.", "output": "x", "kind": 3}, "wrong type"),
    "group": ({"instruction": "Do.", "output": "x", "group": 3}, "wrong type"),
}  # fmt: skip
