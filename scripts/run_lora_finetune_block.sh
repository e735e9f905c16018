#!/usr/bin/env bash
# LoRA on a model that was pruned in blocks, by configs/lora_block.yaml. Change the numbers here, or give others:
#
#   MODEL=logs/blocks/pruned.pt MAX_TRAIN_SAMPLES=1000 scripts/run_lora_finetune_block.sh
#
# Flags go on to finetune_dolly.py. Interrupted, the same command goes on.
set -euo pipefail

: "${MODEL:=pruned.pt}"               # the pruned model
: "${DATA:=c4}"                       # a prepared set, a .jsonl with "text", or c4, which is fetched from the Hub
: "${MAX_TRAIN_SAMPLES:=30000}"       # 1000 for a quick test, 100000 for all there is to gain
: "${BLOCK_SIZE:=1024}"               # context, tokens: 512 where memory is short, 2048 on a GPU of 80 GB
: "${NUM_EPOCHS:=1}"
: "${OUTPUT_DIR:=logs_finetune/lora_block}"
: "${PYTHON:=python}"

here="$(dirname "$0")/.."
if [ "$DATA" = c4 ] && [ ! -e c4 ] && [ ! -e "$here/data/c4/dataset.json" ]; then
  "$PYTHON" "$here/prepare_data.py" --source c4 --tokenizer "$MODEL" --max_documents "$((4 * MAX_TRAIN_SAMPLES))"
fi
exec "$PYTHON" "$here/finetune_dolly.py" --config "$here/configs/lora_block.yaml" --model_name_or_path "$MODEL" \
  --dataset_name "$DATA" --output_dir "$OUTPUT_DIR" --max_train_samples "$MAX_TRAIN_SAMPLES" \
  --block_size "$BLOCK_SIZE" --num_train_epochs "$NUM_EPOCHS" --auto_resume "$@"
