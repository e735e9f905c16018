"""What a network takes on 8 to 1,024 GPUs: memory, traffic, and how often to save. Worked out, not measured.

python scripts/scale.py --preset 1558M
python scripts/scale.py --preset llama-1558M --gpus 16 256 --batch_size 4 --grad_accum 8 --mtbf_hours 20000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.config import PRESETS, GPTConfig, preset
from training.scale import (
    STRATEGIES,
    Cluster,
    checkpoint_bytes,
    daly_interval,
    goodput,
    plan_scale,
    simulate,
)

# Beyond the presets, as Llama 2's 7B and Llama 3's 70B: layers, heads, kv heads, width, MLP.
LARGER = {"7B": (32, 32, 32, 4096, 11008), "70B": (80, 64, 8, 8192, 28672)}
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "mlp_dim")


def network(name: str) -> GPTConfig:
    """A preset, or a larger Llama."""
    if name not in LARGER:
        return preset(name)
    sizes = dict(zip(SIZES, LARGER[name]))
    return preset("llama-1558M", **sizes, head_dim=128, block_size=4096, tie_embeddings=False, vocab_size=32_000)


def main() -> None:
    """Two tables: a step by strategy, and saving."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1558M", choices=[*PRESETS, *LARGER], help="network (default 1558M)")
    parser.add_argument("--gpus", type=int, nargs="*", default=[8, 64, 1024], help="default 8 64 1024")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a micro-batch on a GPU (default 8)")
    parser.add_argument("--grad_accum", type=int, default=2, help="micro-batches of a step on a GPU (default 2)")
    parser.add_argument("--memory_gb", type=float, default=80.0, help="of a GPU (default 80)")
    parser.add_argument("--mtbf_hours", type=float, default=50_000.0, help="between failures of one GPU (50000)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute each block in backward")
    arguments = parser.parse_args()
    config = network(arguments.preset)
    clusters = [
        Cluster(gpus, memory=arguments.memory_gb * 1e9, mtbf=arguments.mtbf_hours * 3600) for gpus in arguments.gpus
    ]
    how = {name: getattr(arguments, name) for name in ("batch_size", "grad_accum", "gradient_checkpointing")}
    print("| GPUs | strategy | GB a GPU | computing, s | traffic, s | efficiency |\n" + "| --- " * 6 + "|")
    for cluster in clusters:
        for plan in (plan_scale(config, cluster, strategy, **how) for strategy in STRATEGIES):
            fits = "" if plan.fits else " (too much)"
            print(
                f"| {cluster.gpus:,} | {plan.strategy} | {plan.memory / 1e9:.1f}{fits} | {plan.compute_s:.2f} | "
                f"{plan.traffic_s:.2f} | {plan.efficiency:.0%} |"
            )
    size = checkpoint_bytes(plan.parameters)
    print(f"\n{plan.parameters:,} parameters, a full checkpoint of {size / 1e9:,.1f} GB")
    print("| GPUs | a failure every | a save takes | save every | goodput | played out |\n" + "| --- " * 6 + "|")
    for cluster in clusters:
        M, cost = cluster.mean_time_to_failure, size / cluster.disk
        interval = daly_interval(cost, M)
        share, failures = simulate(interval, cost, cluster.restart, M, 500 * M)
        print(
            f"| {cluster.gpus:,} | {M / 3600:,.0f} h | {cost:.0f} s | {interval / 60:.0f} min | "
            f"{goodput(interval, cost, cluster.restart, M):.2%} | {share:.2%} ({failures} failures) |"
        )


if __name__ == "__main__":
    main()
