"""Fine-tune a pretrained GPT on instructions.

python prepare_data.py --source dolly15k
python finetune_dolly.py --pretrained_checkpoint logs/model_19072.pt
python finetune_dolly.py --auto_resume                          # go on after an interruption
python finetune_dolly.py --finetune_method lora --plan          # what it would take in memory; nothing is loaded
torchrun --standalone --nproc_per_node=4 finetune_dolly.py

In stages, by any methods and rates: each starts from what the one before left, best.pt or (with
--load_best_model_at_end) final.pt. LoRA's is an adapter; train it on with --adapter, or merge it to go on otherwise:

python finetune_dolly.py --finetune_method lora --log_dir logs_finetune/one
python export.py merge logs_finetune/one/best.pt one.pt
python finetune_dolly.py --pretrained_checkpoint one.pt --max_lr 5e-6 --log_dir logs_finetune/two
"""

from training.heap import begin_with_tuned_heap
from training.run_settings import FinetuneSettings
from training.settings import run_script


def main(settings: FinetuneSettings) -> None:
    from training.launch import finetune

    finetune(settings)


if __name__ == "__main__":
    begin_with_tuned_heap()
    run_script(main, FinetuneSettings, "Fine-tune a pretrained GPT on instruction data.")
