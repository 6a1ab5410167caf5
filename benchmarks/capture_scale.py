"""How long capture takes and how much memory it needs on large models: `python benchmarks/capture_scale.py`.

Every model is captured in a process of its own. Seconds are those of ``stagecut.capture`` alone; memory is the highest
resident size of the process, with torch itself and the model in it. Models on the meta device have no weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import stagecut
from stagecut.models.transformer import GPT
from stagecut.vision_compat import import_torchvision

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


def resnet152() -> Case:
    """ResNet-152 at 224 x 224."""
    return import_torchvision().models.resnet152(), (torch.randn(2, 3, 224, 224),)


def gpt2_xl() -> Case:
    """GPT-2 XL's shape: 48 layers, width 1600, vocabulary 50257, 1024 tokens."""
    with torch.device("meta"):
        model = GPT(vocab=50257, d_model=1600, n_layers=48, n_heads=25, max_len=1024)
        return model, (torch.zeros(2, 1024, dtype=torch.long),)


def transformer_96() -> Case:
    """96 layers, width 768, with weights."""
    return GPT(vocab=1000, d_model=768, n_layers=96, n_heads=12, max_len=128), (torch.zeros(2, 128, dtype=torch.long),)


def llama_70b() -> Case:
    """Llama 2 70B's shape from transformers, on the meta device, 4096 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config), (torch.zeros(2, 4096, dtype=torch.long),)


CASES: dict[str, Callable[[], Case]] = {f.__name__: f for f in (resnet152, gpt2_xl, transformer_96, llama_70b)}


def measure(name: str) -> dict[str, object]:
    """Capture one model in this process."""
    if name == "llama_70b":
        import_torchvision()  # transformers imports it
    torch.set_num_threads(1)
    model, args = CASES[name]()
    stagecut.capture(nn.Linear(2, 2), (torch.zeros(2, 2),))  # what torch imports on first use is not the model's
    start = time.perf_counter()
    caught = stagecut.capture(model, args)
    seconds = time.perf_counter() - start
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ops": sum(1 for node in caught.graph.nodes if node.op.startswith("call_")),
        "opaque": len(caught.opaque),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time(), 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Measure all cases, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one, in this process, as JSON")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the median is reported")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case)))
        return
    print("| model | parameters | ops | opaque | seconds | peak GiB |\n|---|---:|---:|---:|---:|---:|")
    for name in CASES:
        runs = []
        for _ in range(given.repeats):
            done = subprocess.run([sys.executable, __file__, "--case", name], capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                break
            runs.append(json.loads(done.stdout))
        if runs:
            row = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
            size = f"{row['parameters'] / 1e9:.2f} B"
            print(
                f"| {name} | {size} | {row['ops']} | {row['opaque']} | {row['seconds']} | {row['peak_gib']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
