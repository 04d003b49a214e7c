"""Every command in a document is one that the programs of today accept, and every link leads somewhere."""

import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import tyro
from accelerate.commands.launch import launch_command_parser

from mcl_clip import __main__ as entry
from mcl_clip.cli import commands
from mcl_clip.cli import recipe as cli
from mcl_clip.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in (ROOT, ROOT / "docs", ROOT / "recipes")
    for path in (*folder.glob("*.md"), *folder.glob("*/*.md"))
    if not set(path.relative_to(ROOT).parts) & {"tests", "build"} and ".venv" not in path.parts
)
PROGRAMS = sorted(
    path.relative_to(ROOT) for name in ("recipes", "data_prep", "benchmarks") for path in (ROOT / name).rglob("*.py")
)
PROGRAM_FOLDERS = "recipes|data_prep|benchmarks"
STARTS = rf"(?:mcl-clip|python -m mcl_clip|python (?:{PROGRAM_FOLDERS})/|accelerate launch|make|pip install|sbatch)\b"
PLACEHOLDERS = {  # in documents, and what stands for them here
    r"\[(--[^\]]+)\]": r"\1",  # an option that may be left out
    r"\[arguments of the recipe\]": "",
    r"\bRECIPE(\.py)?\b": "recipes/photos.py",
    r"recipes/NAME\.py": "recipes/photos.py",
    r"runs/mine/recipe\.py": "recipes/photos.py",  # written by `mcl-clip finetune`
    r"stages\.K\b": "stages.0",
    r"--(stage|seeds|workers|num-stages) [KNS]\b": r"--\1 1",
    r"--num-processes N": "--num-processes 2",
    r"\bSHELL\b": "bash",
    r"\bsets?/\.\.\.": "sets",
}
FRAGMENT_WORDS = 2  # `mcl-clip eval` is a name, not a whole command
LEFT_OUT = "..."


def commands_in(text: str) -> Iterator[str]:
    """The commands of a document: lines of code blocks, and code in sentences, which may leave out what is required."""
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    outside = re.sub(r"^```[a-z]*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [line for line in outside.splitlines() if line.startswith("    ")]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", outside)]
    for line, is_whole in [*((line, True) for line in lines), *((span, False) for span in spans)]:
        command = re.sub(r"\s+#\s.*$", "", line.strip().removeprefix(".venv/bin/"))
        if re.match(STARTS, command) and not command.endswith("/"):
            yield command if is_whole or LEFT_OUT in command else f"{command} {LEFT_OUT}"


def check_command(command: str) -> None:
    """Parse a command as its program would; nothing is run.

    Raises:
        ValueError: with what the program says.
    """
    for pattern, value in PLACEHOLDERS.items():
        command = re.sub(pattern, value, command)
    words = [word for word in shlex.split(command) if word != LEFT_OUT]
    if len(words) <= FRAGMENT_WORDS and words[0] in ("mcl-clip", "make", "accelerate"):
        known = (
            [*entry.names(), "--version", "--help", "COMMAND"]
            if words[0] == "mcl-clip"
            else [*make_targets(), "launch"]
        )
        if len(words) == 2 and words[1] not in known:
            raise ValueError(f"{words[1]} is not one of {known}")
        return
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors), patch.object(sys, "argv", words):
        try:
            parse(words)
        except SystemExit as stopped:
            is_missing = LEFT_OUT in command and re.search("Missing from|are required", errors.getvalue())
            if stopped.code and not is_missing:
                raise ValueError(f"{command}: {errors.getvalue()}") from stopped
        except Exception as error:
            raise ValueError(f"{command}: {error}") from error


