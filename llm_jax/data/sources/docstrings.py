"""Real text that every machine has, docstrings: of Python's standard library with labels, by area, or of the packages
that this one stands on too, without.

The areas follow the chapters of the library's reference. A record is one docstring; it is held out by its top-level
module, so that no text of a module is seen on both sides of the validation split (of a package: of a file).
"""

import ast
import re
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator

from llm_jax.data.sources.builtin import module_group
from llm_jax.data.sources.documents import Document, InputFile
from llm_jax.data.sources.streams import reading

SHORTEST = 40  # characters; below, a docstring says too little to tell where it stands

AREAS = {
    "concurrency": "asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess threading",
    "data": "abc array bisect calendar collections copy copyreg dataclasses datetime _pydatetime decimal _pydecimal "
    "difflib enum fractions functools heapq numbers operator pprint random re reprlib statistics string textwrap "
    "types typing weakref _weakrefset zoneinfo graphlib colorsys",
    "development": "ast bdb cProfile code codeop compileall dis distutils doctest ensurepip imp importlib inspect "
    "lib2to3 modulefinder opcode pdb pkgutil profile pstats py_compile pyclbr pydoc runpy site symtable "
    "sysconfig tabnanny timeit tokenize trace traceback tracemalloc unittest venv warnings zipapp",
    "files": "bz2 configparser csv dbm filecmp fileinput fnmatch genericpath glob gzip io _pyio json linecache lzma "
    "ntpath os pathlib pickle pickletools plistlib posixpath shelve shlex shutil sqlite3 stat tarfile tempfile tomllib "
    "xml zipfile zipimport _compression",
    "interface": "argparse cmd curses getopt getpass gettext idlelib locale logging optparse readline tkinter turtle "
    "turtledemo _pyrepl",
    "network": "asynchat asyncore base64 binhex cgi cgitb email ftplib hashlib hmac html http imaplib ipaddress "
    "mailbox mailcap mimetypes netrc nntplib poplib quopri secrets smtpd smtplib socket socketserver ssl telnetlib "
    "urllib uu uuid webbrowser wsgiref xmlrpc",
}
AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}


def docstrings(file: InputFile) -> Iterator[tuple[str, str]]:
    """(name, text) of the docstrings of a source file, in its order; none where it does not parse here."""
    with reading(file.path), open(file.path, "rb") as stream:
        raw = stream.read()
    try:
        with warnings.catch_warnings():  # of escapes that a later Python will not take
            warnings.simplefilter("ignore")
            tree = ast.parse(raw)
    except (SyntaxError, ValueError):
        return
    for node in statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node) or ""
            if text.isascii() and "\0" not in text and len(text) >= SHORTEST:  # a few test other encodings
                yield getattr(node, "name", ""), text


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements in the order of `ast.walk`, without the expressions that this one walks too."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        yield (node := waiting.popleft())
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))


def read_records(file: InputFile) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, {"text", "label", "module", "name"}) of the docstrings of an area's module."""
    area = AREA_OF.get(module_group(file.name))
    if area is None:
        return
    for number, (name, text) in enumerate(docstrings(file), 1):
        yield number, {"text": text, "label": area, "module": file.name, "name": name}


def read_documents(file: InputFile, start: int) -> Iterator[tuple[int, Document]]:
    """All docstrings of a module as one document, a sentence a line."""
    if start < 1 and (lines := [line for _, text in docstrings(file) for line in sentences(text)]):
        yield 1, Document(file.path, module_group(file.name), text="\n".join(lines) + "\n")


def sentences(text: str) -> list[str]:
    """The sentences of a docstring, each on one line; examples and tables stay lines of their own."""
    found = []
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = [line.strip() for line in paragraph.splitlines()]
        prose = not any(line.startswith((">>>", "...", "-", "*", "|", "=")) for line in lines)
        for piece in [" ".join(lines)] if prose else lines:
            found += re.split(r"(?<=[.!?]) +(?=[A-Z])", piece)
    return [line for line in found if line]
