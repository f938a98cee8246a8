"""Settings of all tests."""

import gc

import pytest

FIRST = ("test_workflow.py", "test_tracking.py", "test_distributed.py", "test_training.py", "test_faces.py")
"""Files that take longest: begun first, none of them is left to run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests, and ready the process that runs them."""
    import torch

    # The tensors are tiny: threads gain nothing, and on a busy machine waiting for them costs ten times the work.
    torch.set_num_threads(1)
    # Modules stay: to look through them for garbage again and again would take a part of the tests' time.
    gc.collect()
    gc.freeze()
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
