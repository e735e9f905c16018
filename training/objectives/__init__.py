"""What a run minimises: the loss on given answers, on preferences between two, or a reward of new ones."""
