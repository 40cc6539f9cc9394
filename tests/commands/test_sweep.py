"""Laws of a sweep: which runs a file asks for, which are kept, what the table says."""

import fcntl
import json
import shlex
import subprocess
import sys

import pytest
import sweep
import yaml
from conftest import ROOT, execute
from matplotlib import image

from MaxText.config.keys import ConfigError, Distillation, KDKeys
from MaxText.reports import points
from MaxText.sweeps import folders, grid

FIRST = ROOT / "configs/sweeps/alpha_temperature.yml"
GRID = {"kd_alpha": [0.5, 1.0], "kept": {"full": {}, "k4": {"kd_top_k": 4}}}
KEYS = {"use_kd": True, "kd_teacher_parameters_path": "gs://b/t", "eval_interval": 2, "eval_steps": 1, "steps": 3}


@pytest.fixture
def write(tmp_path):
    def write(**content):
        content = {"config": "configs/smoke.yml", "grid": GRID, "keys": KEYS} | content
        path = tmp_path / "sweep.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


def rows(folder, name, *evaluations):
    """A metrics file with evaluations (step, ce, kl, agreement) after a training row each."""
    path = folder / name / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, *values in evaluations:
        lines += [{"step": step, "learning/loss": 1.0}]
        lines += [{"step": step} | dict(zip(points.COLUMNS.values(), values, strict=False))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# The file -------------------------------------------------------------------------------------------------------------


def test_every_point_is_run_with_every_seed_and_nothing_else(write):
    runs = grid.load(write(seeds=[3, 4]), [])
    names = [f"alpha{a}-{kept}-seed{seed}" for a in (0.5, 1.0) for kept in ("full", "k4") for seed in (3, 4)]
    assert [run.name for run in runs] == names
    command = runs[-1].command(ROOT / "out")
    for setting in (
        "kd_alpha=1.0",
        "kd_top_k=4",
        "init_weights_seed=4",
        "data_shuffle_seed=4",
        f"run_name={names[-1]}",
    ):
        assert setting in command


def test_an_excluded_combination_is_left_out_and_its_parts_are_not(write):
    runs = grid.load(write(exclude=[{"kd_alpha": 1.0, "kd_top_k": 4}]), [])
    assert [run.point for run in runs] == ["alpha0.5-full", "alpha0.5-k4", "alpha1.0-full"]


def test_settings_of_the_command_line_are_in_every_run_and_the_grid_wins(write):
    for run in grid.load(write(), ["steps=5", "kd_alpha=0.1"]):
        assert run.settings["steps"] == 5 and run.keys["kd_alpha"] in (0.5, 1.0)


def test_only_takes_runs_or_points(write):
    runs = grid.load(write(seeds=[0, 1]), [])
    assert [run.name for run in grid.select(runs, ["alpha0.5-k4"])] == ["alpha0.5-k4-seed0", "alpha0.5-k4-seed1"]
    assert [run.name for run in grid.select(runs, ["*1.0-full-seed1"])] == ["alpha1.0-full-seed1"]
    assert grid.select(runs, []) == runs
    with pytest.raises(ConfigError, match="none of alpha0"):
        grid.select(runs, ["full"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grid": None}, "grid"),
        ({"sedes": [1]}, "sedes"),
        ({"grid": {"kd_alpha": 0.5}}, "grid.kd_alpha"),
        ({"seeds": "all"}, "seeds"),
        ({"seeds": []}, "seeds=[]: asks for no run"),
        ({"grid": {}}, "grid={}: asks for no run"),
        ({"grid": GRID | {"kd_top_p": []}}, "grid.kd_top_p=[]: asks for no run"),
        ({"exclude": [{}]}, "exclude leaves no run"),
        ({"keys": KEYS | {"init_weights_seed": 5}}, "init_weights_seed=5: is set to each of seeds"),
        ({"grid": {"data_shuffle_seed": [0, 1]}}, "data_shuffle_seed=0: is set to each of seeds"),
        ({"config": "configs/none.yml"}, "configs/none.yml: no such config file"),
        ({"grid": {"kd_alhpa": [1]}}, "did you mean kd_alpha"),
        ({"grid": {"kd_alpha": [2]}}, "alpha2: kd_alpha=2"),
        ({"grid": {"kd_top_k": [4]}, "keys": KEYS | {"kd_top_p": 0.5}}, "set one of the two"),
        ({"grid": {"kd_alpha": [1, 1]}}, "two points or seeds have one name"),
        ({"keys": KEYS | {"eval_interval": -1}}, "eval_interval=-1"),
        ({"keys": KEYS | {"eval_interval": None}}, "eval_interval=None"),
        ({"keys": KEYS | {"steps": "many"}}, "steps=many: whole numbers"),
    ],
    ids=str,
)
def test_a_sweep_that_cannot_run_is_refused_before_its_first_run(write, content, said):
    path = write(**content)
    with pytest.raises(ConfigError) as refusal:
        grid.load(path, [])
    assert said in str(refusal.value) and (str(path) in str(refusal.value) or "config" in content)


def test_a_run_s_config_is_no_sweep():
    with pytest.raises(ConfigError, match=r"smoke\.yml: is no sweep: no config and no grid in it"):
        grid.load(ROOT / "configs/smoke.yml", [])


def test_the_first_sweep_covers_what_it_says_and_its_names_are_ones_that_kubernetes_takes(capsys):
    runs = grid.load(FIRST, [])
    assert f"{len(runs)} runs" in FIRST.read_text()
    assert {run.seed for run in runs} == {0, 1, 2}
    warned = [run for run in runs if Distillation(**kd_keys(run)).warnings()]
    assert warned == []
    assert sweep.main([str(FIRST), "--only", "*-seed2", "--xpk", "--cluster", "c", "--tpu-type", "v6e-8"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(runs) / 3
    for line in lines:
        assert line[1:6] == ["scripts/submit_xpk.py", "--cluster", "c", "--tpu-type", "v6e-8"]
        workload = next(word.partition("=")[2] for word in line if word.startswith("--workload="))
        assert len(workload) <= 40 and all(part.isalnum() for part in workload.split("-"))


def kd_keys(run):
    return {key: run.settings.get(key, value) for key, value in DEFAULTS.items() if key in KDKeys.model_fields}


DEFAULTS = yaml.safe_load((ROOT / "MaxText/configs/base.yml").read_text())


def test_a_dry_run_says_the_commands_and_nothing_else(write, tmp_path, capfd):
    assert sweep.main([str(write()), "--out", str(tmp_path), "--dry-run", "--only", "alpha0.5-k4"]) == 0
    said = capfd.readouterr()
    name = "alpha0.5-k4-seed0"
    assert said.out == (
        f"{grid.PYTHON} MaxText/train.py configs/smoke.yml eval_interval=2 eval_steps=1 "
        "kd_teacher_parameters_path=gs://b/t steps=3 use_kd=true kd_alpha=0.5 kd_top_k=4 "
        "init_weights_seed=0 data_shuffle_seed=0 "
        f"run_name={name} base_output_directory={tmp_path} metrics_file={tmp_path}/{name}/metrics.jsonl\n"
    )
    assert said.err == ""
    assert not (tmp_path / name).exists()


# Runs that are there --------------------------------------------------------------------------------------------------


def test_a_run_is_finished_when_it_was_evaluated_after_its_last_step(write, tmp_path):
    (run, *_) = grid.load(write(), [])
    assert folders.last_evaluation(run, tmp_path) is None
    rows(tmp_path, run.name, (0, 5.0), (1, 4.0))
    assert folders.last_evaluation(run, tmp_path) is None
    path = tmp_path / run.name / "metrics.jsonl"
    complete = path.read_text()
    path.write_text(complete + '{"step": 2, "learning/loss": 1.0}\n{"step": 2, "evaluation/ce_loss": 3.0}')
    assert folders.last_evaluation(run, tmp_path) is None  # half a row
    path.write_text(path.read_text() + "\n")
    assert folders.last_evaluation(run, tmp_path) == {"step": 2, "evaluation/ce_loss": 3.0}


def test_a_folder_that_holds_other_settings_is_refused_and_left_alone(write, tmp_path):
    (run, *_) = grid.load(write(), [])
    folders.claim(run, tmp_path)
    folders.claim(run, tmp_path)
    (other, *_) = grid.load(write(), ["learning_rate=1"])
    before = (tmp_path / run.name / "sweep.json").read_text()
    with pytest.raises(ConfigError, match="other settings"):
        folders.claim(other, tmp_path)
    assert (tmp_path / run.name / "sweep.json").read_text() == before


def test_the_table_shows_mean_and_standard_deviation_over_finished_seeds(write, tmp_path):
    runs = grid.load(write(seeds=[0, 1, 2]), [])
    for seed, ce in enumerate((4.0, 5.0, 6.0)):
        rows(tmp_path, f"alpha0.5-full-seed{seed}", (0, 9.0, 9.0, 0.0), (2, ce, 0.5, 0.25))
    rows(tmp_path, "alpha0.5-k4-seed1", (2, 7.0))
    rows(tmp_path, "alpha1.0-k4-seed1", (1, 7.0, 1.0, 1.0))
    columns = [list(column.cells) for column in points.table(folders.results(runs, tmp_path)).columns]
    assert columns == [
        ["alpha0.5-full", "alpha0.5-k4", "alpha1.0-full", "alpha1.0-k4"],
        ["3", "1", "0", "0"],
        ["5.000 ± 1.000", "7.000", "-", "-"],
        ["0.500 ± 0.000", "-", "-", "-"],
        ["0.250 ± 0.000", "-", "-", "-"],
    ]


def test_finished_runs_are_kept_failed_ones_are_told_and_the_others_go_on(write, tmp_path, capsys, monkeypatch):
    """The trainer is stood in for by a function; the next test runs it."""
    path, out = write(), tmp_path / "out"
    started = []

    def trainer(command, cwd, stdout, stderr):
        name = next(word.partition("=")[2] for word in command if word.startswith("run_name="))
        started.append(name)
        if name.startswith("alpha0.5-k4"):
            return subprocess.CompletedProcess(command, 1)
        if not name.startswith("alpha1.0-full"):  # that one ends early, as after a SIGTERM
            rows(out, name, (2, 4.0, 0.1, 0.5))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trainer)
    assert sweep.main([str(path), "--out", str(out)]) == 1
    assert started == ["alpha0.5-full-seed0", "alpha0.5-k4-seed0", "alpha1.0-full-seed0", "alpha1.0-k4-seed0"]
    said = capsys.readouterr()
    first, *others = (line for line in said.out.splitlines() if line.strip() and not line.startswith("|"))
    assert first == "4 runs, 0 finished earlier"
    assert [line.partition("  $ ")[0] for line in others] == started
    told = said.err.splitlines()
    assert told[0].startswith("failed: alpha0.5-k4-seed0: status 1, see") and "train.log" in told[0]
    assert told[1].startswith("failed: alpha1.0-full-seed0: ended before its last step") and len(told) == 2
    lines = (out / "results.md").read_text().split("\n")
    assert [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "full" in line] == [
        ["alpha0.5-full", "1", "4.000", "0.100", "0.500"], ["alpha1.0-full", "0", "-", "-", "-"],
    ]  # fmt: skip
    height, width, _ = image.imread(out / "results.png").shape
    assert height > 100 and width > 1000
    started.clear()
    assert sweep.main([str(path), "--out", str(out)]) == 1
    assert started == ["alpha0.5-k4-seed0", "alpha1.0-full-seed0"]
    capsys.readouterr()
    assert sweep.main([str(path), "--out", str(out), "--only", "alpha0.5-full"]) == 0
    assert "alpha0.5-k4" not in capsys.readouterr().out
    assert (out / "results.md").read_text().split("\n") == lines


def test_a_folder_whose_config_has_changed_since_is_refused(write, tmp_path, monkeypatch):
    (run, *_) = grid.load(write(), [])
    folders.claim(run, tmp_path)
    folders.claim(run, tmp_path)
    changed = run.settings | {"learning_rate": 1.0}
    monkeypatch.setattr(grid.Run, "settings", changed)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        folders.claim(run, tmp_path)


def test_a_folder_that_another_process_trains_in_is_left_alone(write, tmp_path, monkeypatch):
    """As when a sweep was killed and its trainer was not."""
    (run, *_) = grid.load(write(), [])
    folders.claim(run, tmp_path)
    trainer = "import sys; print(flush=True); sys.stdin.read()"
    with (tmp_path / run.name / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        left = subprocess.Popen([sys.executable, "-c", trainer], stdin=subprocess.PIPE, stdout=log)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a second process was started"))
        assert folders.train(run, tmp_path) == f"{run.name}: another process trains in its folder"
    left.communicate()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    assert "status 3" in folders.train(run, tmp_path)


@pytest.mark.slow
@pytest.mark.e2e
def test_two_points_are_trained_and_compared(write, tmp_path):
    """One of the points has a fault that only the trainer can find: it fails, and the other is there."""
    kept = {"full": {"use_kd": False}, "no-teacher": {"kd_teacher_parameters_path": "/no/such/teacher"}}
    path = write(grid={"kept": kept})
    result = execute(["scripts/sweep.py"], [str(path), "--out", str(tmp_path / "out")], tmp_path)
    assert result.status == 1, result.output
    assert "failed: no-teacher-seed0: status 2, see" in result.output
    assert "/no/such/teacher" in (tmp_path / "out/no-teacher-seed0/train.log").read_text()
    final = [json.loads(line) for line in (tmp_path / "out/full-seed0/metrics.jsonl").read_text().splitlines()][-1]
    assert final["step"] == 2 and f"{final['evaluation/ce_loss']:.3f}" in result.output
