"""The `mcl-clip` command in this process."""

import sys

from mcl_clip import __main__ as entry


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, output and error output of `mcl-clip`."""
    monkeypatch.setattr(sys, "argv", ["mcl-clip", *map(str, arguments)])
    code = 0
    try:
        entry.command()
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return code or 0, printed.out, printed.err
