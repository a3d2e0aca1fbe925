"""How a study reads an encoder: which readouts it may choose among."""

import numpy as np
import pytest
import torch

from vjepa_fast.evaluation import ClipSet
from vjepa_fast.models import build_encoder
from vjepa_fast.study.instrument.read import CANDIDATES, How, suite_rows

SIZES = dict(img_size=16, patch_size=8, num_frames=4, embed_dim=24, depth=1, num_heads=2, levels=1)


def clips(classes):
    """Eight clips of each class, of one grey level each."""
    labels = np.repeat(np.array(classes), 8)
    pixels = torch.from_numpy(labels * 20).to(torch.uint8)[:, None, None, None, None]
    return ClipSet(pixels.expand(-1, 3, 4, 16, 16).contiguous(), labels, "grey", "grey")


def planted(clip, hierarchical=True):
    """Patch tokens of noise, and a class token that tells the grey levels apart."""
    level = torch.round((clip.mean((1, 2, 3, 4)) + 2.2) * 3).long() % 24
    noise = torch.randn(len(clip), 8, 24, generator=torch.Generator().manual_seed(0))
    return noise, torch.eye(24)[level] + 0.01 * noise[:, 0]


@pytest.mark.parametrize("token", [True, False])
def test_the_class_token_is_a_candidate_of_encoders_that_have_one(token):
    torch.manual_seed(0)
    encoder = build_encoder(**SIZES, cls_token=token).eval()
    if token:
        encoder.with_summary = planted
    parts = {"train": clips([0, 1, 2]), "val": clips([3, 4, 5, 6]), "test": clips([7, 8, 9, 10, 11])}
    how = How(queries=1, episodes=50, where={"batch_size": 200})
    rows = suite_rows("it", "pretrained", "grey", encoder, parts, True, how)
    chosen = {row.chosen["name"] for row in rows}
    if token:
        assert chosen == {"last/cls/standard/cosine"}
        assert all(row.accuracy > 0.9 for row in rows)
    else:
        assert chosen <= {readout.name for readout in CANDIDATES}
