"""Runs recipes in forks of itself that die at a chosen call, as after `kill -9`.

Reads a job a line from stdin, as JSON, and answers with the exit code of the fork, minus the number of its signal.
Nothing is computed here itself, so that there are no threads when it forks.
"""

import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

import torch._dynamo  # noqa: F401  # optimisers import it at their first step

import mcl_clip.cli.recipe  # noqa: F401


def run(recipe: str, target: str, call: int, arguments: list[str], after: bool) -> None:
    """Run a recipe and kill this process when the n-th call of `module:function` begins, or has returned."""
    module_name, names = target.split(":")
    holder: Any = importlib.import_module(module_name)
    *path, name = names.split(".")
    for part in path:
        holder = getattr(holder, part)
    function, calls = getattr(holder, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, dying)
    sys.argv = [recipe, *arguments]
    runpy.run_path(recipe, run_name="__main__")


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            try:
                run(**job)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
