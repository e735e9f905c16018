"""What a model is worth: perplexity, held-out answers, multiple choice, lm-eval; and answers side by side."""
