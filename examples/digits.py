"""Train a small ResNet on handwritten digits in a two-stage pipeline on two CPU workers, and prove that it is exact.

Real images (scikit-learn's bundled digits, no download). Run it with ``make demo``; it writes ``demo/plan.json``,
``demo/plan.svg`` (the cut and the timeline) and ``demo/plan.html`` (the report).
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import stagecut
from stagecut.models.digits import load_digits
from stagecut.models.resnet import DigitsResNet
from stagecut.partitioner.measured_run import measured_run
from stagecut.tools.report import Shown, report_html
from stagecut.tools.svg import plan_svg

GOAL = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    torch.manual_seed(0)
    data = load_digits()
    model = DigitsResNet()
    batches = -(-len(data.x_train) // options.batch)
    print(
        f"{len(data.x_train)} training images, {len(data.x_test)} test images, {batches} batches an epoch, "
        f"the last of {len(data.x_train) - (batches - 1) * options.batch}"
    )

    pm = stagecut.compile(model, devices=[0, 1], loss_fn=F.cross_entropy, stages=2, schedule="1f1b", microbatches=4)
    with pm:
        first = slice(0, options.batch)
        pm.prepare(data.x_train[first])
        print(f"\n{pm.plan}\n")
        profile = pm.profile(data.x_train[first], target=data.y_train[first], steps=15)
        predicted_s, measured_s = pm.plan.prediction.step_s, profile.step_s
        print(
            f"step: predicted {predicted_s * 1e3:.1f} ms, measured {measured_s * 1e3:.1f} ms "
            f"({predicted_s / measured_s - 1:+.0%})"
        )
        print(profile.timeline.grid())
        print(f"\nparity: {pm.verify(data.x_train[first], target=data.y_train[first])}")
        ragged = slice((batches - 1) * options.batch, None)
        print(f"parity of the last, short batch: {pm.verify(data.x_train[ragged], target=data.y_train[ragged])}\n")

        accuracy = train(pm, data, options.epochs, options.batch)
        print(f"\ntest accuracy {accuracy:.2%}")

        pm.plan.save(options.out / "plan.json")
        simulated = pm.plan.predicted
        (options.out / "plan.svg").write_text(plan_svg(pm.plan, simulated, profile.timeline))
        run = measured_run(pm.plan, profile.timeline, profile.steps_s)
        (options.out / "plan.html").write_text(report_html([Shown("plan.json", pm.plan, run)]))
    print(f"wrote {', '.join(str(options.out / name) for name in ('plan.json', 'plan.svg', 'plan.html'))}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if accuracy < GOAL:
        raise SystemExit(f"test accuracy {accuracy:.2%} is below {GOAL:.0%}")


def train(pm: stagecut.Pipeline, data: object, epochs: int, batch: int) -> float:
    """Run a plain training loop and return the test accuracy."""
    optimizer = torch.optim.AdamW(pm.parameters(), 1e-3)
    accuracy = 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(data.x_train))
        total, start = 0.0, time.perf_counter()
        for rows in order.split(batch):
            loss = pm.step(data.x_train[rows], target=data.y_train[rows]).loss
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        pm.eval()
        output = pm.evaluate(data.x_test).output
        pm.train()
        accuracy = (output.argmax(dim=1) == data.y_test).float().mean().item()
        seconds, mean = time.perf_counter() - start, total / len(order)
        print(f"epoch {epoch + 1:>2}/{epochs}  loss {mean:.4f}  test accuracy {accuracy:.2%}  {seconds:.1f} s")
    return accuracy


main()
