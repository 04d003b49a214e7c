"""The `mcl-clip` command: its help, its version and its completion need nothing heavy; all else is in `commands`."""

import difflib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {  # by what one wants to do: the commands, with the first lines of their help
    "start": {
        "init": "Copy a recipe to start from; without a name, list the recipes.",
        "index": "Index shards: one pass over the tar headers.",
    },
    "run": {
        "doctor": "Find what will fail, or go badly, before a job runs.",
        "launch": "Run a recipe in several processes.",
        "profile": "Measure where a training step spends its time.",
        "experiment": "Run a recipe beside its controls over several seeds.",
        "reshard": "Copy the shards of a run in the order of its groups.",
    },
    "look": {
        "status": "Print how far a run is, what was lost on the way, and what it measured.",
        "report": "Write report.html: what each stage learned, as one page to look at.",
        "browse": "Search the pictures of a run in the browser, stage by stage.",
    },
    "measure": {
        "eval": "Measure a model on evaluation sets, with intervals.",
        "compare": "Compare two models query by query: A - B with 95 % intervals.",
    },
    "publish": {
        "export": "Write a run as a folder that others can load.",
        "push": "Publish a run on the Hugging Face Hub, with a model card.",
    },
}
SHELLS = ("bash", "zsh", "tcsh")
PACKAGES = (
    *("mcl_clip", "torch", "torchvision", "open_clip_torch", "webdataset", "transformers"),
    *("accelerate", "datasets", "huggingface_hub", "tyro", "numpy"),
)


def command() -> None:
    """Run `mcl-clip`."""
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else ""
    if first in ("", "-h", "--help", "help"):
        where = sys.stdout if arguments else sys.stderr
        print(help_text(has_colours=where.isatty() and not os.environ.get("NO_COLOR")), file=where)
        sys.exit(0 if arguments else 2)
    if first in ("--version", "-V"):
        print("\n".join(versions()))
        return
    if first == "completion":
        sys.argv[1:] = ["--tyro-print-completion", _shell(arguments[1:])]
    elif not first.startswith("-") and first not in names():
        _stop(f"there is no command {first!r}; {_nearest(first)}")
    from mcl_clip.cli.commands import command as run

    run()


def names() -> list[str]:
    """All commands."""
    return [*(name for commands in COMMANDS.values() for name in commands), "completion"]


def help_text(*, has_colours: bool = False) -> str:
    """One page: all commands, by what one wants to do."""
    bold, plain = ("\033[1m", "\033[0m") if has_colours else ("", "")
    lines = ["usage: mcl-clip COMMAND ...", "", "Multistage contrastive pretraining of CLIP.", ""]
    for intent, commands in COMMANDS.items():
        lines.append(f"{bold}{intent}{plain}")
        lines += [f"  {name:<11} {text}" for name, text in commands.items()]
    lines += ["", "mcl-clip COMMAND --help       what a command does, with its options"]
    lines += ["python RECIPE.py --help       the settings of a recipe, with units"]
    lines += [f'mcl-clip completion SHELL     completion for {", ".join(SHELLS)}: eval "$(mcl-clip completion bash)"']
    lines += [
        "mcl-clip --version            versions of the packages that matter",
        "--quiet                       warnings and results alone",
    ]
    return "\n".join(lines)


def versions() -> list[str]:
    """The versions of what a result may hang on, without importing it."""
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return [*lines[:1], f"python {platform.python_version()}", *lines[1:]]


def _shell(arguments: list[str]) -> str:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        _stop(f"name one shell: {', '.join(SHELLS)}, as in mcl-clip completion bash")
    return arguments[0]


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, names(), n=2)
    return f"did you mean {' or '.join(near)}?" if near else "see mcl-clip --help"


def _stop(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)


if __name__ == "__main__":
    command()
