"""Text becomes batches: sources, templates, tokenizers, shards, loader. Knows nothing of models or ranks."""
