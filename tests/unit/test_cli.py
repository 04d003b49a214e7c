import json
import subprocess
import sys

import pytest

from mcl_clip import DataConfig, RunConfig, StageConfig, TowerConfig, TrainConfig, UserError
from mcl_clip.cli import recipe as cli
from mcl_clip.config import EvalConfig
from mcl_clip.core.files import DONE
from tests.commands import run_command
from tests.unit.data.tars import pairs, write_tar

STAGE = StageConfig(train=TrainConfig(steps=100, global_batch_size=64, lr=1e-3))


@pytest.fixture
def recipe(tmp_path):
    return RunConfig(run_dir=tmp_path / "run", tower=TowerConfig(architecture="ViT-B-32"), stages=(STAGE, STAGE))


@pytest.fixture
def run(tmp_path):
    """A run directory whose stage 0 is trained and whose stage 1 has begun."""
    folder = tmp_path / "run"
    for name in ("stage-0/train", "stage-0/eval", "stage-1/train"):
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"stages": [{"train": {"steps": 100}}] * 2}))
    (folder / "stage-0/train" / DONE).write_text("{}")
    write_lines(folder / "stage-0/train/metrics.jsonl", {"step": 100, "loss": 1.0}, {"step": 100, "set/acc1": 0.5})
    write_lines(folder / "stage-1/train/metrics.jsonl", {"step": 10, "loss": 1.0}, {"step": 20, "loss": 1.0})
    return folder


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def test_a_recipe_without_overrides_stays_what_it_is(recipe):
    assert cli.parse(recipe, []) == recipe


def test_overrides(recipe, tmp_path):
    arguments = ["--stages.1.train.lr", "0.5", "--data.train", "a", "b", "--data.weights", "1", "2",
                 "--run-dir", str(tmp_path / "x"), "--stages.0.train.lr-multipliers", "^visual", "0.1"]  # fmt: skip
    changed = cli.parse(recipe, arguments)
    assert changed.stages[1].train.lr == 0.5
    assert changed.stages[0].train.lr_multipliers == {"^visual": 0.1}
    assert changed.data == DataConfig(train=("a", "b"), weights=(1.0, 2.0))
    assert changed.run_dir == tmp_path / "x"
    assert changed.tower == recipe.tower
    assert changed.eval == EvalConfig()


def test_stages_are_repeated_or_dropped(recipe):
    other = StageConfig(train=TrainConfig(steps=7, global_batch_size=8, lr=1.0))
    recipe = RunConfig(run_dir=recipe.run_dir, tower=recipe.tower, stages=(STAGE, other))
    assert cli.parse(recipe, ["--num-stages", "1"]).stages == (STAGE,)
    assert cli.parse(recipe, ["--num-stages=4"]).stages == (STAGE, other, other, other)
    after = cli.parse(recipe, ["--seed", "3", "--num-stages", "3", "--stages.2.train.lr", "0.5"])
    assert (after.seed, [stage.train.lr for stage in after.stages]) == (3, [1e-3, 1.0, 0.5])


@pytest.mark.parametrize("value", ["0", "-3", "two", "1.5", ""])
def test_numbers_of_stages_that_make_no_sense(recipe, value):
    with pytest.raises(UserError, match=f"--num-stages must be an integer of at least 1, not '{value}'"):
        cli.parse(recipe, ["--num-stages", value])
    with pytest.raises(UserError, match="--num-stages must be an integer of at least 1, not ''"):
        cli.parse(recipe, ["--num-stages"])


def test_arguments_are_not_changed(recipe):
    arguments = ["--num-stages", "3", "--seed", "1"]
    cli.parse(recipe, arguments)
    assert arguments == ["--num-stages", "3", "--seed", "1"]


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_other_kinds_of_parallelism_are_refused(monkeypatch, variable, name):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"{name} is not supported: .* launch with a config from recipes/accelerate"):
        cli.create_accelerator()


@pytest.mark.parametrize(
    ("environment", "announced", "missing", "unset"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4", "MASTER_ADDR and RANK", "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE=2", "RANK", "WORLD_SIZE"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE=", "MASTER_ADDR", "WORLD_SIZE"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE=2, PMI_SIZE=2",
            "MASTER_ADDR",
            "OMPI_COMM_WORLD_SIZE PMI_SIZE",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "MASTER_ADDR": "a"},
            "SLURM_STEP_NUM_TASKS=2",
            "RANK and WORLD_SIZE",
            "SLURM_STEP_NUM_TASKS",
        ),
    ],
)
def test_processes_that_cannot_meet_are_refused(environment, announced, missing, unset):
    with pytest.raises(UserError) as caught:
        cli.check_launcher(environment)
    assert str(caught.value) == (
        f"the environment announces several processes ({announced}) without {missing}, by which they meet; start them "
        f"with `mcl-clip launch RECIPE` (one task of srun or mpirun per node), or unset {unset} for a single process"
    )


