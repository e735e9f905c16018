"""What pruning computes: statistics of a network's inputs, scores of its parts, the network without some of them."""
