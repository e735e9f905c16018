"""Search for settings of a fine-tuning run: Optuna proposes, short runs try, the validation loss decides.

python tune.py --config configs/search_lora.yaml --trials 20
python tune.py --config configs/search_lora.yaml --trials 20 --storage sqlite:///search.db

The same command in several shells makes several workers; after an interruption it goes on. Exit code 2 for bad input.
"""

from training.heap import begin_with_tuned_heap
from training.search_settings import SearchSettings
from training.settings import run_script


def main(settings: SearchSettings) -> None:
    from training.search import search

    search(settings)


if __name__ == "__main__":
    begin_with_tuned_heap()
    run_script(main, SearchSettings, "Search for settings of a fine-tuning run.")
