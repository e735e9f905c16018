"""Train a GPT from scratch on token shards.

    python prepare_data.py --source pydocs --data_dir pydocs
    python train_gpt2.py --preset tiny --data_dir pydocs --log_dir logs
    torchrun --standalone --nproc_per_node=8 train_gpt2.py          # GPT-2 124M on 10B FineWeb-Edu tokens

An interrupted run goes on with the same command and --auto_resume.
"""

from training.heap import begin_with_tuned_heap
from training.run_settings import TrainSettings
from training.settings import run_script


def main(settings: TrainSettings) -> None:
    from training.launch import pretrain

    pretrain(settings)


if __name__ == "__main__":
    begin_with_tuned_heap()
    run_script(main, TrainSettings, "Train a GPT from scratch on a folder of token shards.")
