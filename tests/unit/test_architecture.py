"""The structure of the code: one-way imports, size limits, and what the documents say about it."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mcl_clip"
MODULES = sorted(PACKAGE.rglob("*.py"))
LEVELS = (
    ("__init__", "__main__"),
    ("cli",),
    ("tools",),
    ("runs",),
    ("report", "publish"),
    ("results",),
    ("train", "stages", "eval"),
    ("data",),
    ("model",),
    ("config",),
    ("core",),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}
SHIPPED = (  # inside exported models
    "image_model.py", "image_transform.py", "modeling_multistage_clip.py", "multistage.py", "open_clip_io.py",
    "processing_multistage_clip.py",
)  # fmt: skip
READ_RUN_CONFIG = {"__init__", "cli", "tools", "runs"}

MAX_MODULE_LINES, MAX_FUNCTION_LINES = 450, 80

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= int(path.name in SHIPPED), f"{path}: only files that are shipped import relatively"
            module = f"mcl_clip.model.{node.module}" if node.level else node.module
            yield module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "mcl_clip")


def imported_parts(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("mcl_clip.")}


@every_module
def test_imports_run_one_way(path):
    part = part_of(path)
    for other in imported_parts(path) - {part}:
        assert LEVEL_OF[part] < LEVEL_OF[other], f"{part} imports {other}"


@every_module
def test_only_the_top_reads_the_whole_recipe(path):
    """Other packages take the sections of the configuration that concern them."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "RunConfig" not in names or part_of(path) in READ_RUN_CONFIG


@every_module
def test_the_library_does_not_import_its_users(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"recipes", "data_prep", "benchmarks", "tests"}


def test_recipes_use_public_names_only():
    for path in (REPOSITORY / "recipes").rglob("*.py"):
        text = path.read_text()
        assert {name for name in imports(path) if name.startswith("mcl_clip")} == {"mcl_clip"}, path
        assert set(re.findall(r"\bmcl\.(\w+)", text)) <= {*public_names()}, path


def public_names() -> list[str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")  # fmt: skip


def test_files_that_are_shipped_with_models_stand_alone():
    for name in SHIPPED:
        found = {other for other in imports(PACKAGE / "model" / name) if not other.startswith("mcl_clip.model.")}
        roots = {other.split(".")[0] for other in found}
        allowed = {
            "torch",
            "open_clip",
            "safetensors",
            "transformers",
            "huggingface_hub",
            "PIL",
            "timm",
        }  # timm comes with open_clip
        assert roots - sys.stdlib_module_names <= allowed, name


LONG_MODULES = {  # modules above the limit, and why
    "cli/commands.py": "help texts of all commands",
    "config.py": "all fields with their help texts",
}
LONG_FUNCTIONS = {  # functions above the limit, and why
    "train/loop.py:train_stage": "the loop is read from top to bottom",
}


@every_module
def test_modules_and_functions_are_short_or_have_a_reason(path):
    name, text = str(path.relative_to(PACKAGE)), path.read_text()
    assert (len(text.splitlines()) > MAX_MODULE_LINES) == (name in LONG_MODULES), name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert (lines > MAX_FUNCTION_LINES) == (f"{name}:{node.name}" in LONG_FUNCTIONS), f"{node.name}: {lines}"


@every_module
def test_modules_hold_no_state(path):
    """Names at the top of a module are constants, types and the logger; nothing is rebound."""
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            assert name in ("logger", "__all__") or re.fullmatch(r"_?[A-Z]\w*", name), f"{name} at the top of {path}"


@every_module
def test_nothing_draws_from_a_global_generator(path):
    assert "random" not in set(imports(path))
    text = path.read_text()
    assert set(re.findall(r"np\.random\.(\w+)", text)) <= {"Philox"}
    draws = re.findall(r"torch\.(?:rand|randn|randint|randperm|normal|bernoulli|multinomial)\((.*)", text)
    assert all("generator=" in draw for draw in draws), draws
    seeds_dropout = path == PACKAGE / "train/loop.py"
    assert text.count("torch.manual_seed(") == int(seeds_dropout)


def messages(path: Path) -> Iterator[str]:
    """The words of each UserError of a module, without the values in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
            parts = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr | ast.Constant)]
            joined = parts[0].values if parts and isinstance(parts[0], ast.JoinedStr) else parts[:1]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in joined)


OWN_FILES = {"min_group_size"}  # in pairs.json


@every_module
def test_messages_name_options_as_they_are_typed(path):
    fields = set(re.findall(r"^    (\w+_\w+): ", (PACKAGE / "config.py").read_text(), re.MULTILINE)) - OWN_FILES
    for text in messages(path):
        assert not {*re.findall(r"\w+", text)} & fields, text
        assert not re.search(r"\b[a-z_]+='?\*", text), text


def tree() -> str:
    return (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Tree")[1].split("```")[1]


def files_in_tree() -> dict[str, str]:
    """Return the paths under `mcl_clip/` in the tree of CONTRIBUTING.md, and their contents."""
    lines = [line.split(maxsplit=1) for line in tree().splitlines() if line.startswith("  ")]
    return {line[0]: line[1] for line in lines}


def test_the_tree_names_every_module():
    listed = files_in_tree()
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert listed.keys() == modules | packages
    for folder in packages:
        inside = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        named = {word for word in re.sub(r"\(.*?\)", "", listed[folder]).split() if not word.endswith("/")}
        assert named == inside, folder


def test_the_tree_names_the_other_folders():
    listed = {line.split()[0] for line in tree().splitlines() if line and not line.startswith(" ")}
    assert listed >= {"mcl_clip/", "recipes/", "data_prep/", "tests/"}
    assert all((REPOSITORY / folder).is_dir() for folder in listed)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "recipes/README.md", "docs/method.md", "docs/data.md", "docs/speed.md"]
)
def test_files_that_the_documentation_names_exist(name):
    text = (REPOSITORY / name).read_text()
    for path in re.findall(r"(?:mcl_clip|recipes|data_prep|tests|benchmarks)/[\w/]+\.\w+", text):
        assert (REPOSITORY / path).exists() or "NAME" in path, path


def test_packages_have_no_code_in_their_init():
    for path in PACKAGE.glob("*/**/__init__.py"):
        tree = ast.parse(path.read_text())
        assert len(tree.body) == 1, path
        assert ast.get_docstring(tree), path
