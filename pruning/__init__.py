"""What `prune.py` does: text for calibration, statistics on disk, the pruning itself, recovery, and the report."""
