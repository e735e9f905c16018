"""Files of models: our checkpoints, and the one door that opens any of them."""