def parse(words: list[str]) -> None:
    program, arguments = words[0], words[1:]
    if program == "make":
        assert set(arguments) <= make_targets(), arguments
    elif program == "pip":
        check_extras(arguments[-1])
    elif words[1:3] == ["-m", "mcl_clip.tools.clip_benchmark"]:
        assert find_spec(words[2])  # its options are those of a package that is not installed here
    elif program == "mcl-clip" or words[1:3] == ["-m", "mcl_clip"]:
        parse_command(arguments if program == "mcl-clip" else words[3:])
    elif program == "accelerate":
        parsed = launch_command_parser().parse_args(arguments[1:])
        if parsed.module:
            parse_command(parsed.training_script_args)
        else:
            parse_recipe(parsed.training_script, parsed.training_script_args)
    elif program == "sbatch":
        parse_recipe(arguments[1], arguments[2:])
    elif arguments[0].startswith("recipes/"):
        parse_recipe(arguments[0], arguments[1:])
    else:
        run_parser(arguments[0], arguments[1:])


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_extras(argument: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[([\w,-]+)\]", argument):
        assert set(extra.split(",")) <= set(project["optional-dependencies"]), extra


def parse_command(arguments: list[str]) -> None:
    name = arguments[0]
    if name in ("completion", "--version", "--help") or arguments[1:] == ["--help"]:
        assert name in (*entry.names(), "--version", "--help"), name
        return
    takes_recipe = name in commands.RECIPE_COMMANDS
    own, of_recipe = commands.split(arguments) if takes_recipe else (arguments, [])
    recorders = {known: recorder(function) for known, function in commands.COMMANDS.items()}
    own = [argument for argument in own if argument != "--quiet"]
    tyro.extras.subcommand_cli_from_dict(recorders, prog="mcl-clip", args=own)
    if name == "finetune":
        assert isinstance(cli.parse(runpy.run_path(str(ROOT / "recipes/photos.py"))["RECIPE"], of_recipe), RunConfig)
    elif takes_recipe:
        parse_recipe(next(argument for argument in own if argument.endswith(".py")), of_recipe)


def parse_recipe(recipe: str, arguments: list[str]) -> None:
    config = runpy.run_path(str(ROOT / recipe))["RECIPE"]
    assert isinstance(cli.parse(config, arguments), RunConfig)


def run_parser(program: str, arguments: list[str]) -> None:
    """Run a program up to the point where its arguments are parsed."""
    real, real_of_many = tyro.cli, tyro.extras.subcommand_cli_from_dict

    def one(function, *, args=None, **options):
        return real(recorder(function), args=arguments, **options)

    def many(functions, *, args=None, **options):
        return real_of_many({name: recorder(f) for name, f in functions.items()}, args=arguments, **options)

    path = [str((ROOT / program).parent), *sys.path]
    with (
        patch.object(tyro, "cli", one),
        patch.object(tyro.extras, "subcommand_cli_from_dict", many),
        patch.object(sys, "path", path),
    ):
        runpy.run_path(str(ROOT / program), run_name="__main__")


def recorder(function: Callable[..., object]) -> Callable[..., None]:
    """A function with the same arguments that does nothing."""

    @functools.wraps(function)
    def do_nothing(*_, **__):
        return None

    return do_nothing


def all_commands() -> list[tuple[str, str]]:
    found = [(str(path), command) for path in DOCUMENTS for command in commands_in((ROOT / path).read_text())]
    for path in PROGRAMS:
        text = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
        found += [(str(path), command) for command in commands_in(text)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("document", "command"), all_commands(), ids=lambda value: value[:90])
def test_every_command_is_accepted_by_its_program(document, command):
    check_command(command)


def test_commands_are_found_in_every_document_that_should_have_some():
    found = {document for document, _ in all_commands()}
    assert found >= {"README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/scaling.md", "docs/data.md"}
    assert found >= {
        "docs/speed.md",
        "docs/publishing.md",
        "docs/evaluation.md",
        "docs/finetuning.md",
        "recipes/photos.py",
        "recipes/experiments/codes.py",
    }
    assert len(all_commands()) > 100


@pytest.mark.parametrize(
    "text",
    [
        "    mcl-clip eval runs/x --dta sets",
        "    mcl-clip evaluate runs/x --data sets",
        "Call `mcl-clip exprt`.",
        "```\nmcl-clip launch recipes/photos.py --num-proceses 2\n```",
        "```sh\npython recipes/photos.py --stages.K.train.lrr 1\n```",
        "    python recipes/none.py --seed 1",
        "    accelerate launch --config_fil x recipes/photos.py",
        "    python data_prep/from_table.py table.csv out --image-colum file",
        "    python data_prep/shortcuts.py cods out",
        "    python benchmarks/kmeans.py --rouns 1",
        "    make quickstat",
        "    mcl-clip finetune ViT-B-32/openai data.csv --run-dir runs/x --image-colum file",
        "    mcl-clip finetune ViT-B-32/openai data.csv --run-dir runs/x --stages.0.train.lrr 1",
        "    pip install -e '.[wandbb]'",
    ],
)
def test_a_mistake_in_a_document_is_found(text):
    (command,) = commands_in(text)
    with pytest.raises(ValueError, match=r"."):
        check_command(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_python_in_documents_compiles(document):
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE):
        compile(block, str(document), "exec")
