"""How long planning takes for a model of many layers on many described devices: seconds, the plan, peak memory.

python benchmarks/plan_gpt3.py
python benchmarks/plan_gpt3.py --layers 24 --cluster sim:32x8xA100-80GB --rows 384
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import torch

import stagecut
from stagecut.models.transformer import GPT


def main() -> None:
    """Plan once and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=96, help="of 12,288 features and 96 heads; 96 are GPT-3 175B")
    parser.add_argument("--cluster", default="sim:128x8xA100-80GB")
    parser.add_argument("--rows", type=int, default=1536, help="sequences of 2,048 tokens in a batch")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model = GPT(51200, 12288, options.layers, 96, 2048, tied=False).bfloat16()
    tokens = torch.zeros(options.rows, 2048, dtype=torch.long)
    start = time.perf_counter()
    plan = stagecut.plan(model, options.cluster, example_inputs=(tokens,))
    seconds = time.perf_counter() - start
    print(str(plan).splitlines()[0])
    print("\n".join(plan.reasons))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{seconds:.1f} s, {time.process_time():.1f} s of CPU with the imports, peak memory {peak / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
