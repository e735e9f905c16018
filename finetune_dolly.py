"""Fine-tune a pretrained GPT on instructions.

python prepare_data.py --source dolly15k
python finetune_dolly.py --pretrained_checkpoint logs/model_19072.pt
python finetune_dolly.py --auto_resume                          # go on after an interruption
torchrun --standalone --nproc_per_node=4 finetune_dolly.py
"""

from training.run_settings import FinetuneSettings
from training.settings import run_script


def main(settings: FinetuneSettings) -> None:
    from training.launch import finetune

    finetune(settings)


if __name__ == "__main__":
    run_script(main, FinetuneSettings, "Fine-tune a pretrained GPT on instruction data.")
