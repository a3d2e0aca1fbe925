"""What ``vjepa-fast bench step`` measures: the ways to make a step, their times, memory and launches."""

from __future__ import annotations

TURN = {"cuda": 4, "cpu": 1}  # steps timed together: on CUDA without waiting for the device between them


class Provider:
    """One way to make the step of ``cfg``: ``prepare`` is not timed, ``step`` and ``steps`` are."""

    def __init__(self, name: str, cfg):
        import dataclasses

        import torch

        from vjepa_fast.trainer.precision import resolve_dtype
        from vjepa_fast.trainer.step import TrainStep, resolve_device

        if cfg.runtime.threads:
            torch.set_num_threads(cfg.runtime.threads)
        self.name, self.cfg = name, cfg
        self.device = resolve_device(cfg.runtime.device)
        if name == "vjepa_fast_compiled":
            cfg = dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, compile="blocks"))
        ours = TrainStep(cfg, device=self.device, dtype=resolve_dtype(cfg.runtime.dtype, self.device))
        self.dtype, self.dims, self.sampler = ours.dtype, ours.dims, ours.sampler
        self.counted = {"predict_context": ours.wants_context, "target_grad": ours.target_grad}
        self.ours = self.theirs = None
        if not name.startswith("reference"):
            self.ours = ours
            return
        self.theirs = reference_of(cfg, ours, checkpointing=name == "reference_checkpointed")
        del ours
        _free()  # it holds itself in a cycle, and must not count as the reference's memory
        if name == "reference_compiled":
            for module in (self.theirs.encoder, self.theirs.predictor, self.theirs.target_encoder):
                module.compile(dynamic=True)

    def prepare(self, index: int):
        """The step's batch: for ours as the loader gives it, in memory that the device can read.

        The reference is handed clips on the device, and the masks that ours draws inside its step.
        """
        import dataclasses

        batch = random_batch(self.cfg, index)
        if self.theirs is None:
            if self.device.type != "cuda":
                return batch
            return dataclasses.replace(
                batch, groups=[dataclasses.replace(group, clip=group.clip.pin_memory()) for group in batch.groups]
            )
        clips = [group.clip.to(self.device) for group in batch.groups]
        drawn = [
            self.sampler(clip, step=index, first_sample=group.first_sample, group=n)
            for n, (clip, group) in enumerate(zip(clips, batch.groups))
        ]
        return clips, [enc for enc, _ in drawn], [pred for _, pred in drawn]

    def step(self, prepared, index: int):
        """Make the step; gives its loss, a tensor that was not waited for where the step itself does not."""
        if self.theirs is None:
            return self.ours(prepared, index).loss
        return self.theirs(*prepared)["loss"]

    def steps(self, prepared: list, first: int, mark=None):
        """Make the steps ``first``, ``first + 1``, ... and give the last loss; ours as the trainer makes them, the next
        batch on its way while the device works. ``mark(i)``: a context for all that is done from step i on to the next.
        """
        from contextlib import nullcontext

        from vjepa_fast.trainer.prefetch import Prefetcher

        feed = None
        if self.ours is not None:
            feed = Prefetcher([iter(prepared)], self.ours.stage, self.device)
        for i, batch in enumerate(prepared):
            with mark(i) if mark is not None else nullcontext():
                if feed is not None:
                    batch = feed.take(first + i)[0]
                loss = self.step(batch, first + i)
                if feed is not None and i + 1 < len(prepared):
                    feed.advance(first + i + 1)
        return loss

    def flops(self, prepared) -> float:
        """Of the step on ``prepared``: what the model has to compute, whoever computes it."""
        from vjepa_fast.metrics import flops

        if self.theirs is None:
            masks = [
                self.sampler(g.clip, step=prepared.step, first_sample=g.first_sample, group=n)
                for n, g in enumerate(prepared.groups)
            ]
            clips, masks_enc, masks_pred = [g.clip for g in prepared.groups], *zip(*masks)
        else:
            clips, masks_enc, masks_pred = prepared
        groups = [
            c
            for clip, enc, pred in zip(clips, masks_enc, masks_pred)
            for c in flops.clips_of(self.sampler.grid(clip.shape), enc, pred)
        ]
        return sum(c.flops for c in flops.step_cost(self.dims, groups, **self.counted).values())


