"""Prune a GPT, recover what it lost, and compare it with what it was.

python prune.py --base_model logs/model_19072.pt --pruning_ratio 0.25 --prune_mlp --save_model --test_after_prune
python prune.py --base_model logs/model_19072.pt --method wanda --sparsity 0.5 --pattern 2:4 --out sparse.pt
python prune.py --base_model logs/model_19072.pt --pruning_ratio 0.25 --prune_mlp --save_model --finetune

Interrupted while it recovers, the same command goes on. docs/PRUNING.md says which method does what.
"""

from pruning.settings import PruneSettings
from training.heap import begin_with_tuned_heap
from training.settings import run_script


def main(settings: PruneSettings) -> None:
    """Prune, recover, compare."""
    from pruning.run import prune

    prune(settings)


if __name__ == "__main__":
    begin_with_tuned_heap()
    run_script(main, PruneSettings, "Prune a GPT, recover what it lost, and compare it with what it was.")
