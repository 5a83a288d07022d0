"""What every test stands on."""

import torch

# One thread: sums come out the same on every machine, and two processors are not fought over.
torch.set_num_threads(1)
