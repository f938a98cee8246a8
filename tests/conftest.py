"""Settings of all tests."""

import torch

# The tests' tensors are tiny: threads gain nothing, and on a busy machine waiting for them costs ten times the work.
torch.set_num_threads(1)
