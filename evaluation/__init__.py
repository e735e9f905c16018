"""What a model is worth: perplexity and, later, text metrics and multiple choice."""
