"""Training batches: their order, and the same images whichever way they come."""

import threading
import time

import numpy as np
import pytest
import torch

from nrcg.training.feed import PREFETCH, TrainingImages, batches_from, epoch_batches, steps_per_epoch

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path) -> TrainingImages:
    """40 images of 4 x 6 pixels in a memory map, labels 0..39."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), dtype=np.uint8))
    return TrainingImages(np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(40), CPU)


@pytest.mark.parametrize(("num_images", "batch_size"), [(40, 8), (41, 8), (47, 8), (5, 8), (8, 8), (1, 1)])
def test_an_epoch_is_a_permutation_without_its_incomplete_batch(num_images, batch_size):
    batches = list(epoch_batches(num_images, batch_size, seed=3, epoch=2))
    assert len(batches) == steps_per_epoch(num_images, batch_size)
    assert {len(batch) for batch in batches} == {min(batch_size, num_images)}
    positions = torch.cat(batches).tolist()
    assert len(set(positions)) == len(positions)
    assert set(positions) <= set(range(num_images))


def test_an_epochs_order_is_a_function_of_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(list(epoch_batches(40, 8, seed, epoch))).tolist()

    first = order(0, 0)
    torch.manual_seed(99)
    torch.rand(7)
    assert order(0, 0) == first
    # From another process.
    assert torch.cat(list(epoch_batches(8, 8, 0, 0))).tolist() == [3, 6, 7, 0, 5, 2, 1, 4]
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 15])
def test_a_training_goes_on_at_its_step(step):
    whole = [batch.tolist() for epoch in range(3) for batch in epoch_batches(42, 8, 1, epoch)]
    assert len(whole) == 15
    assert [batch.tolist() for batch in batches_from(42, 8, 1, step, 3)] == whole[step:]


def test_batches_hold_the_images_asked_for_in_that_order(images):
    indices = torch.tensor([7, 0, 39, 8])
    x, labels = images.batch(indices)
    expected = images._array[indices.numpy()].transpose(0, 3, 1, 2) / 127.5 - 1
    # float32 against float64: a rounding of 1e-7 at values up to 1.
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert labels.tolist() == [7, 0, 39, 8]
    assert images.image_shape == (3, 4, 6)


@pytest.mark.parametrize("count", [0, 1, 3, 30])
def test_reading_ahead_gives_the_same_batches_in_the_same_order(images, count):
    order = list(batches_from(40, 8, 0, 0, 6))[:count]
    read = list(images.batches(order))
    assert len(read) == count
    for (x, labels), indices in zip(read, order, strict=True):
        assert labels.tolist() == indices.tolist()
        assert torch.equal(x, images.batch(indices)[0])


def test_the_next_batches_are_read_while_one_is_in_use(images, monkeypatch):
    read = []
    plain = TrainingImages._read

    def spy(self, indices):
        read.append((indices.tolist(), threading.current_thread() is threading.main_thread()))
        return plain(self, indices)

    monkeypatch.setattr(TrainingImages, "_read", spy)
    order = [torch.tensor([index]) for index in range(20)]
    feed = images.batches(order)
    next(feed)
    end = time.monotonic() + 10
    while len(read) < 1 + PREFETCH and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(read) == [([index], False) for index in range(1 + PREFETCH)]  # these, and no more


def test_a_reader_that_is_given_up_leaves_no_thread(images):
    feed = images.batches(batches_from(40, 8, 0, 0, 100))
    next(feed)
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_what_fails_in_a_reader_is_raised_where_the_batch_is_wanted(images):
    feed = images.batches([torch.tensor([0]), torch.tensor([40])])
    assert next(feed)[1].tolist() == [0]
    with pytest.raises(IndexError):
        next(feed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident_bytes", [0, None], ids=["read ahead", "resident"])
def test_a_gpu_sees_the_same_batches(images, resident_bytes):
    on_gpu = TrainingImages(images._array, np.arange(40), torch.device("cuda"), resident_bytes)
    order = list(batches_from(40, 8, 0, 0, 3))
    for (x, labels), indices in zip(on_gpu.batches(order), order, strict=True):
        assert labels.tolist() == indices.tolist()
        assert torch.equal(x.cpu(), images.batch(indices)[0])