def random_batch(cfg, index: int):
    """Noise with the shapes of a batch, a function of the index alone."""
    import torch

    from vjepa_fast.data import Batch, ClipGroup

    data, groups = cfg.data, []
    lengths = list(dict.fromkeys(data.dataset_fpcs))
    for n, frames in enumerate(lengths):
        size = max(1, data.batch_size // len(lengths))
        gen = torch.Generator().manual_seed(1000 * index + n)
        shape = (size, 3, frames, data.crop_size, data.crop_size)
        clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen)
        zeros = torch.zeros(size, dtype=torch.int64)
        first = index * data.batch_size + n * size
        groups.append(ClipGroup(clip, zeros, zeros, ["noise"] * size, frames, "video", first))
    return Batch(groups, index)


def reference_of(cfg, ours, *, dtype=None, checkpointing: bool | None = None):
    """The reference's step with the weights of ``ours``. ``dtype``, ``checkpointing``: in place of those of ``cfg``."""
    from vjepa_fast.errors import ConfigError
    from vjepa_fast.reference import build_reference
    from vjepa_fast.trainer.step import objective_fields

    if cfg.masks.truncate == "none":
        raise ConfigError(
            "masks.truncate: the reference takes masks of one length only, not none; "
            "use batch or random, or --providers vjepa_fast"
        )
    m, d, o = cfg.model, cfg.data, cfg.optimization
    checkpointing = m.use_activation_checkpointing if checkpointing is None else checkpointing
    blocks, heads = ours.encoder.blocks, ours.encoder.num_heads
    step = build_reference(
        crop_size=d.crop_size,
        patch_size=d.patch_size,
        num_frames=max(d.dataset_fpcs),
        tubelet_size=d.tubelet_size,
        embed_dim=ours.encoder.embed_dim,
        depth=len(blocks),
        num_heads=heads,
        levels=m.levels,
        pred_embed_dim=m.pred_embed_dim,
        pred_depth=m.pred_depth,
        pred_num_heads=m.pred_num_heads,
        num_mask_tokens=ours.predictor.num_mask_tokens,
        predict_all=m.predict_all,
        interpolate_rope=m.interpolate_rope,
        rope_variant=m.rope_variant,
        modality_embedding=m.modality_embedding,
        img_temporal_dim_size=m.img_temporal_dim_size,
        use_silu=m.use_silu,
        pred_use_silu=m.pred_use_silu,
        wide_silu=m.wide_silu,
        use_activation_checkpointing=checkpointing,
        objectives=objective_fields(cfg),
        ld_grad=cfg.compat == "intended",
        seed=cfg.seed,
        device=ours.device,
        epochs=o.epochs,
        ipe=o.ipe,
        ipe_scale=o.ipe_scale,
        lr=o.lr,
        start_lr=o.start_lr,
        final_lr=o.final_lr,
        warmup=o.warmup,
        weight_decay=o.weight_decay,
        final_weight_decay=o.final_weight_decay,
        ema=cfg.target.ema,
        betas=o.betas,
        eps=o.eps,
        dtype=dtype or ours.dtype,
        disable_ema=ours.online,
        mask_index=0 if ours.shared_token else None,
    )
    step.encoder.load_state_dict(ours.encoder.state_dict())
    step.target_encoder.load_state_dict(ours.encoder.state_dict())
    step.predictor.load_state_dict(ours.predictor.state_dict())
    step.losses.load_state_dict(ours.plan.state_dict())
    return step


