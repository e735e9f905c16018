"""Measure checkpoints: perplexity of any text or prepared set.

    python evaluate.py --checkpoints logs/model_00999.pt --input book.txt
    python evaluate.py --checkpoints A.pt B.pt --metrics perplexity --data_dir dolly15k --split val --json scores.json

Prints, for each checkpoint and text, how the number was made, and one table at the end. Exit code 2 for bad input.
"""

from evaluation.settings import EvaluateSettings
from training.settings import run_script


def main(settings: EvaluateSettings) -> None:
    """Evaluate, print the table, write the JSON file."""
    from evaluation.evaluate import evaluate
    from report.files import write_json
    from report.terminal import results_table
    from training.distributed import choose_device

    results = evaluate(settings, choose_device(settings.device), say=print)
    print("\n" + results_table(results["results"]))
    if settings.json is not None:
        print(f"\nResults: {write_json(settings.json, results)}")


if __name__ == "__main__":
    run_script(main, EvaluateSettings, "Measure checkpoints: perplexity of any text or prepared set.")
