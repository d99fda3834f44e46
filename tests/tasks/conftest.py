"""What the tests of labelled tasks share."""

import pytest
import torch

from formary.model.topologies import build


@pytest.fixture
def learned():
    """A function that trains a task's fresh network on all its rows as one batch: (task, rows) -> network."""

    def learn(task, rows, *, steps=60, lr=3e-3, clip=None):
        torch.manual_seed(0)
        network = build(task.model_config(), seed=0)
        if hasattr(task, "prepare"):
            task.prepare(network)
        optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
        batch = task.collate(task.examples(rows, targets=True))
        network.train()
        for _ in range(steps):
            loss, count = task.loss(network, batch)
            (loss / count).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimiser.step()
            optimiser.zero_grad()
        return network.eval()

    return learn
