"""docs/scale.md says what the calculator says, and its jobs for Slurm and Kubernetes are whole."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from formary.cli.plan import plan as command
from formary.recipe.reading import parse
from formary.train.plan import PER_MACHINE, UTILISATION, plan

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "scale.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n\$ (formary plan [^\n]*)\n(.*?)```", PAGE, re.DOTALL)
OPTIONS = {"params": "params", "tokens": "tokens", "text": "text", "gpus": "gpus", "parallel": "parallel"}


def options(words):
    """`--params 1e9 --checkpointing` as the arguments of a function."""
    found, words = {}, list(words)
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        found[name] = words.pop(0) if words and not words[0].startswith("--") else True
    return found


@pytest.mark.parametrize(("line", "said"), CONSOLE, ids=[line for line, _ in CONSOLE])
def test_the_plans_of_the_page_are_what_the_command_prints(line, said, capsys):
    defaults = {"tokens": None, "text": None, "context": 1024, "vocab": 50304, "layers": None, "width": None}
    defaults |= {
        "parallel": "auto",
        "checkpointing": False,
        "micro_batch": None,
        "batch_tokens": 2**19,
        "mfu": UTILISATION,
    }
    command(**{**defaults, "price": None, "disk": "1e9", "json": False, **options(shlex.split(line)[2:])})
    assert capsys.readouterr().out == said


def published():
    lines = [
        line.strip("| \n").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`--params" in line
    ]
    assert len(lines) == 8
    return lines


@pytest.mark.parametrize("row", published(), ids=lambda row: row[0])
def test_the_table_of_published_trainings_is_computed(row):
    _, _, hours, planned, off, share, how, _ = row
    given = options(shlex.split(how.strip("`")))
    made = plan(
        parameters=float(given["params"]),
        tokens=float(given["tokens"]),
        gpus=given["gpus"],
        layers=int(given["layers"]),
        width=int(given["width"]),
        context=int(given.get("context", 1024)),
        vocab_size=int(given.get("vocab", 50304)),
    )
    took, ours = float(hours.replace(",", "")), made.gpus * made.seconds / 3600
    assert f"{ours:,.0f}" == planned
    assert abs(ours / took - 1 - float(off.strip("%")) / 100) < 0.015
    assert abs(UTILISATION * ours / took - float(share.strip("%")) / 100) < 0.015


def test_the_page_names_how_far_off_the_plan_is():
    off = {row[0]: int(row[4].strip("%")) for row in published()}
    ours = [value for name, value in off.items() if "llm.c" not in name]
    assert (min(ours), max(ours)) == (-26, 9) and "26 % too few hours to 9 % too many" in PAGE
    assert PER_MACHINE == 8


# Jobs --------------------------------------------------------------------------------------------------------------------


def test_the_slurm_job_starts_torchrun_on_every_machine(tmp_path):
    script = DOCS / "slurm" / "formary.sbatch"
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    known = {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "mem",
        "time",
        "signal",
        "requeue",
    }
    assert set(asked) == known | {"open-mode", "output"} and asked["ntasks-per-node"] == "1"
    for name, body in (
        ("scontrol", 'echo "$@" >> calls; echo node7; echo node8'),
        ("srun", 'printf "%s\\n" "$@" > started; exit 3'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41", "SLURM_JOB_NAME": "formary"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": "/home/me", "RECIPE": "my recipe.yaml"}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 3  # what srun ended with
    assert (tmp_path / "started").read_text().splitlines() == [
        *("torchrun", "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:29500"),
        *("--rdzv-id=41", "--max-restarts=3", "-m", "formary", "run", "my recipe.yaml", "--folder"),
        "/home/me/runs/formary",
    ]
    assert (tmp_path / "calls").read_text().splitlines() == ["show hostnames node[7-8]"]  # no requeue so early


def kind(name, **properties):
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": name}


INT, TEXT = {"type": "integer"}, {"type": "string"}
NAMED = {"type": "array", "items": {"type": "object", "required": ["name"]}}
# After kubeflow.org_pytorchjobs.yaml of training-operator 1.9, the parts that the example uses, closed.
PYTORCHJOB = kind(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=kind(
        ["pytorchReplicaSpecs"],
        nprocPerNode=TEXT,
        elasticPolicy=kind(
            [], rdzvBackend=TEXT, minReplicas=INT, maxReplicas=INT, maxRestarts=INT, rdzvId=TEXT, rdzvPort=INT
        ),
        runPolicy=kind(
            [], cleanPodPolicy={"enum": ["None", "Running", "All"]}, backoffLimit=INT, activeDeadlineSeconds=INT
        ),
        pytorchReplicaSpecs=kind(
            [],
            **dict.fromkeys(
                ("Master", "Worker"),
                kind(
                    ["replicas", "template"],
                    replicas=INT,
                    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
                    template=kind(
                        ["spec"],
                        metadata={"type": "object"},
                        spec=kind(
                            ["containers"],
                            containers=NAMED,
                            volumes=NAMED,
                            terminationGracePeriodSeconds=INT,
                            nodeSelector={"type": "object"},
                        ),
                    ),
                ),
            ),
        ),
    ),
)


def test_the_kubernetes_job_is_of_the_operators_form_and_its_recipe_is_a_recipe():
    found = {one["kind"]: one for one in yaml.safe_load_all((DOCS / "kubernetes" / "formary.yaml").read_text())}
    job = found["PyTorchJob"]
    jsonschema.Draft202012Validator(PYTORCHJOB).validate(job)
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it
    assert container["command"][:4] == ["torchrun", "-m", "formary", "run"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    assert (
        job["spec"]["elasticPolicy"]["minReplicas"] <= worker["replicas"] <= job["spec"]["elasticPolicy"]["maxReplicas"]
    )
    volumes = {volume["name"]: volume for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["recipe"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    recipe = parse(found["ConfigMap"]["data"]["recipe.yaml"])
    assert (
        recipe.machine.parallel == "fsdp" and recipe.train.batch_size % (2 * 8 * (recipe.train.micro_batch or 1)) == 0
    )


def test_every_file_that_the_page_names_is_there():
    assert {
        path for path in re.findall(r"\]\((slurm/\S+|kubernetes/\S+)\)", PAGE) if not (DOCS / path).exists()
    } == set()
    assert json.dumps(CONSOLE)
