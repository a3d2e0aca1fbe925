"""V-JEPA in a loop of Hugging Face Accelerate.

accelerate launch docs/examples/accelerate_train.py RECIPE [section.key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

sys.path.insert(0, str(Path(__file__).parent))
from jepa import Jepa, clips

from vjepa_fast import config
from vjepa_fast.models import to_fair
from vjepa_fast.trainer.optim import set_schedule


def train(cfg: config.Config, cpu: bool = False) -> list[float]:
    """Train as ``cfg`` says and return the losses; the target's weights go to ``target_encoder.pt`` in its folder."""
    # images have an embedding of their own, which a step on videos leaves unused
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    jepa = Jepa(cfg)
    o = cfg.optimization
    optimizer = torch.optim.AdamW(jepa.parameter_groups(), lr=o.lr, betas=o.betas, eps=o.eps)
    schedules, losses = jepa.schedules, []
    model, optimizer = accelerator.prepare(jepa, optimizer)
    for clip, step, first_sample in clips(cfg, accelerator.process_index, accelerator.num_processes):
        if step == schedules.total_steps:
            break
        set_schedule(optimizer, schedules.lr(step), schedules.weight_decay(step))
        with accelerator.autocast():
            loss = model(clip.to(accelerator.device), step, first_sample)
        accelerator.backward(loss)
        if o.clip_grad is not None:
            accelerator.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        jepa.follow(step)
        mean = accelerator.reduce(loss.detach(), "mean")
        assert isinstance(mean, torch.Tensor)
        losses.append(mean.item())
        accelerator.print(f"step {step}: loss {losses[-1]:.4f}")
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    weights = {"target_encoder": to_fair(jepa.target_encoder.state_dict())}
    accelerator.save(weights, Path(cfg.folder) / "target_encoder.pt")
    return losses


if __name__ == "__main__":
    train(config.load(sys.argv[1], sys.argv[2:]))
