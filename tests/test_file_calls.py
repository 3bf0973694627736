"""Every file call of the engine goes through `FileOps`, where faults can be injected."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shardckpt.storage.fileops

_PACKAGE = Path(shardckpt.storage.fileops.__file__).parents[1]
# fileops is the one table; pure and native are what it calls; the command line writes its own
# output; testing serves tests; convert/files commits others' formats by others' protocols.
_EXEMPT = (
    "storage/fileops.py", "pure.py", "native.py", "cli/", "convert/files.py", "testing/",
    "__main__.py",
)  # fmt: skip
_MODULES = {
    "aiofiles", "fcntl", "fileinput", "glob", "linecache", "shutil", "tempfile", "zipfile",
}  # fmt: skip
_OS = {
    "access", "chmod", "chown", "close", "copy_file_range", "creat", "dup", "dup2", "fdatasync",
    "fdopen", "fstat", "fsync", "ftruncate", "fwalk", "lchown", "link", "listdir", "lseek", "lstat",
    "makedirs", "mkdir", "mkfifo", "mknod", "open", "posix_fadvise", "posix_fallocate", "pread",
    "preadv", "pwrite", "pwritev", "read", "readlink", "readv", "remove", "removedirs", "rename",
    "renames", "replace", "rmdir", "scandir", "sendfile", "stat", "statvfs", "symlink", "sync",
    "truncate", "unlink", "utime", "walk", "write", "writev",
}  # fmt: skip
_OS_PATH = {
    "exists", "getatime", "getctime", "getmtime", "getsize", "isdir", "isfile", "islink", "ismount",
    "lexists", "realpath", "samefile", "sameopenfile",
}  # fmt: skip
_PATH_METHODS = {
    "exists", "glob", "hardlink_to", "is_dir", "is_file", "is_symlink", "iterdir", "read_bytes",
    "read_text", "rglob", "symlink_to", "touch", "write_bytes", "write_text",
}  # fmt: skip


def _file_calls(source: str) -> list[str]:
    """Return what in `source` touches the file system past the table, as line: expression."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="open")):
                found.append(node)
            case ast.Attribute(value=ast.Name(id="io"), attr="open" | "open_code" | "FileIO"):
                found.append(node)
            case ast.ImportFrom(module="io"):
                found.append(node)
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in _OS:
                found.append(node)
            case ast.Attribute(value=ast.Attribute(attr="path"), attr=name) if name in _OS_PATH:
                found.append(node)
            case ast.Call(func=ast.Attribute(attr=name)) if name in _PATH_METHODS:
                found.append(node)
            case ast.Import(names=names) if _MODULES & {name.name for name in names}:
                found.append(node)
            case ast.ImportFrom(module=module, names=names):
                names_of_os = {name.name for name in names} & (_OS | _OS_PATH)
                if module in _MODULES or (module in {"os", "os.path"} and names_of_os):
                    found.append(node)
            case _:
                pass
    return [f"{node.lineno}: {ast.unparse(node)}" for node in found]


def test_no_file_call_passes_the_table_by() -> None:
    offenders = [
        f"{name}:{call}"
        for path in sorted(_PACKAGE.rglob("*.py"))
        if not (name := path.relative_to(_PACKAGE).as_posix()).startswith(_EXEMPT)
        for call in _file_calls(path.read_text())
    ]
    assert offenders == []


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "import os\nos.open('x', 0)",
        "import os\nf = os.rename",
        "from os import unlink",
        "import os\nos.path.exists('x')",
        "from os.path import isdir",
        "import shutil",
        "from tempfile import mkdtemp",
        "from pathlib import Path\nPath('x').read_text()",
        "def f(p):\n    p.write_bytes(b'')",
    ],
)
def test_the_search_finds_every_kind_of_call(source: str) -> None:
    assert _file_calls(source) != []


def test_the_search_lets_the_table_and_pure_names_pass() -> None:
    assert _file_calls("ops.open('x', 0, dir_fd=1)\nops.unlink('x')\nos.path.join('a', 'b')") == []
