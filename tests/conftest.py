"""Settings of all tests."""

import pytest
import torch

# The tests' tensors are tiny: threads gain nothing, and on a busy machine waiting for them costs ten times the work.
torch.set_num_threads(1)

FIRST = ("test_workflow.py", "test_cli.py", "test_tracking.py", "test_sharding.py", "test_training.py", "test_faces.py")
"""Files that take longest: begun first, none of them is left to run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