def measure(cfg, names, warmup: int, repeats: int, *, deadline: float = float("inf"), memory: bool = True, against=()):
    """Time providers on the same weights, clips and masks; yields lists of rows as they are ready.

    On a CPU all by turns, so that a slow moment hits all; on CUDA one after another, so that each has the memory for
    itself. One that fails gives a row with ``error``, the others go on. One whose first loss is not that of the first
    (of ``against``, rows that are there already, else of these) has an ``error`` and ``mismatch``: its time compares
    nothing.
    """
    import time

    cuda = cfg.runtime.device.startswith("cuda")
    known = ((r["provider"], r["first_loss"]) for r in against if r["first_loss"] is not None)
    first = next(known, None)  # (provider, loss) that all are held against
    for group in [[name] for name in names] if cuda else [list(names)]:
        if time.monotonic() > deadline:
            yield [_row(cfg, name, error="not begun: the time of --budget was over") for name in group]
            continue
        rows = _measure_together(cfg, group, warmup, repeats, deadline)
        for row in rows:
            loss = row["first_loss"]
            if first is None and loss is not None:
                first = row["provider"], loss
            tolerance = 1e-4 if cfg.runtime.dtype == "float32" else 2e-2
            if loss is not None and not abs(loss - first[1]) <= tolerance * abs(first[1]):
                row["mismatch"] = True
                row["error"] = f"loss {loss:.6g} at step 1 where {first[0]} has {first[1]:.6g}: not comparable"
            if memory and not cuda and row["error"] is None and time.monotonic() < deadline:
                row.update(peak_bytes(cfg, row["provider"]))
        yield rows


