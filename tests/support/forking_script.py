"""Run by tests/faults/test_forks.py: a child that is forked after compile is refused, and data loaders fork at will."""

import os
import sys
import tempfile
import warnings

import torch
from spoiled import batch, spoiled

import stagecut

warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The rows of the batch."""

    def __init__(self) -> None:
        self.x, self.y = batch(marked=False)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def refused(pm: stagecut.Pipeline, loss: torch.Tensor, folder: str) -> str:
    """Try everything that workers or ranks would have to answer; return what went through, or hung on to its text."""
    x, y = batch(marked=False)
    calls = {
        "step": lambda: pm.step(x, target=y),
        "forward": lambda: pm(x),
        "backward": loss.backward,
        "evaluate": lambda: pm.evaluate(x),
        "verify": lambda: pm.verify(x, target=y),
        "profile": lambda: pm.profile(x, target=y),
        "replan": lambda: pm.replan(x, target=y),
        "stats": pm.stats,
        "restart": pm.restart,
        "save": lambda: pm.save(folder, 1),
        "load": lambda: pm.load(folder),
    }
    wrong = []
    for name, call in calls.items():
        try:
            call()
        except stagecut.StagecutError as error:
            if f"forked from process {os.getppid()} after stagecut.compile" not in error.message:
                wrong.append(f"{name}: {error}")
        else:
            wrong.append(f"{name} went through")
    pm.close()  # does no harm
    return "; ".join(wrong)


def main(launch: str) -> None:
    pm = spoiled("none", launch, n_stages=2)
    x, y = batch(marked=False)
    first = pm.step(x, target=y).loss
    loss = torch.nn.functional.cross_entropy(pm(x), y)
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            wrong = refused(pm, loss, folder)
            print(wrong or "all refused", flush=True)
            sys.exit(0)  # by way of atexit, which must leave the parent's workers alone
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    loss.backward()
    for _ in range(2):
        for rows, targets in torch.utils.data.DataLoader(Rows(), batch_size=8, num_workers=2):
            assert pm.step(rows, target=targets).loss == first
    assert pm.verify(x, target=y).ok
    pm.close()
    print("the parent goes on", flush=True)


main(sys.argv[1])
