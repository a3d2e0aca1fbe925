"""The bytes that blocks keep, as the committed table counts them, are those of the formulas."""

import json
import pathlib

import pytest

from benchmarks import saved_bytes

RESULTS = pathlib.Path(saved_bytes.__file__).parent / "results" / "saved_bytes.json"


@pytest.mark.parametrize(("width", "heads", "key"), [(768, 12, "encoder"), (256, 8, "predictor")])
def test_of_a_block(width, heads, key):
    """Fused: 10 E of 16 bits; plain: 18 E, two of them as float32 copies beside; and statistics and row sums."""
    rows = [r for r in json.loads(RESULTS.read_text()) if r["batch"] == 64]
    with saved_bytes.on_gpu():
        found = {way: saved_bytes.block_bytes(way, width, heads) for way in saved_bytes.WAYS}
    assert found == {r["blocks"]: r[f"{key}_block_bytes_per_token"] for r in rows}
    assert found["fused"] == 20 * width + 4 * 4 + 4 * heads
    assert found["plain"] == 36 * width + 4 * 4 + 4 * heads
    assert [r["of_reference"] for r in rows if r["blocks"] == "fused"][0] < 0.5
