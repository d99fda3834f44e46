"""Several processes learn as one does: same losses, same weights, same checkpoints, whatever their number."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from job import Case, run  # the file that the processes run

JOB = Path(__file__).with_name("job.py")
DOUBLE, SINGLE = 1e-5, 1e-3


def in_processes(cases, folder: Path, count: int) -> None:
    """Run the cases in `count` processes, as torchrun would start them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(folder)],
            env=common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [worker.communicate(timeout=400)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        kind: [record[kind] for record in records if kind in record]
        for kind in ("loss", "grad_norm", "validation_loss")
    }


MATTERS = [
    Case("text-ddp", double=True),
    Case("text-fsdp", double=True, parallel="fsdp"),
    Case("text-single-ddp"),
    Case("text-single-fsdp", parallel="fsdp"),
    Case("rows-ddp", task="classify", double=True),
    Case("rows-fsdp", task="classify", double=True, parallel="fsdp"),
    Case("pairs-ddp", task="denoise", double=True),
    Case("pairs-fsdp", task="denoise", double=True, parallel="fsdp"),
    Case("pieces-ddp", double=True, settings=("micro_batch=2",)),
    Case("pieces-fsdp", double=True, parallel="fsdp", settings=("micro_batch=2",)),
    Case("uneven-ddp", double=True, settings=("batch=5", "micro_batch=2")),
    Case("uneven-fsdp", double=True, parallel="fsdp", settings=("batch=1",)),
    Case("muon-ddp", double=True, settings=("optimiser.name=muon",)),
    Case("muon-fsdp", double=True, parallel="fsdp", settings=("optimiser.name=muon",)),
    Case("average-fsdp", double=True, parallel="fsdp", settings=("ema=0.9", "optimiser.l1=0.001")),
    Case("recomputed-ddp", double=True, settings=("activation_checkpointing=true",)),
    Case("recomputed-fsdp", double=True, parallel="fsdp", settings=("activation_checkpointing=true",)),
    Case("score-fsdp", double=True, parallel="fsdp", settings=("sample_every=4",)),
    Case("score-ddp", double=True, settings=("sample_every=4",)),
    Case("sgd-fsdp", double=True, parallel="fsdp", settings=("optimiser.name=sgd", "optimiser.lr=0.1")),
]
BY_ONE = {case.name: dataclasses.replace(case, parallel="auto") for case in MATTERS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of the same trainings by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for case in BY_ONE.values():
        run(case, one)
    in_processes(MATTERS, two, 2)
    return one, two


@pytest.mark.parametrize("name", list(BY_ONE))
def test_two_processes_learn_what_one_learns(trained, name):
    one, two = trained
    near = DOUBLE if BY_ONE[name].double else SINGLE
    by_one, by_two = losses(one, name), losses(two, name)
    assert len(by_one["loss"]) == 8 and len(by_one["validation_loss"]) == 2
    for kind in by_one:
        np.testing.assert_allclose(by_two[kind], by_one[kind], rtol=near)
    weights, others = (load_file(folder / name / "final.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=near, atol=near)


def test_the_leader_alone_writes_and_its_checkpoints_are_laid_out_as_those_of_one_process(trained):
    _one, _two = trained
    for name in BY_ONE:
        (theirs,), (ours,) = (sorted((folder / name / "checkpoints").glob("step-00000008")) for folder in trained)
        for file in ("model", "optimiser", *(["ema"] if name.startswith("average") else [])):
            a, b = load_file(theirs / f"{file}.safetensors"), load_file(ours / f"{file}.safetensors")
            assert {key: (tensor.shape, tensor.dtype) for key, tensor in a.items()} == {
                key: (tensor.shape, tensor.dtype) for key, tensor in b.items()
            }


def test_a_training_goes_on_with_another_number_of_processes_and_another_kind(tmp_path, trained):
    one, _ = trained
    whole = load_file(one / "text-ddp" / "final.safetensors")
    stopped = [
        Case("text-ddp", double=True, parallel="ddp", stop=2),
        Case("text-fsdp", double=True, parallel="fsdp", stop=2),
        Case("average-fsdp", double=True, parallel="fsdp", stop=2, settings=("ema=0.9", "optimiser.l1=0.001")),
        Case("muon-ddp", double=True, parallel="ddp", stop=2, settings=("optimiser.name=muon",)),
    ]
    in_processes(stopped, tmp_path, 2)
    assert [path.name for path in (tmp_path / "text-ddp" / "checkpoints").iterdir()] == ["step-00000003"]
    swapped = {"ddp": "fsdp", "fsdp": "ddp"}
    on = [dataclasses.replace(case, parallel=swapped[case.parallel], stop=4) for case in stopped]
    in_processes(on, tmp_path, 2)
    for case in on:
        assert "step-00000005" in [path.name for path in (tmp_path / case.name / "checkpoints").iterdir()]
        run(dataclasses.replace(case, stop=None), tmp_path)
        end = load_file(tmp_path / case.name / "final.safetensors")
        for key, tensor in load_file(one / case.name / "final.safetensors").items():
            torch.testing.assert_close(end[key], tensor, rtol=DOUBLE, atol=DOUBLE)
    assert whole


def test_what_one_process_began_two_end(tmp_path, trained):
    one, _ = trained
    from formary.train.loop import Interrupted

    with pytest.raises(Interrupted):
        run(Case("text-fsdp", double=True, stop=2), tmp_path)
    in_processes([Case("text-fsdp", double=True, parallel="fsdp")], tmp_path, 2)
    end = load_file(tmp_path / "text-fsdp" / "final.safetensors")
    for key, tensor in load_file(one / "text-fsdp" / "final.safetensors").items():
        torch.testing.assert_close(end[key], tensor, rtol=DOUBLE, atol=DOUBLE)
