"""The noise against published vectors, the normal distribution, and the promise that it belongs to its sample."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nrcg.diffusion.noise import philox4x32, sample_noise, spawn_seed

# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_broadcasts_its_counters():
    words = philox4x32((torch.arange(3).reshape(1, 3), *(torch.zeros(2, 1, dtype=torch.int64),) * 3), (0, 0))
    assert {tuple(word.shape) for word in words} == {(2, 3)}
    assert [int(word[1, 0]) for word in words] == list(KNOWN[0][2])


def test_box_muller_of_the_known_words():
    # By hand from the first vector: u = (word + 1) / 2^32, r = sqrt(-2 ln u1), (r cos 2 pi u2, r sin 2 pi u2).
    u = [(word + 1) / 2**32 for word in KNOWN[0][2]]
    expected = []
    for u1, u2 in (u[:2], u[2:]):
        radius = math.sqrt(-2 * math.log(u1))
        expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    # float32 angles up to 2 pi are off by up to 5e-7.
    torch.testing.assert_close(sample_noise(0, [0], 0, (4,))[0], torch.tensor(expected), rtol=0, atol=2e-6)


# --- distribution ----------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(x: torch.Tensor) -> float:
    """sup |F_n - Phi|."""
    x = x.flatten().double().sort().values
    cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    ranks = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max())


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(lambda: sample_noise(0, [0], 0, (3, 200, 200)), id="within one sample"),
        pytest.param(lambda: sample_noise(1, range(100_000), 7, (2,)), id="across samples"),
        pytest.param(lambda: torch.cat([sample_noise(2, [3], t, (500,)) for t in range(400)]), id="across steps"),
        pytest.param(lambda: torch.cat([sample_noise(s, [3], 5, (500,)) for s in range(400)]), id="across seeds"),
    ],
)
def test_noise_is_standard_normal(noise):
    x = noise().double().flatten()
    n = len(x)
    # Four standard errors: of the mean 1, of x^2 sqrt 2, of x^3 sqrt 15, of x^4 sqrt 96 over sqrt n.
    for power, moment, error in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * math.sqrt(error / n)
    # 1.95 / sqrt n is exceeded with probability 0.001; the seeds are fixed, so the test cannot flicker.
    assert kolmogorov_smirnov(x) < 1.95 / math.sqrt(n)
    assert x.isfinite().all()


def test_tails_are_there():
    # P(|x| > 4) = 6.3e-5: 63 expected of a million, standard deviation 8.
    count = int((sample_noise(0, range(500), 0, (2000,)).abs() > 4).sum())
    assert 31 <= count <= 95


def test_values_of_one_draw_are_independent():
    # The four words of a block and neighbouring blocks: no correlation of x nor of x^2 (Box-Muller shares a radius).
    x = sample_noise(5, range(2000), 1, (8, 8)).reshape(2000, 64).double()
    for values in (x, x.square()):
        correlation = torch.corrcoef(values.T) - torch.eye(64)
        # 2016 pairs of standard error 1 / sqrt(2000): 5 standard errors are exceeded once in 900 tests.
        assert correlation.abs().max() < 5 / math.sqrt(2000)


@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param((0, 0, 0), (1, 0, 0), id="seeds"),
        pytest.param((0, 0, 0), (0, 1, 0), id="samples"),
        pytest.param((0, 0, 0), (0, 0, 1), id="steps"),
        pytest.param((0, 1, 0), (0, 0, 1), id="sample and step change places"),
        pytest.param((1, 0, 0), (0, 1, 0), id="seed and sample change places"),
        pytest.param((0, 0, 0), (2**32, 0, 0), id="seeds that differ above bit 32"),
        pytest.param((0, 0, 0), (0, 2**32, 0), id="samples that differ above bit 32"),
        pytest.param((0, 2**40 + 1, 0), (0, 2**40, 0), id="large samples"),
    ],
)
def test_streams_are_independent(first, second):
    a, b = (sample_noise(seed, [sample], step, (20_000,))[0] for seed, sample, step in (first, second))
    assert not torch.equal(a, b)
    # Four standard errors of a correlation of 20,000 pairs.
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(20_000)


# --- a function of (seed, sample, step, position) alone --------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    samples=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6),
    step=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_a_samples_noise_ignores_batch_and_order(seed, samples, step, data):
    shape = (3, 5, 3)  # 45 values: no multiple of a block
    whole = sample_noise(seed, samples, step, shape)
    assert whole.shape == (len(samples), *shape) and whole.dtype == torch.float32
    order = data.draw(st.permutations(range(len(samples))))
    # Bit for bit: the same operations on the same words.
    assert torch.equal(sample_noise(seed, [samples[i] for i in order], step, shape), whole[list(order)])
    assert torch.equal(torch.cat([sample_noise(seed, [i], step, shape) for i in samples]), whole)


@pytest.mark.parametrize("samples", [range(4, 8), torch.arange(4, 8), [4, 5, 6, 7]])
def test_samples_may_be_a_range_a_list_or_a_tensor(samples):
    expected = torch.cat([sample_noise(3, [i], 2, (2, 3)) for i in range(4, 8)])
    assert torch.equal(sample_noise(3, samples, 2, (2, 3)), expected)


def test_a_larger_image_begins_with_the_same_numbers():
    assert torch.equal(sample_noise(0, [1], 2, (100,))[:, :10], sample_noise(0, [1], 2, (10,)))


# --- spawn_seed ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4))
@settings(max_examples=50, deadline=None)
def test_spawned_seeds_suit_a_torch_generator(words):
    seed = spawn_seed(*words)
    assert 0 <= seed < 2**63
    assert seed == spawn_seed(*words)
    torch.Generator().manual_seed(seed)


def test_spawned_seeds_differ():
    words = [*((a, b) for a, b in itertools.product(range(25), repeat=2)), *((a,) for a in range(25)), (0, 0, 0)]
    # 651 seeds of 63 bits: a chance collision has probability 2e-14.
    assert len({spawn_seed(*word) for word in words}) == len(words)


def test_spawned_seeds_use_all_bits():
    seeds = torch.tensor([spawn_seed(0, i) for i in range(1000)])
    share = torch.stack([(seeds >> bit & 1).double().mean() for bit in range(63)])
    # Five standard errors of a fair coin: 0.5 / sqrt(1000) each.
    assert ((share - 0.5).abs() < 5 * 0.5 / math.sqrt(1000)).all()