def _measure_together(cfg, names, warmup: int, repeats: int, deadline: float) -> list[dict]:
    import statistics
    import sys
    import time

    import torch

    providers: dict[str, Provider] = {}
    rows = {name: _row(cfg, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    flops: dict[str, list[float]] = {name: [] for name in names}

    def attempt(name: str, work) -> None:
        try:
            work()
        except Exception as error:  # out of memory, a compiler that gives up: told in its row
            text = str(error).strip().splitlines()
            rows[name]["error"] = f"{type(error).__name__}: {text[0] if text else ''}"[:300]
        if rows[name]["error"]:  # the error is gone, and with it the frames that held memory
            providers.pop(name, None)
            _free()

    def build(name: str) -> None:
        before = _allocated(cfg)
        providers[name] = p = Provider(name, cfg)
        rows[name].update(describe(cfg, p), built_from=before, built=_allocated(cfg))

    def turn(name: str, number: int) -> None:
        p = providers[name]
        timed = number >= warmup
        if number == warmup:
            _allocated(cfg)  # what compilation and first calls took does not count
        size = TURN[p.device.type] if timed else 1
        start = number if not timed else warmup + (number - warmup) * size
        prepared = [p.prepare(index) for index in range(start, start + size)]
        _wait(p.device)
        began = time.perf_counter()
        loss = p.steps(prepared, start)
        _wait(p.device)
        seconds = (time.perf_counter() - began) / size
        if timed:
            times[name].append(seconds)
            flops[name].append(sum(map(p.flops, prepared)) / size)
        if number == 0:
            rows[name]["first_loss"] = float(loss)

    for name in names:
        attempt(name, lambda name=name: build(name))
    for number in range(warmup + repeats):
        if number > warmup and time.monotonic() > deadline:
            break
        for name in list(providers):
            attempt(name, lambda name=name, number=number: turn(name, number))
    for name, p in list(providers.items()):
        row = rows[name]
        row.update(_speed(cfg, p, statistics.median(times[name]), statistics.median(flops[name])))
        row.update(
            min_ms=round(1e3 * min(times[name]), 3), max_ms=round(1e3 * max(times[name]), 3), repeats=len(times[name])
        )
        if p.device.type == "cuda":
            most = _most_allocated(p.device)
            row.update(peak_bytes=most - row["built"], peak_after_imports=most - row["built_from"])
        attempt(name, lambda name=name, p=p: rows[name].update(counts(p)))
    for row in rows.values():
        row.pop("built", None), row.pop("built_from", None)
    providers.clear()
    _free()
    if "torch._dynamo" in sys.modules:  # else the next case's models count against the limit of recompilations
        torch._dynamo.reset()
    return list(rows.values())


def _row(cfg, name: str, error: str | None = None) -> dict:
    """A row with nothing measured yet."""
    empty = dict.fromkeys(
        (
            "median_ms",
            "min_ms",
            "max_ms",
            "steps_per_s",
            "clips_per_s",
            "mfu",
            "gflop_per_clip",
            "first_loss",
            "peak_bytes",
            "peak_after_imports",
            "launches_per_step",
            "syncs_per_step",
        )
    )
    return {
        "op": "train_step",
        "provider": name,
        "mode": "step",
        "batch": cfg.data.batch_size,
        "dtype": cfg.runtime.dtype,
        **empty,
        "error": error,
        "mismatch": False,
    }


def _speed(cfg, provider: Provider, seconds: float, flops: float) -> dict:
    from vjepa_fast.metrics import hardware

    peak = hardware.peak(provider.device, provider.dtype, cfg.runtime.peak_tflops)
    clips = cfg.data.batch_size
    return {
        "median_ms": round(1e3 * seconds, 3),
        "steps_per_s": round(1 / seconds, 4),
        "clips_per_s": round(clips / seconds, 3),
        "gflop_per_clip": round(flops / clips / 1e9, 2),
        "mfu": round(flops / seconds / peak.flops, 4) if peak.flops else None,
        "peak_flops": peak.label,
    }


def _wait(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _allocated(cfg) -> int:
    """Bytes in use on the GPU; its peak counts from now on. 0 on a CPU."""
    if not cfg.runtime.device.startswith("cuda"):
        return 0
    import torch

    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(cfg.runtime.device)
    return torch.cuda.memory_allocated(cfg.runtime.device)


def _most_allocated(device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device)


def _free() -> None:
    """Give back what a provider held, so that it is not in the way of the next."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def counts(provider: Provider) -> dict:
    """Kernel launches (on a CPU: calls of operators) and host syncs (on a CPU: None) per step.

    On CUDA of steps in the middle of some: the first has nobody who got its batch ready, the last has no next one.
    """
    import contextlib
    import json
    import os
    import tempfile

    import torch

    from vjepa_fast.metrics import profile

    edge = 1 if provider.device.type == "cuda" else 0
    prepared = [provider.prepare(1000 + i) for i in range(1 + 3 * edge)]

    def mark(i: int):
        inner = edge <= i < len(prepared) - edge
        return torch.profiler.record_function("bench/step") if inner else contextlib.nullcontext()

    _wait(provider.device)
    with profile.profiler(provider.device) as found:
        provider.steps(prepared, 1000, mark)
        _wait(provider.device)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        found.export_chrome_trace(path)
        with open(path, encoding="utf-8") as f:
            report = profile.analyse(json.load(f), within="bench/step")
    return {"launches_per_step": report.launches, "syncs_per_step": report.syncs}


def describe(cfg, provider: Provider) -> dict:
    """What was measured and where."""
    import platform

    import torch

    from vjepa_fast.trainer.run_folder import device_name, git_commit

    d = cfg.data
    return {
        "op": "train_step",
        "shape": f"{cfg.model.model_name} B{d.batch_size} F{'/'.join(map(str, dict.fromkeys(d.dataset_fpcs)))} "
        f"{d.crop_size}px p{d.patch_size} {'+'.join(cfg.objectives)}",
        "dtype": cfg.runtime.dtype,
        "provider": provider.name,
        "device": device_name(provider.device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def peak_bytes(cfg, name: str) -> dict:
    """Peak resident memory of two steps in a fresh process: bytes above what the built models take (``peak_bytes``) and
    above what importing takes (``peak_after_imports``); None where the system does not tell.
    """
    import multiprocessing

    from vjepa_fast.metrics import hardware

    if hardware.resident("VmRSS") is None:
        return {"peak_bytes": None, "peak_after_imports": None}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (cfg, name))


def _peak(cfg, name: str) -> dict:
    import torch._dynamo  # noqa: F401  (torch imports it at the first optimiser step: no part of the step)

    from vjepa_fast import reference  # noqa: F401
    from vjepa_fast.metrics import hardware
    from vjepa_fast.trainer import step  # noqa: F401

    imported = hardware.resident("VmRSS")
    provider = Provider(name, cfg)
    built = hardware.resident("VmRSS")
    for index in range(2):
        float(provider.step(provider.prepare(index), index))
    most = hardware.resident("VmHWM")
    return {"peak_bytes": most - built, "peak_after_imports": most - imported}