def test_variables_of_a_launcher_that_do_no_harm():
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for environment in ({}, {"WORLD_SIZE": "1"}, launched, {**launched, "SLURM_STEP_NUM_TASKS": "2"}):
        cli.check_launcher(environment)
    cli.check_launcher({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # a batch script without srun


def test_variables_of_a_launcher_are_looked_at_first(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="mcl-clip launch"):
        cli.create_accelerator()


def test_status_says_how_far_each_phase_is(run, monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "status", run)
    assert code == 0
    assert out.splitlines() == [
        "stage 0: train done, embed missing, cluster missing, labels missing, eval missing (step 100 of 100)",
        "stage 1: train partial, embed missing, cluster missing, labels missing, eval missing (step 20 of 100)",
        "combined: missing",
        "losses and restarts:",
        "  stage 1: steps 1 to 20 are not in a checkpoint yet; if training stops now, they are repeated",
    ]


def test_status_prints_what_was_measured(run, monkeypatch, capsys):
    record = {"key": "classification/colours", "task": "zeroshot_classification", "n_images": 8, "n_texts": 4,
              "pretrained": "run/stage-0", "metrics": {"acc1": 0.625, "linear_acc1": 1.0}}  # fmt: skip
    write_lines(run / "stage-0/eval/results.jsonl", record)
    _, out, _ = run_command(monkeypatch, capsys, "status", run)
    assert "classification/colours: 8 images, 4 texts" in out
    assert out.splitlines()[-1].split() == ["stage-0", "62.5", "-", "100.0", "-"]


def test_status_of_something_else(tmp_path, monkeypatch, capsys):
    code, _, err = run_command(monkeypatch, capsys, "status", tmp_path)
    assert (code, err) == (2, f"error: {tmp_path} is not a run directory: it has no config.json\n")


def test_status_of_a_broken_run(run, monkeypatch, capsys):
    (run / "config.json").write_text("{")
    code, _, err = run_command(monkeypatch, capsys, "status", run)
    assert code == 2
    assert f"{run / 'config.json'} is not valid JSON" in err
    assert err.count("\n") == 1


def test_index_writes_an_index_beside_the_shards(tmp_path, monkeypatch, capsys):
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", [*pairs(5, prefix=f"s{number}_"), ("alone.jpg", b"x")])
    code, out, _ = run_command(monkeypatch, capsys, "index", tmp_path / "{0,1}.tar")
    assert code == 0
    first, *others = out.splitlines()
    assert first.startswith("2 shards, 10 rows, digest ")
    assert others == ["captions: 10 .txt", "left out: 2 missing_text (alone.jpg)"]
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "1.tar", "index.arrow"}
    code, _, err = run_command(monkeypatch, capsys, "index", tmp_path / "0.tar", "--text-member", "cap")
    assert code == 2
    assert "6 samples have an image but no cap member (skipped: 6 missing_text (s0_0000.jpg, s0_0000.txt))" in err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["index", "/nowhere/x.tar"], 2, "error: the shard /nowhere/x.tar does not exist"),
        (["reshard", "/nowhere", "/nowhere/out", "--stage", "1"], 2, "error: --stage 1 needs the labels of stage 0"),
        (["reshard", "/nowhere", "/nowhere/out", "--stage", "0"], 2, "error: --stage 0 needs the labels of stage -1"),
        (["reshard", "/nowhere", "/nowhere/out"], 2, "--stage"),
        (["doctor", "/nowhere/recipe.py", "--seed", "1"], 2, "error: there is no recipe /nowhere/recipe.py"),
        (["doctor", "/nowhere"], 2, "error: there is no recipe /nowhere"),
        (["bake"], 2, "bake"),
        ([], 2, "index"),
    ],
)  # fmt: skip
def test_mistakes_end_with_exit_code_2(monkeypatch, capsys, arguments, code, sentence):
    ended, _, err = run_command(monkeypatch, capsys, *arguments)
    assert ended == code
    assert sentence in err
    assert "Traceback" not in err


def test_help_lists_the_commands():
    shown = subprocess.run([sys.executable, "-m", "mcl_clip", "--help"], capture_output=True, text=True, check=True)
    for name in ("doctor", "index", "status", "reshard"):
        assert name in shown.stdout


