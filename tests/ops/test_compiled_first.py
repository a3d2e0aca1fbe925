"""Every public op when its first call in a process is one that torch.compile traces: what a call would keep for later
ones (a registry, a cache) is not there yet, and what a trace writes is there only after it."""

import inspect
import json

import pytest
import torch

from tests import forks
from vjepa_fast import ops
from vjepa_fast.ops.block_masks import BlockSpec
from vjepa_fast.ops.latent import RowCall

NO_OPS = ("use_backend", "backend_report", "current_backend")


def cases():
    """Op -> a function of no arguments that calls it."""
    from vjepa_fast.objectives.rows import STEP
    from vjepa_fast.objectives.terms.spectral import SPECTRUM

    z, h, idx = torch.ones(1, 2, 12, requires_grad=True), torch.zeros(1, 4, 12), torch.tensor([[0, 2]])
    after, before = torch.tensor([[1, -1]]), torch.tensor([[-1, 0]])
    clip, table, qkv = torch.ones(1, 3, 4, 8, 8), torch.ones(2, 2, 4), torch.ones(1, 2, 24)
    spec, rule = BlockSpec(1, (0.2, 0.4), (1.0, 1.0), (1.0, 1.0)), ops.Rule(0.1, 0.0, 0.9, 0.999, 1e-8, 1)
    power = {f"latent_loss {p}": (lambda p=p: ops.latent_loss(z, h, idx, loss_exp=p)) for p in (1.0, 1.5, 2.0)}
    return power | {
        "latent_loss_token": lambda: ops.latent_loss_token(z, h, idx, RowCall("l1", 1.0)),
        "latent_loss_pair": lambda: ops.latent_loss_pair(z, h, idx, after, before, [STEP()], places=2),
        "latent_loss_column": lambda: ops.latent_loss_column(
            z, h, torch.tensor([[[0, 1]]]), torch.tensor([[[0, 2]]]), SPECTRUM(), torch.ones(4, 2)
        ),
        "rope3d": lambda: ops.rope3d(qkv, table, 2),
        "rope3d_": lambda: ops.rope3d_(qkv * 2, table, 2),
        "packed_attention": lambda: ops.packed_attention(qkv, table, torch.tensor([0, 2], dtype=torch.int32), 2),
        "motion_saliency": lambda: ops.motion_saliency(clip, (2, 2, 2)),
        "mask_distance": lambda: ops.mask_distance(idx, idx, (2, 2, 1)),
        "target_norm": lambda: ops.target_norm(h, 2),
        "normalize_clip": lambda: ops.normalize_clip(clip),
        "tubelet_patchify": lambda: ops.tubelet_patchify(clip, None, 2, 4),
        "patch_mean": lambda: ops.patch_mean(clip, 2, 4),
        "linear32": lambda: ops.linear32(h, torch.ones(5, 12), torch.ones(5)),
        "matmul32": lambda: ops.matmul32(h[0], torch.ones(12, 5)),
        "cross_covariance": lambda: ops.cross_covariance(z[0], None, 2, 6),
        "sample_block_masks": lambda: ops.sample_block_masks(1, (2, 4, 4), [spec], seed=0, step=0).enc,
        "origin_probabilities": lambda: ops.origin_probabilities(torch.ones(2, 4, 4), (1, 2, 2), 1.0, 0.1),
        "total_norm": lambda: ops.total_norm([h, z.detach()]),
        "adamw_ema_": lambda: ops.adamw_ema_([h], [h + 1], [h * 0], [h * 0], rule),
    }


def run():
    """Print what each op says when torch.compile meets it first; one process for all, since starting takes longest."""
    print(json.dumps({name: summary(torch.compile(call, backend="aot_eager")) for name, call in cases().items()}))


def summary(call):
    """The sum of each result, or the error's text."""
    try:
        got = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [
        x.detach().double().sum().item() for x in (got if isinstance(got, (list, tuple)) else [got]) if x is not None
    ]


def test_every_op_is_here():
    known = {name.split()[0] for name in cases()}
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert known == functions - set(NO_OPS)


def test_the_first_call_is_compiled():
    done = forks.run("-c", "from tests.ops.test_compiled_first import run; run()")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    wanted = {name: summary(call) for name, call in cases().items()}
    assert not {name: said for name, said in (wanted | got).items() if isinstance(said, str)}
    assert {name: pytest.approx(said, rel=1e-5) for name, said in wanted.items()} == got
