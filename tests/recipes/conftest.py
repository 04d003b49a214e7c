"""The tiny project, and a finished run of it."""

import shutil
from dataclasses import replace

import pytest

from tests.recipes.runs import (
    execute,
    load_recipe,
    write_project,
)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """The recipe of the tiny project."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def recipe(path, tmp_path):
    return replace(load_recipe(path), run_dir=tmp_path / "run")


@pytest.fixture(scope="session")
def finished(path):
    """A run of two stages that nothing disturbed; tests change copies of it."""
    return execute(load_recipe(path))


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, files' times included."""
    return shutil.copytree(finished, tmp_path / "run")
