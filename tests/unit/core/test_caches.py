import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_clip.core.caches import use_writable_caches

VARIABLES = ("HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "MPLCONFIGDIR", "TRITON_CACHE_DIR",
             "HF_HUB_CACHE", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """An environment of its own, in which none of the variables is set."""
    changed = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    monkeypatch.setattr(os, "environ", changed)
    return changed


def test_a_home_that_can_be_written_changes_nothing(environment, tmp_path, caplog):
    environment["HOME"] = str(tmp_path)
    before = dict(environment)
    use_writable_caches()
    assert environment == before
    assert not caplog.records
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("home", ["/dev/null/home", "/dev/null"])
def test_caches_go_to_a_temporary_folder_with_one_warning(environment, tmp_path, monkeypatch, caplog, home):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment |= {"HOME": home, "MPLCONFIGDIR": "/given"}
    for _ in range(2):  # as in a child process, which inherits the variables
        use_writable_caches()
    assert environment["MPLCONFIGDIR"] == "/given"
    moved = [name for name in VARIABLES if environment.get(name, "").startswith(str(tmp_path))]
    assert moved == [
        "HF_MODULES_CACHE",
        "HF_DATASETS_CACHE",
        "HF_XET_CACHE",
        "TRITON_CACHE_DIR",
        "HF_HUB_CACHE",
        "TORCH_HOME",
    ]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"{home}/.cache/huggingface/modules cannot be written; caches are in {tmp_path}"
    )


def test_downloads_that_are_there_are_used(environment, tmp_path, monkeypatch):
    (tmp_path / ".cache/huggingface/hub").mkdir(parents=True)
    environment["HOME"] = str(tmp_path)
    monkeypatch.setattr("mcl_clip.core.caches._is_writable", lambda path: False)
    use_writable_caches()
    assert "HF_HUB_CACHE" not in environment
    assert environment["HF_MODULES_CACHE"]


CHECK = """
import sys
from pathlib import Path
import mcl_clip
from mcl_clip.model.clip import create_clip
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.publish.export import CHECK_TEXTS, _check_images
from mcl_clip.publish.hf_clip import transformers_features, write_transformers_files
from tests.unit.eval.sets import MODEL
import matplotlib.pyplot
clip = create_clip(model_cfg=MODEL)
model = MultistageCLIP([clip.model], combine="concat", logit_scale=3.0, preprocess_cfg=clip.preprocess_cfg,
                       model_cfgs=[clip.model_cfg], tokenizer=clip.tokenizer)
folder = Path(sys.argv[1])
model.save(folder)
write_transformers_files(folder, model)
print(tuple(transformers_features(folder, _check_images(), CHECK_TEXTS)[0].shape))
"""


def test_an_export_checks_itself_without_a_home(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"HOME": "/dev/null/home", "PYTHONPATH": str(Path(__file__).parents[3]), "TMPDIR": str(tmp_path)}
    arguments = [sys.executable, "-c", CHECK, str(tmp_path / "model")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 16)\n"
    assert done.stderr.count("cannot be written") == 1
    assert not list(tmp_path.glob("mcl_clip-*"))
