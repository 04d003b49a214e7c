"""What must be the same in all versions; `python -m tests.golden` writes it anew."""

import json

import pytest

from tests import golden

STORED = json.loads(golden.FILE.read_text())


def test_plans_are_the_same_in_all_versions():
    assert golden.plans() == STORED["plans"]


def test_labels_are_the_same_in_all_versions():
    assert golden.labels() == STORED["labels"]
    assert len(set(STORED["labels"])) > 10


def test_losses_are_the_same_in_all_versions():
    found = golden.losses()
    assert len(found) == 20
    assert found == pytest.approx(STORED["losses"], rel=1e-9)
