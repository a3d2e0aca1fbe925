"""``vjepa-fast bench step``: a whole training step, timed against the published algorithm written plainly."""
from __future__ import annotations

HELP = "time a whole training step against the published algorithm"

RECIPE = "mixed_4gpu_fwm_hw_ld"
SMALL = ("model.model_name=vit_tiny", "data.crop_size=112", "data.dataset_fpcs=[16]", "data.batch_size=4")
FIXED = ("data.datasets=[none]", "data.datasets_weights=null", "loss.context_warmup=[0,0]", "runtime.device=cpu",
         "model.use_activation_checkpointing=false", "runtime.dtype=float32", "runtime.tensorboard=false")
PROVIDERS = ("vjepa_fast", "reference", "compiled")


def add_arguments(parser) -> None:
    parser.add_argument("what", choices=["step"], help="step: target, context, predictor, loss, backward, AdamW, EMA")
    parser.add_argument("--recipe", default=RECIPE, help=f"recipe or YAML file (default {RECIPE}, made ViT-tiny, "
                        "112 px, 16 frames, batch 4, float32)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one value, such as data.batch_size=8; may be repeated")
    parser.add_argument("--full-size", action="store_true", help="keep the recipe's own model, clip and batch size")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 is autocast")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--providers", default="vjepa_fast,reference",
                        help=f"comma-separated, of {', '.join(PROVIDERS)} (compiled: ours under torch.compile)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before timing (default 2)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed steps of each (default 10)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory runs (CPU: a process each)")
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON")


def config_of(args):
    """The benchmark's configuration: the recipe, made small unless asked otherwise, then the user's overrides."""
    from .. import config

    overrides = [*FIXED, *(() if args.full_size else SMALL), f"runtime.device={args.device}",
                 f"runtime.dtype={args.dtype}", f"runtime.threads={args.threads}", *args.overrides]
    return config.load(args.recipe, overrides)


def run(args) -> int:
    import json

    from ..errors import UserError

    chosen = [name.strip() for name in args.providers.split(",") if name.strip()]
    for name in chosen:
        if name not in PROVIDERS:
            raise UserError(f"--providers: {name!r} is unknown; accepted: {', '.join(PROVIDERS)}")
    if not chosen or args.repeats < 1 or args.warmup < 1:
        raise UserError("--providers, --repeats and --warmup: at least one of each is needed")
    if args.json:
        _check_writable(args.json)
    cfg = config_of(args)
    rows = measure(cfg, chosen, args.warmup, args.repeats)
    if not args.no_memory:
        for row in rows:
            row["peak_bytes"] = peak_bytes(cfg, row["provider"])
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=1)
            f.write("\n")
    show(rows)
    return 0


def _check_writable(path: str) -> None:
    from ..errors import UserError

    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


class Provider:
    """One way to make the step of ``cfg``: ``prepare`` is not timed, ``step`` is."""

    def __init__(self, name: str, cfg):
        import dataclasses

        from ..trainer.precision import resolve_dtype
        from ..trainer.step import TrainStep, resolve_device

        if cfg.runtime.threads:
            import torch

            torch.set_num_threads(cfg.runtime.threads)
        self.name = name
        self.device = resolve_device(cfg.runtime.device)
        runtime = dataclasses.replace(cfg.runtime, compile=name == "compiled")
        self.ours = TrainStep(dataclasses.replace(cfg, runtime=runtime), device=self.device,
                              dtype=resolve_dtype(cfg.runtime.dtype, self.device))
        self.cfg = cfg
        self.theirs = _reference(cfg, self.ours) if name == "reference" else None

    def prepare(self, index: int):
        """The step's batch, on the CPU. The reference is handed the masks that ours draws inside its step."""
        batch = random_batch(self.cfg, index)
        if self.theirs is None:
            return batch
        clips = [group.clip.to(self.device) for group in batch.groups]
        drawn = [self.ours.sampler(clip, step=index, first_sample=group.first_sample, group=n)
                 for n, (clip, group) in enumerate(zip(clips, batch.groups))]
        return clips, [enc for enc, _ in drawn], [pred for _, pred in drawn]

    def step(self, prepared, index: int) -> float:
        """Make the step and read its loss, which waits for the device."""
        if self.theirs is None:
            return float(self.ours(prepared, index).loss)
        return self.theirs(*prepared)["loss"]


def random_batch(cfg, index: int):
    """Noise with the shapes of a batch, a function of the index alone."""
    import torch

    from ..data import Batch, ClipGroup

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


