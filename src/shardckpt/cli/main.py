"""Arguments, exit codes and dispatch of the command line.

Layer: cli. Imports neither torch nor jax. Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4
corrupt.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Final

from shardckpt import __version__
from shardckpt.cli.commands import (
    Report,
    convert_steps,
    inspect_step,
    list_steps,
    verify_steps,
)
from shardckpt.errors import (
    CorruptCheckpointError,
    ShardckptError,
    StepNotFoundError,
    StoreNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

OK: Final = 0
ERROR: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
CORRUPT: Final = 4


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; usage errors exit with 2."""
    options = _parser().parse_args(arguments)
    try:
        report = _dispatch(options)
    except (StoreNotFoundError, StepNotFoundError) as error:
        return _fail(options, error, NOT_FOUND)
    except CorruptCheckpointError as error:
        return _fail(options, error, CORRUPT)
    except (ShardckptError, OSError, ValueError) as error:
        return _fail(options, error, ERROR)
    print(json.dumps(report.data, indent=2) if options.json else report.text)
    return CORRUPT if report.is_corrupt else OK


def _dispatch(options: argparse.Namespace) -> Report:
    if options.command == "list":
        return list_steps(options.store)
    if options.command == "inspect":
        return inspect_step(options.store, options.step, keys=options.keys)
    if options.command == "convert":
        return convert_steps(
            options.source, options.target, step=options.step, item=options.item, to=options.to,
            keys=options.keys, progress=_progress,
        )  # fmt: skip
    return verify_steps(options.store, options.step, quick=options.quick)


def _progress(line: str) -> None:
    # Not to standard output, which holds the result alone.
    print(line, file=sys.stderr, flush=True)


def _fail(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}, indent=2))
    print(f"shardckpt: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardckpt", description="Look at and check checkpoint stores; needs no framework."
    )
    parser.add_argument("--version", action="version", version=f"shardckpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="the committed steps of a store")
    inspecting = commands.add_parser("inspect", help="what one step holds")
    verifying = commands.add_parser("verify", help="check every byte of one step, or of all")
    converting = commands.add_parser("convert", help="from Orbax to a new store, or back")
    converting.add_argument("source", help="a store, or a directory, step or item of Orbax")
    converting.add_argument("target", help="a directory that is absent or empty")
    for command in (listing, inspecting, verifying):
        command.add_argument("store", help="directory of the store")
    for command in (listing, inspecting, verifying, converting):
        command.add_argument("--json", action="store_true", help="machine-readable output")
    inspecting.add_argument("--step", type=int, help="a committed step; the newest by default")
    inspecting.add_argument("--keys", default="*", help="glob of the keys to show")
    verifying.add_argument("--step", type=int, help="a committed step; all by default")
    verifying.add_argument(
        "--quick", action="store_true", help="manifest, sizes, headers and tables only, no payloads"
    )
    converting.add_argument("--step", type=int, help="a committed step; all by default")
    converting.add_argument(
        "--item", help="from Orbax: only this item, as the whole state; to Orbax: its name"
    )
    converting.add_argument(
        "--to", choices=("orbax", "shardckpt"), help="by default what the source is not"
    )
    converting.add_argument("--keys", default="*", help="glob of the keys to convert")
    return parser
