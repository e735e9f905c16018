"""What test_training_meeting.py launches: every process dies once; after the restart rank 0 comes late."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from training.meeting import own_store

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
if again and rank == 0:
    time.sleep(10)  # gloo gives up after 8: refused by the address that the dead rank 0 left in the store
wait = timedelta(seconds=60)
store = own_store(rank, world_size, wait)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=wait)
dist.barrier()
if not again:
    os._exit(1)
dist.destroy_process_group()
