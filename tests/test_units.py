"""Numbers as people read them."""

import pytest

from compressor.units import duration, short, size


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (9999, "9999"), (12345, "12.3k"), (1_500_000, "1.5M"), (8030261248, "8.03B")]
)
def test_counts(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**52, "4,096.0 TiB")],
)
def test_bytes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.5, "0.5 s"), (75, "1 min 15 s"), (5400, "1 h 30 min"), (864000, "10.0 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
