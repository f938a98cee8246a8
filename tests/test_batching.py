"""Batches as large as fit, halved where memory runs out, without changing a sample."""

import itertools
import logging

import pytest
import torch
from toys import SmoothCNN, write_tiny_pipeline

from nrcg import EMA, ClassifierGuidance, GuidedDDPMPipeline
from nrcg.batching import first_batch, in_batches, is_out_of_memory
from nrcg.errors import DataError


def fits(most: int, error: type[Exception] = torch.OutOfMemoryError):
    """Work on a device that has room for `most` images at once; keeps the batches that it was given."""
    tried = []

    def work(batch: range) -> list[int]:
        tried.append(len(batch))
        if len(batch) > most:
            raise error("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")
        return list(batch)

    work.tried = tried
    return work


@pytest.mark.parametrize(
    "total, batch_size, most, tried",
    [
        (10, 4, 99, [4, 4, 2]),
        (10, 8, 5, [8, 4, 4, 2]),
        (9, 8, 1, [8, 4, 2] + 9 * [1]),
        (3, 8, 2, [3, 1, 1, 1]),  # the batch that failed had 3
    ],
)
def test_batches_are_halved_until_they_fit_and_nothing_is_lost(total, batch_size, most, tried):
    work = fits(most)
    assert list(itertools.chain(*in_batches(total, batch_size, work))) == list(range(total))
    assert work.tried == tried


def test_one_image_that_does_not_fit_is_one_line():
    with pytest.raises(DataError) as error:
        in_batches(4, 4, fits(0))
    assert str(error.value).startswith("one image alone does not fit into the memory (CUDA out of memory")
    assert "\n" not in str(error.value)


def test_other_errors_go_through():
    with pytest.raises(RuntimeError, match="shapes"):
        in_batches(4, 4, lambda batch: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_batch_that_runs_out_of_memory_changes_no_sample(tmp_path, caplog):
    """A U-Net with room for three images at once, and it runs out under way, in the third step of a batch."""
    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path))
    guidance = ClassifierGuidance(SmoothCNN(3), 1, scale=2.0, stabilizer=EMA(0.8))
    expected = pipe(num_samples=7, batch_size=3, guidance=guidance, trace=True, on_step=lambda done: None)
    forward, calls = pipe.unet.forward, []

    def small(x, t, **settings):
        calls.append(len(x))
        if len(x) > 3 and len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, t, **settings)

    pipe.unet.forward = small
    with caplog.at_level(logging.WARNING):
        found = pipe(num_samples=7, batch_size=7, guidance=guidance, trace=True, on_step=lambda done: None)
    assert calls[:4] == [7, 7, 7, 3]
    assert "out of memory with batches of 7; going on with 3" in caplog.text
    # Convolutions of another batch size may sum in another order.
    torch.testing.assert_close(found.samples, expected.samples, rtol=0, atol=2e-4)
    assert found.trace.grad_norm.shape == expected.trace.grad_norm.shape == (7, 5)


@pytest.mark.parametrize(
    ("asked", "device", "side", "expected"),
    [
        ("auto", "cpu", 24, 32),
        ("auto", "cpu", 256, 2),
        ("auto", "cuda", 64, 512),
        ("auto", "cuda", 4096, 1),
        (7, "cpu", 64, 7),
    ],
)
def test_auto_begins_with_what_a_device_usually_holds(asked, device, side, expected):
    assert first_batch(asked, torch.device(device), side * side) == expected


@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_auto_draws_the_same_samples(tmp_path, batch_size):
    pipe = GuidedDDPMPipeline.from_pretrained(write_tiny_pipeline(tmp_path))
    settings = {"num_samples": 5, "on_step": lambda done: None}
    found = pipe(batch_size=batch_size, guidance=ClassifierGuidance(SmoothCNN(3), 1), **settings)
    expected = pipe(batch_size=5, guidance=ClassifierGuidance(SmoothCNN(3), 1), **settings)
    torch.testing.assert_close(found.samples, expected.samples, rtol=0, atol=2e-4)
