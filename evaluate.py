"""Measure checkpoints: how likely they find texts and answers, what their own answers are worth, multiple choice.

    python evaluate.py --checkpoints A.pt B.pt --text book.txt --metrics perplexity --seq_len 1024 --stride 512
    python evaluate.py --checkpoints A.pt B.pt --data_dir dolly15k --metrics loss,accuracy,bleu,rouge --json scores.json
    python evaluate.py --checkpoints A.pt B.pt --multiple_choice hellaswag_val.jsonl

Prints, for each checkpoint and text, how the numbers were made, and one table at the end. Under torchrun the processes
share the work, and the numbers are the same. Exit code 2 for bad input.
"""

from evaluation.settings import EvaluateSettings
from training.settings import run_script


def main(settings: EvaluateSettings) -> None:
    """Evaluate, print the table, write the JSON file."""
    import shutil
    import sys

    from evaluation.evaluate import evaluate, files_beside
    from report.files import write_json
    from report.terminal import predictions, results_table
    from training.distributed import TIMEOUT, close_distributed, setup_distributed
    from training.watch_peers import watched_peers

    here = setup_distributed(settings.device)
    try:
        with watched_peers(here, TIMEOUT.total_seconds(), "{}. Nothing was written: evaluate again".format):
            results = evaluate(settings, here.device, say=print, processes=here)
    finally:
        close_distributed(here)
    if not here.is_main:
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    answers = predictions(results["results"], width)
    print(f"\n{answers}\n" if answers else "")
    print(results_table(results["results"]))
    if settings.json is not None:
        files = files_beside(results) if settings.json == "beside" else {settings.json: results}
        for path, content in files.items():
            print(f"\nResults: {write_json(path, content)}")


if __name__ == "__main__":
    run_script(main, EvaluateSettings, "Measure checkpoints: perplexity, held-out answers, multiple choice.")
