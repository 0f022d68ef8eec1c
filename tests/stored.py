"""Documents to prepare stores from, and what is in a folder: shared by the tests of stores."""

import hashlib
import json
import pathlib


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def content(folder):
    """Every file of a folder with its hash."""
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


MANY = [f"document {i} " + "word " * (i % 7) for i in range(200)]
