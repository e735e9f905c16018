#!/usr/bin/env bash
# Perplexity of a model that was pruned in blocks, and of the same with the LoRA of run_lora_finetune_block.sh.
#
#   MODEL=logs/blocks/pruned.pt INPUT=wikitext2-test.txt scripts/evaluate_lora_block.sh
#
# Flags go on to evaluate.py. To have base and LoRA as one model: python export.py merge ADAPTER merged.pt
set -euo pipefail

: "${MODEL:=pruned.pt}"               # the pruned model
: "${OUTPUT_DIR:=logs_finetune/lora_block}"
: "${ADAPTER:=$OUTPUT_DIR/best.pt}"   # its LoRA
: "${DATA:=c4}"                       # the prepared set whose validation split is scored, where no INPUT is given
: "${INPUT:=}"                        # a text file to score instead
: "${BLOCK_SIZE:=1024}"               # length of a window, tokens
: "${PYTHON:=python}"

here="$(dirname "$0")/.."
text=(--data_dir "$DATA")
if [ -n "$INPUT" ]; then
  text=(--input "$INPUT")
fi
exec "$PYTHON" "$here/evaluate.py" --checkpoints "$MODEL" "$ADAPTER" "${text[@]}" --block_size "$BLOCK_SIZE" \
  --stride "$BLOCK_SIZE" "$@"