def run_failing(monkeypatch, recipe, error, *, is_main):
    def failing(*_):
        raise error

    monkeypatch.setattr(cli, "run_pipeline", failing)
    monkeypatch.setattr(cli, "is_main", lambda: is_main)
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(recipe)
    return stopped.value.code


def test_an_error_of_all_processes_is_said_once(monkeypatch, capsys, recipe):
    codes = [
        run_failing(monkeypatch, recipe, UserError("wrong").on_every_process(), is_main=main) for main in (True, False)
    ]
    assert codes == [2, 2]
    assert capsys.readouterr().err == "error: wrong\n"


def test_an_error_of_one_process_is_said_by_it(monkeypatch, capsys, recipe):
    assert run_failing(monkeypatch, recipe, UserError("wrong"), is_main=False) == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_the_page_of_help_has_every_command_with_the_first_line_of_its_own_help():
    from mcl_clip import __main__ as entry
    from mcl_clip.cli import commands

    listed = {name: text for of_intent in entry.COMMANDS.values() for name, text in of_intent.items()}
    assert listed == {name: function.__doc__.split("\n")[0] for name, function in commands.COMMANDS.items()}
    lines = entry.help_text().splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: mcl-clip COMMAND"),
        ([], 2, "usage: mcl-clip COMMAND"),
        (["--version"], 0, "mcl_clip "),
        (["staus", "x"], 2, "error: there is no command 'staus'; did you mean status?"),
        (["frobnicate"], 2, "error: there is no command 'frobnicate'; see mcl-clip --help"),
        (["completion"], 2, "error: name one shell: bash, zsh, tcsh"),
        (["completion", "fish"], 2, "error: name one shell: bash, zsh, tcsh"),
    ],
)
def test_what_needs_nothing_heavy_loads_nothing_heavy(arguments, code, said):
    program = (
        "import sys; sys.argv = ['mcl-clip', *sys.argv[1:]]\n"
        "from mcl_clip.__main__ import command\n"
        "try: command()\n"
        "except SystemExit as stop: code = stop.code or 0\n"
        "else: code = 0\n"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    found = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr
    assert said in found.stdout + found.stderr
    assert "\033" not in found.stdout


def test_completion_names_commands_and_their_options(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "completion", "bash")
    assert code == 0
    assert all(word in out for word in ("'status'", "'--max-mb'", "complete -F"))


def test_recipes_are_listed_and_copied(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, out, _ = run_command(monkeypatch, capsys, "init")
    assert "photos " in out
    assert "experiments/codes" in out
    assert run_command(monkeypatch, capsys, "init", "photos")[0] == 0
    assert "RECIPE = mcl.RunConfig(" in (tmp_path / "photos.py").read_text()
    code, _, err = run_command(monkeypatch, capsys, "init", "photos")
    assert (code, err) == (2, "error: photos.py exists already; give --out another name\n")
    code, _, err = run_command(monkeypatch, capsys, "init", "nothing")
    assert code == 2
    assert "there is no recipe 'nothing'; there are " in err


def test_an_installed_package_brings_its_recipes():
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    files = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    brought = {path for patterns in files.values() for pattern in patterns for path in root.glob(pattern)}
    assert brought == set((root / "recipes").rglob("*.py"))


def test_quiet_is_for_this_process_and_its_children(monkeypatch, recipe):
    from mcl_clip.core.progress import QUIET, is_quiet

    monkeypatch.setenv(QUIET, "")
    assert not is_quiet()
    assert cli.parse(recipe, ["--quiet", "--seed", "3"]).seed == 3
    assert is_quiet()


def test_status_is_coloured_on_a_terminal_alone(run):
    from mcl_clip.tools.doctor import status_lines

    assert status_lines(run)[0].startswith("stage 0: train done, embed missing")
    assert "train \033[32mdone\033[0m" in status_lines(run, has_colours=True)[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = = 3", r"cannot be run, line 1: SyntaxError: invalid syntax"),
        ("import nothing_here", r"cannot be run, line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("\nfrom mcl_clip import DataConfig\nDataConfig(rows=3)", r"cannot be run, line 3: TypeError: .*'rows'"),
        ("raise RuntimeError('x' * 10_000)", r"cannot be run, line 1: RuntimeError: x+ \.\.\. \(10,000 characters\)"),
        ("RECIPE = 3", r"has no RECIPE = RunConfig\(\.\.\.\)"),
    ],
)
def test_a_recipe_that_cannot_be_run(tmp_path, text, sentence):
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        cli.load_recipe(tmp_path / "recipe.py", "RECIPE", RunConfig)
    assert len(str(error.value)) < 600