def _reference(cfg, ours):
    """The reference's step with the weights of ``ours``."""
    from ..reference import build_reference
    from ..trainer.step import objective_fields

    m, d, o = cfg.model, cfg.data, cfg.optimization
    blocks, heads = ours.encoder.blocks, ours.encoder.num_heads
    step = build_reference(
        crop_size=d.crop_size, patch_size=d.patch_size, num_frames=max(d.dataset_fpcs), tubelet_size=d.tubelet_size,
        embed_dim=ours.encoder.embed_dim, depth=len(blocks), num_heads=heads, levels=m.levels,
        pred_embed_dim=m.pred_embed_dim, pred_depth=m.pred_depth, pred_num_heads=m.pred_num_heads,
        num_mask_tokens=ours.predictor.num_mask_tokens, predict_all=m.predict_all, interpolate_rope=m.interpolate_rope,
        rope_variant=m.rope_variant, modality_embedding=m.modality_embedding,
        img_temporal_dim_size=m.img_temporal_dim_size, use_silu=m.use_silu, pred_use_silu=m.pred_use_silu,
        wide_silu=m.wide_silu, use_activation_checkpointing=m.use_activation_checkpointing,
        objectives=objective_fields(cfg), ld_grad=cfg.compat == "intended", seed=cfg.seed, device=ours.device,
        epochs=o.epochs, ipe=o.ipe, ipe_scale=o.ipe_scale, lr=o.lr, start_lr=o.start_lr, final_lr=o.final_lr,
        warmup=o.warmup, weight_decay=o.weight_decay, final_weight_decay=o.final_weight_decay, ema=cfg.target.ema,
        betas=o.betas, eps=o.eps, dtype=ours.dtype, disable_ema=ours.online,
        mask_index=0 if ours.shared_token else None,
    )
    step.encoder.load_state_dict(ours.encoder.state_dict())
    step.target_encoder.load_state_dict(ours.encoder.state_dict())
    step.predictor.load_state_dict(ours.predictor.state_dict())
    step.losses.load_state_dict(ours.plan.state_dict())
    return step


def measure(cfg, names, warmup: int, repeats: int) -> list[dict]:
    """Time every provider on the same weights, clips and masks; by turns, so that a slow moment hits all.

    Raises:
        UserError: the first losses disagree, so that the times would not compare the same thing.
    """
    import statistics
    import time

    import torch

    from ..errors import UserError

    providers = [Provider(name, cfg) for name in names]
    losses: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + repeats):
        for p in providers:
            prepared = p.prepare(index)
            if p.device.type == "cuda":
                torch.cuda.synchronize(p.device)
            began = time.perf_counter()
            loss = p.step(prepared, index)
            if p.device.type == "cuda":
                torch.cuda.synchronize(p.device)
            if index >= warmup:
                times[p.name].append(1e3 * (time.perf_counter() - began))
            losses.setdefault(p.name, loss)
    tolerance = 1e-4 if cfg.runtime.dtype == "float32" else 2e-2
    first = losses[names[0]]
    for name, loss in losses.items():
        if not abs(loss - first) <= tolerance * abs(first):
            raise UserError(f"{name} gives loss {loss:.6g} and {names[0]} {first:.6g} at step 1: not comparable")
    return [{**describe(cfg, p), "mode": "step", "median_ms": round(statistics.median(times[p.name]), 3),
             "min_ms": round(min(times[p.name]), 3), "max_ms": round(max(times[p.name]), 3), "repeats": repeats,
             "first_loss": losses[p.name], "peak_bytes": None} for p in providers]


def describe(cfg, provider: Provider) -> dict:
    """What was measured and where."""
    import platform

    import torch

    from ..trainer.run_folder import device_name, git_commit

    d = cfg.data
    return {
        "op": "train_step",
        "shape": f"{cfg.model.model_name} B{d.batch_size} F{'/'.join(map(str, dict.fromkeys(d.dataset_fpcs)))} "
                 f"{d.crop_size}px p{d.patch_size} {'+'.join(cfg.objectives)}",
        "dtype": cfg.runtime.dtype, "provider": provider.name,
        "device": device_name(provider.device),
        "threads": torch.get_num_threads(), "torch": str(torch.__version__), "python": platform.python_version(),
        "commit": git_commit(),
    }


def peak_bytes(cfg, name: str) -> int | None:
    """Peak memory of two steps above what the built models take.

    On CUDA the allocator's; else resident memory in a fresh process (None where the system does not tell).
    """
    import multiprocessing

    if cfg.runtime.device.startswith("cuda"):
        return _peak(cfg, name)
    if _resident("VmRSS") is None:
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (cfg, name))


def _peak(cfg, name: str) -> int:
    provider = Provider(name, cfg)
    if provider.device.type == "cuda":
        import torch

        torch.cuda.synchronize(provider.device)
        base = torch.cuda.memory_allocated(provider.device)
        torch.cuda.reset_peak_memory_stats(provider.device)
        for index in range(2):
            provider.step(provider.prepare(index), index)
        return torch.cuda.max_memory_allocated(provider.device) - base
    base = _resident("VmRSS")
    for index in range(2):
        provider.step(provider.prepare(index), index)
    return _resident("VmHWM") - base


def _resident(field: str) -> int | None:
    """Bytes of a field of /proc/self/status (VmRSS: resident now, VmHWM: at most); None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="ignore") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith(field))
    except (OSError, StopIteration):
        return None


def show(rows: list[dict]) -> None:
    """A table on stdout; the ratio is to the reference where it was measured."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:  # a source tree on a GPU machine: see benchmarks/gpu_check.py
        for row in rows:
            print(f"{row['provider']}: {row['median_ms']:.1f} ms, {row['min_ms']:.1f} to {row['max_ms']:.1f}")
        return
    base = next((r for r in rows if r["provider"] == "reference"), None)
    head = rows[0]
    table = Table(title=f"{head['op']}: {head['shape']}, {head['dtype']}, {head['device']}, {head['threads']} threads")
    for name in ("provider", "median ms", "min to max ms", "x reference", "peak MB"):
        table.add_column(name, justify="left" if name == "provider" else "right")
    for row in rows:
        ratio = f"{base['median_ms'] / row['median_ms']:.2f}" if base else "-"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        span = f"{row['min_ms']:.1f} to {row['max_ms']:.1f}"
        table.add_row(row["provider"], f"{row['median_ms']:.1f}", span, ratio, peak)
    Console(width=None if Console().is_terminal else 120).print(table)
