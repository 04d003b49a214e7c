"""Entry point of `mcl-clip`: help, versions and completion, which import nothing heavy; commands are in `cli`."""

import difflib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {  # by purpose, with the first lines of their help, since importing the commands takes seconds
    "start": {
        "init": "Copy a recipe to start from; without a name, list the recipes.",
        "index": "Index shards in one pass over their tar headers.",
    },
    "run": {
        "finetune": "Fine-tune a model on your own pictures, compare it with the base, and export it.",
        "doctor": "Find what will fail, or perform badly, before a job runs.",
        "launch": "Run a recipe in several processes.",
        "profile": "Measure where a training step spends its time.",
        "experiment": "Run a recipe and its controls over several seeds.",
        "reshard": "Copy the shards of a run in the order of its groups.",
    },
    "look": {
        "status": "Print the progress of a run, its losses and restarts, and its results.",
        "report": "Write report.html, a page that shows what each stage learned.",
        "browse": "Search the images of a run in the browser, stage by stage.",
    },
    "measure": {
        "eval": "Evaluate a model on evaluation sets, with confidence intervals.",
        "audit": "Find what a model is blind to, and by which shortcut it tells pairs apart.",
        "compare": "Compare two models query by query: A - B with 95 % intervals.",
    },
    "publish": {
        "export": "Export a run to a folder that other libraries can load.",
        "push": "Publish a run on the Hugging Face Hub, with a model card.",
    },
}
SHELLS = ("bash", "zsh", "tcsh")
PACKAGES = (
    *("mcl_clip", "torch", "torchvision", "open_clip_torch", "webdataset", "transformers"),
    *("accelerate", "datasets", "huggingface_hub", "tyro", "numpy"),
)


def command() -> None:
    """Run `mcl-clip` with the arguments of `sys.argv`."""
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else ""
    if first in ("", "-h", "--help", "help"):
        file = sys.stdout if arguments else sys.stderr
        print(help_text(has_colours=file.isatty() and not os.environ.get("NO_COLOR")), file=file)
        sys.exit(0 if arguments else 2)
    if first in ("--version", "-V"):
        print("\n".join(versions()))
        return
    if first == "completion":
        if len(arguments) != 2 or arguments[1] not in SHELLS:
            _stop(f"name one shell: {', '.join(SHELLS)}, as in mcl-clip completion bash")
        sys.argv[1:] = ["--tyro-print-completion", arguments[1]]
    elif not first.startswith("-") and first not in names():
        near = difflib.get_close_matches(first, names(), n=2)
        _stop(
            f"there is no command {first!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else "see mcl-clip --help")
        )
    from mcl_clip.cli.commands import command as run

    run()


def names() -> list[str]:
    """List all commands."""
    return [*(name for commands in COMMANDS.values() for name in commands), "completion"]


def help_text(*, has_colours: bool = False) -> str:
    """Format the help page: all commands, by purpose."""
    bold, plain = ("\033[1m", "\033[0m") if has_colours else ("", "")
    lines = ["usage: mcl-clip COMMAND ...", "", "Multistage contrastive pretraining of CLIP.", ""]
    for intent, commands in COMMANDS.items():
        lines.append(f"{bold}{intent}{plain}")
        lines += [f"  {name:<11} {text}" for name, text in commands.items()]
    lines += ["", "mcl-clip COMMAND --help       description and options of a command"]
    lines += ["python RECIPE.py --help       settings of a recipe, with units"]
    lines += [f'mcl-clip completion SHELL     completion for {", ".join(SHELLS)}: eval "$(mcl-clip completion bash)"']
    lines += [
        "mcl-clip --version            versions of mcl_clip and its main dependencies",
        "--quiet                       print only warnings and results",
    ]
    return "\n".join(lines)


def versions() -> list[str]:
    """List the versions of packages that results depend on, without importing them."""
    lines = []
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    return [*lines[:1], f"python {platform.python_version()}", *lines[1:]]


def _stop(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    command()
