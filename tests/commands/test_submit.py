"""Laws of a submission: what it refuses, what reaches the trainer, what xpk and Kubernetes are asked for."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import submit_xpk
import yaml
from conftest import ROOT, SMOKE
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from MaxText import upstream
from MaxText.cluster import slices
from MaxText.config.keys import ConfigError

IMAGE = "--docker-image=gcr.io/project/image:1"
# What the smoke config needs to be fit for a TPU.
TPU = ["hardware=tpu", "skip_jax_distributed_system=false", "metrics_file="]
KD = ["use_kd=true", "kd_teacher_parameters_path=gs://bucket/teacher/checkpoints", "kd_teacher_model_name=tiny-qwen3"]
# Settings that a shell, YAML or a template could spoil.
AWKWARD = [
    "kd_teacher_overrides={base_emb_dim: 96}",
    'tokenizer_path=gs://b/it\'s a "$vocab_size" {{x}} $HOME `x` # y',
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def arguments(*more, tpu="v5litepod-256", image=IMAGE, output="gs://bucket/runs"):
    common = [f"--tpu-type={tpu}", "--cluster=pod", f"--config={SMOKE}", image, f"--output={output}"]
    return [argument for argument in common if argument.partition("=")[2]] + list(more)


def printed(capsys, *more, **keys):
    assert submit_xpk.main(arguments(*more, *TPU, **keys)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def jobset(capsys, *more, **keys):
    return yaml.safe_load(printed(capsys, "--render-jobset", *more, **keys))


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def options(call):
    """The options of a printed call of xpk; each that may be given several times as it was given last."""
    words = shlex.split(call)
    assert words[:3] == ["xpk", "workload", "create"]
    return dict(word.split("=", 1) for word in words[3:])


# xpk ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [IMAGE, "--base-docker-image=gcr.io/project/base:1"])
def test_xpk_is_called_with_options_of_its_pinned_version_only(capsys, image):
    head, *known = (ROOT / "deploy/xpk_flags.txt").read_text().splitlines()
    pinned = re.search(r"^xpk==(.*)$", (ROOT / "deploy/requirements-xpk.txt").read_text(), re.MULTILINE)
    assert f"xpk {pinned.group(1)})" in head
    call = printed(capsys, "--dry-run", "--env=A=b", "--project=p", "--zone=z", image=image)
    assert set(options(call)) <= set(known)


def test_the_call_says_what_was_asked_for(capsys):
    call = printed(
        capsys, "--dry-run", "--num-slices=2", "--max-restarts=3", "--workload=kd-1", "--env=A=b c", "--env=D="
    )
    found = options(call)
    assert found["--tpu-type"] == "v5litepod-256" and found["--num-slices"] == "2" and found["--max-restarts"] == "3"
    assert found["--workload"] == "kd-1" and found["--cluster"] == "pod" and found["--docker-image"] == IMAGE[15:]
    assert [word for word in shlex.split(call) if word.startswith("--env=")] == ["--env=A=b c", "--env=D="]
    command = shlex.split(found["--command"])
    assert command[:6] == ["exec", "bash", "deploy/restartable.sh", "python", "MaxText/train.py", "configs/smoke.yml"]
    assert command[-2:] == ["run_name=kd-1", "base_output_directory=gs://bucket/runs"]


def test_settings_reach_the_trainer_as_they_were_typed(capsys, tmp_path):
    expected = ["MaxText/train.py", "configs/smoke.yml", *AWKWARD, *TPU, "run_name=smoke"]
    expected.append("base_output_directory=gs://bucket/runs")
    command = options(printed(capsys, "--dry-run", *AWKWARD))["--command"]
    shown = command.replace(
        "bash deploy/restartable.sh python ", f"{sys.executable} -c 'import sys; print(sys.argv[1:])' "
    )
    output = subprocess.run(["bash", "-c", f"({shown})"], capture_output=True, text=True, check=True).stdout
    assert output == f"{expected}\n"
    assert pod(jobset(capsys, *AWKWARD))["containers"][0]["command"][3:] == expected


@pytest.mark.e2e
def test_a_dry_run_says_the_call_and_nothing_else():
    """As a process of its own: it is at the engine's first import that others greet."""
    words = arguments("--dry-run", *TPU)
    result = subprocess.run([sys.executable, "scripts/submit_xpk.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "xpk workload create '--command=exec bash deploy/restartable.sh python MaxText/train.py configs/smoke.yml "
        "hardware=tpu skip_jax_distributed_system=false metrics_file= run_name=smoke "
        "base_output_directory=gs://bucket/runs' --cluster=pod --workload=smoke --tpu-type=v5litepod-256 "
        "--num-slices=1 --max-restarts=10 --restart-on-exit-codes=1 --termination-grace-period-seconds=300 "
        "--docker-image=gcr.io/project/image:1\n"
    )


def test_a_rendered_jobset_is_all_that_is_said(capfd):
    said = printed(capfd, "--render-jobset", "--env=A=b")
    lines = said.splitlines()
    assert lines[0] == (ROOT / "deploy/jobset.yaml").read_text().splitlines()[0]
    assert lines[-1].strip() == "google.com/tpu: 4"
    assert list(yaml.safe_load(said)) == ["apiVersion", "kind", "metadata", "spec"]


def test_bad_input_costs_one_message_and_status_2():
    command = [sys.executable, "scripts/submit_xpk.py", *arguments("--dry-run", *TPU, "kd_alhpa=0.5")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: kd_alhpa=0.5: no such key; did you mean kd_alpha")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["kd_alpha=3"], "kd_alpha=3"),
        (["steps=many"], "steps='many'"),
        (["model_name=tiny-lama"], "did you mean tiny-llama"),
        (["use_kd=true"], "kd_teacher_parameters_path=''"),
        (["use_kd=true", "kd_teacher_parameters_path=runs/teacher"], "kd_teacher_parameters_path='runs/teacher'"),
        ([*KD, "kd_teacher_overrides={vocab_size: 128}"], "vocab_size"),
        (["hardware=cpu"], "hardware='cpu'"),
        (["skip_jax_distributed_system=true"], "each of the 64 hosts"),
        (["ici_tensor_parallelism=3"], "ici_*_parallelism"),
        (["--num-slices=2", "dcn_data_parallelism=3"], "dcn_*_parallelism"),
        (["metrics_file=gs://bucket/rows"], "metrics_file"),
        (["run_name=x"], "--workload"),
        (["base_output_directory=gs://other"], "--output=gs://bucket/runs"),
        (["no_value"], "no_value"),
        (["steps=1\nsteps=2"], "line end"),
        (["--workload=Student"], "--workload=Student"),
        (["--workload=s-"], "--workload=s-"),
        (["--workload=" + "s" * 41], "at most 40"),
        (["--cluster=a_b"], "--cluster=a_b"),
        (["--num-slices=0"], "--num-slices=0"),
        (["--max-restarts=-1"], "--max-restarts=-1"),
        (["--env=1=2"], "--env=1=2"),
        (["--env=A"], "NAME=VALUE"),
        (['--env=A="b"'], "double quote"),
        (["--config=/etc/hosts"], "outside of this repository"),
        (["--config=" + str(ROOT / "configs/none.yml")], "no such config file"),
        (["--tpu-type=v5litepod-255"], "no such TPU slice; did you mean"),
        (["--tpu-type=v5litepod-4"], "xpk does not know it"),
        (["--tpu-type=v4-8", "--num-slices=2"], "several hosts"),
        (["--output=", "base_output_directory=runs"], "base_output_directory='runs'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_run_is_refused_before_it_is_submitted(more, said):
    with pytest.raises(ConfigError) as refusal:
        submit_xpk.main(arguments("--dry-run", *TPU, *more))
    assert said in str(refusal.value)


def test_without_xpk_nothing_is_submitted_and_the_message_says_where_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(submit_xpk, "XPK_VENV", tmp_path)
    with pytest.raises(ConfigError, match="xpk is neither"):
        submit_xpk.main(arguments(*TPU))


def test_xpk_gets_the_call_that_the_dry_run_prints_and_its_status_is_passed_on(capsys, monkeypatch, tmp_path):
    program = tmp_path / "xpk"
    program.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/words\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setattr(submit_xpk, "XPK_VENV", tmp_path)
    assert submit_xpk.main(arguments(*AWKWARD, *TPU)) == 7
    got = (tmp_path / "words").read_text().splitlines()
    assert ["xpk", *got] == shlex.split(printed(capsys, "--dry-run", *AWKWARD))


# JobSet ---------------------------------------------------------------------------------------------------------------


def test_the_jobset_holds_nothing_that_the_schemas_of_jobset_and_kubernetes_do_not_know(capsys):
    manifest = jobset(capsys, *KD, '--env=A=x "y"', "--num-slices=2")
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    assert pod(manifest)["containers"][0]["env"] == [{"name": "A", "value": 'x "y"'}]


def test_a_slice_is_a_job_and_a_host_is_a_pod(capsys):
    manifest = jobset(capsys, "--num-slices=2")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 64, 64, 0)
    assert pod(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    assert pod(manifest)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}


def test_the_failure_policy_names_the_container_that_runs(capsys):
    manifest = jobset(capsys)
    (rule,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == pod(manifest)["containers"][0]["name"]
    assert rule["onExitCodes"]["values"] == [2]  # what the trainer refuses; 1, 143 and signals start again


def test_every_slice_has_its_devices_and_a_label():
    for name, spec in upstream.topologies().items():
        if spec.platform == "tpu":
            tpu = slices.find_slice(name)
            cores = 2 if name.startswith("tpu7x") else 1  # devices of a chip
            assert tpu.hosts * tpu.chips_per_host * cores == spec.devices_per_slice, name
            assert slices.find_slice(tpu.xpk_type) == tpu


# The real xpk, which needs neither gcloud, kubectl nor a network for its dry run --------------------------------------


@pytest.fixture(scope="module")
def xpk(once):
    """The folder with the programs of the pinned xpk's environment, made here where docs/cluster.md has not made it."""
    if (submit_xpk.XPK_VENV / "xpk").exists():
        return submit_xpk.XPK_VENV

    def make(folder):
        uv = [sys.executable, "-m", "uv", "--quiet"]
        subprocess.run([*uv, "venv", "--python", sys.executable, folder], check=True)
        requirements = ROOT / "deploy/requirements-xpk.txt"
        subprocess.run([*uv, "pip", "install", "--python", folder / "bin/python", "-r", requirements], check=True)

    return once("xpk", make) / "bin"


def run_xpk(program, folder, *words):
    variables = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "TELEMETRY_ENABLED": "false"}
    result = subprocess.run([program, *words], cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def created(capsys, xpk, folder, *more, **keys):
    """The JobSet that xpk makes of our call."""
    where = ["--project=p", "--zone=us-east5-b"]  # else it asks gcloud
    call = shlex.split(printed(capsys, "--dry-run", *where, *more, **keys))
    run_xpk(xpk / "xpk", folder, *call[1:], "--dry-run", f"--output-manifest-file={folder}/jobset.yaml")
    return yaml.safe_load((folder / "jobset.yaml").read_text())


@pytest.mark.slow
@pytest.mark.e2e
def test_the_recorded_options_are_those_of_the_pinned_xpk(xpk, tmp_path):
    shown = run_xpk(xpk / "xpk", tmp_path, "workload", "create", "--help")
    flags = {flag for line in shown.splitlines() if line.startswith("  -") for flag in re.findall(r"--[a-z-]+", line)}
    assert sorted(flags) == (ROOT / "deploy/xpk_flags.txt").read_text().splitlines()[1:]


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("image", [IMAGE, "--base-docker-image=gcr.io/project/base:1"])
def test_xpk_makes_of_our_call_what_our_jobset_says(capsys, xpk, tmp_path, image):
    more = ["--num-slices=2", "--max-restarts=3", "--env=LIBTPU_INIT_ARGS=--a=1 --b={2}", *AWKWARD]
    theirs = created(capsys, xpk, tmp_path, *more, image=image)
    ours = jobset(capsys, *more)
    for path in (
        ("metadata", "annotations"),
        ("spec", "failurePolicy", "maxRestarts"),
        *(("spec", "replicatedJobs", 0, *rest) for rest in (("replicas",), ("template", "spec", "parallelism"))),
        *(("spec", "replicatedJobs", 0, "template", "spec", key) for key in ("completions", "backoffLimit")),
    ):
        assert reach(theirs, path) == reach(ours, path), path
    for key in ("nodeSelector", "hostNetwork", "dnsPolicy", "terminationGracePeriodSeconds", "restartPolicy"):
        assert pod(theirs)[key] == pod(ours)[key], key
    their_container, our_container = pod(theirs)["containers"][0], pod(ours)["containers"][0]
    for key in ("env", "resources", "securityContext"):
        assert their_container[key] == our_container[key], key
    assert f"(exec {shlex.join(our_container['command'])}) &" in their_container["command"][2]
    (rule,) = reach(theirs, ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules"))
    assert {1, 143} < set(rule["onExitCodes"]["values"]) and 2 not in rule["onExitCodes"]["values"]


def reach(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.slow
@pytest.mark.e2e
def test_xpk_knows_every_slice_by_the_same_hosts_topology_and_label(xpk, tmp_path):
    source = (
        "import json; from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as table; "
        "keys = 'gke_accelerator', 'topology', 'vms_per_slice', 'chips_per_vm'; "
        "print(json.dumps({name: [getattr(spec, key) for key in keys] for name, spec in table.items()}))"
    )
    known = json.loads(run_xpk(xpk / "python", tmp_path, "-c", source).splitlines()[-1])
    ours = [slices.find_slice(name) for name, spec in upstream.topologies().items() if spec.platform == "tpu"]
    assert {tpu.name for tpu in ours if tpu.xpk_type not in known} == slices.UNKNOWN_TO_XPK
    different = {
        tpu.name: (known[tpu.xpk_type], [tpu.accelerator, tpu.topology, tpu.hosts, tpu.chips_per_host])
        for tpu in ours
        if tpu.xpk_type in known
        and known[tpu.xpk_type] != [tpu.accelerator, tpu.topology, tpu.hosts, tpu.chips_per_host]
    }
    assert different == {}


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(("ending", "status"), [("exit 0", 143), ("exit 1", 1), ("", 143)])
def test_in_xpks_container_sigterm_reaches_the_trainer_and_a_saved_run_is_restarted(
    capsys, xpk, tmp_path, ending, status
):
    """The container's command as xpk writes it, with a shell in the trainer's place."""
    command = pod(created(capsys, xpk, tmp_path))["containers"][0]["command"]
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/restartable.sh").write_text((ROOT / "deploy/restartable.sh").read_text())
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    handler = f"trap 'echo saved; {ending}' TERM; " if ending else ""
    python.write_text(f"#!/bin/bash\n{handler}echo ready $1; while :; do sleep 0.05; done\n")
    python.chmod(0o755)
    variables = {"PATH": f"{python.parent}:/usr/bin:/bin"}
    options = {"cwd": tmp_path, "env": variables, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        try:
            for line in process.stdout:
                if line == "ready MaxText/train.py\n":
                    break
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status
    assert ("saved" in rest) == bool(ending)


@pytest.mark.slow
@pytest.mark.e2e
def test_xpk_puts_the_code_on_a_base_image_and_leaves_out_what_is_made_here(xpk, tmp_path):
    source = (
        f"from docker.utils import build; lines = open('{ROOT}/.dockerignore').read().splitlines(); "
        f"paths = build.exclude_paths('{ROOT}', [line for line in lines if line and line[0] != '#']); "
        "print(*sorted(paths), sep='\\n')"
    )
    paths = run_xpk(xpk / "python", tmp_path, "-c", source).splitlines()
    assert {"MaxText/train.py", "deploy/restartable.sh", "configs/smoke.yml", "pyproject.toml"} < set(paths)
    made = (".venv", ".git/", "runs", "build/")
    assert [path for path in paths if path.startswith(made) or "__pycache__" in path] == []


def test_a_job_may_compute_the_teachers_targets_instead(capsys):
    job = ["--cache-teacher", *KD[1:]]
    call = printed(capsys, "--dry-run", *job, "kd_cache_path=/mnt/cache")
    assert "python MaxText/cache_teacher.py configs/smoke.yml" in call and "MaxText/train.py" not in call
    for path in ("", "cache", "gs://bucket/cache"):
        with pytest.raises(ConfigError, match=f"kd_cache_path='{path}'"):
            submit_xpk.main(arguments("--dry-run", *job, *TPU, f"kd_cache_path={path}"))
