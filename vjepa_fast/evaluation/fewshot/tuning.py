"""What few-shot methods that train share: parts of the data, the model of features, what of it is trained, the loop.

Shapes: B batch, F frames, N tokens of grid (T, H, W), D token width, d feature width.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from vjepa_fast.errors import ConfigError, DataError, TrainingError
from vjepa_fast.evaluation.extract.features import ClipSet, Features, _view, decode_clips, encode, pool_tokens
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult, sample_episodes
from vjepa_fast.evaluation.fewshot.prototype import prototype_episodes

log = logging.getLogger("vjepa_fast")
IN_MEMORY = 512 * 2**20  # bytes of decoded clips up to which a manifest is decoded once, not per batch


# ---------------------------------------------------------------- settings and results


@dataclass(frozen=True)
class FitSettings:
    """Training of a classifier; the defaults are those of Classifier-Baseline (arXiv:2003.04390, section 4.2).

    ``schedule="step"``: the rate times ``gamma`` at each of ``milestones`` (epochs); "cosine": to 0 over the run. Both
    begin with ``warmup`` epochs from 0.
    """

    epochs: int = 100
    batch_size: int = 128
    optimizer: str = "sgd"  # or adamw
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    milestones: tuple[int, ...] = (90,)
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self):
        if self.epochs < 0 or self.batch_size < 1 or not self.lr > 0:
            raise ConfigError(
                f"few-shot tuning: epochs {self.epochs}, batch_size {self.batch_size}, lr {self.lr}; expected 0 or "
                "more, 1 or more, above 0"
            )
        if self.optimizer not in ("sgd", "adamw") or self.schedule not in ("step", "cosine"):
            raise ConfigError(
                f"few-shot tuning: optimizer {self.optimizer!r} and schedule {self.schedule!r}; accepted: sgd or "
                "adamw, step or cosine"
            )

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The factor of ``lr`` in step ``step`` of the ``steps`` of ``epoch``, both from 0."""
        done = epoch + step / steps
        if done < self.warmup:
            return min(1.0, (done + 1 / steps) / self.warmup)
        if self.schedule == "step":
            return self.gamma ** sum(epoch >= m for m in self.milestones)
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (self.epochs - self.warmup)))


@dataclass(frozen=True)
class MetaSettings:
    """The meta stage; the defaults are those of Meta-Baseline (arXiv:2003.04390, section 4.2 and its released code).

    An epoch is ``steps`` steps of ``episodes_per_step`` episodes. ``reduce_way``: with fewer base classes than ``way``
    take all there are and say so, instead of refusing.
    """

    epochs: int = 20
    steps: int = 200
    episodes_per_step: int = 4
    way: int = 5
    shot: int = 1
    queries: int = 15
    temperature: float = 10.0  # where the learnable factor of the cosine starts
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()  # constant rate
    gamma: float = 0.5
    val_way: int = 5
    val_queries: int = 15
    val_episodes: int = 800
    reduce_way: bool = False

    def __post_init__(self):
        counts = {k: getattr(self, k) for k in ("steps", "episodes_per_step", "shot", "queries", "val_queries")}
        counts |= {"val_episodes": self.val_episodes, "lr": self.lr, "temperature": self.temperature}
        low = [f"{k} {v}" for k, v in counts.items() if not v > 0]
        low += [f"{k} {v} (2 or more)" for k, v in (("way", self.way), ("val_way", self.val_way)) if v < 2]
        if low or self.epochs < 0:
            raise ConfigError(f"meta stage: {', '.join(low) or f'epochs {self.epochs}'} is too small")


@dataclass(frozen=True)
class TuneSettings:
    """What all tuned methods share.

    ``trunk``: what is trained: "all" of the encoder, its last blocks (a number), or "head", a linear projection that
    starts as the identity over a frozen encoder. ``way``, ``shots``, ``queries``, ``episodes``: of the test on novel
    classes. ``chunk``: clips that go through the encoder at once, but for an episode's, which go together.
    """

    trunk: str | int = "all"
    pooling: str = "time"
    level: str = "last"
    meta: MetaSettings = MetaSettings()
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int = 1
    episodes: int = 10_000
    chunk: int = 64
    workers: int = 0  # threads that decode clips of a manifest too large for memory
    num_frames: int | None = None  # of a manifest's clips; None: as the encoder was trained
    crop_size: int | None = None
    frame_step: int | None = None

    def __post_init__(self):
        parse_trunk(self.trunk)
        if self.way < 2 or not self.shots or min(*self.shots, self.queries, self.episodes, self.chunk) < 1:
            raise ConfigError(
                f"few-shot test: way {self.way}, shots {self.shots}, queries {self.queries}, episodes {self.episodes}, "
                f"chunk {self.chunk}; expected 2 or more ways, at least one shot and 1 or more of the others"
            )


@dataclass
class TuneResult:
    """A tuned model and how it came about.

    ``losses``: mean per epoch, by stage. ``validation``: few-shot accuracy on the validation classes, by stage; of
    "meta" one per epoch. ``test``: EpisodeResult on the novel classes by stage and shots, all stages on the same
    episodes; "start" is the model as it was given, "meta" the answer. ``notes``: what was changed or is worth knowing.
    """

    method: str
    model: Embedder
    losses: dict[str, list[float]]
    validation: dict[str, list[float]]
    test: dict[str, dict[int, EpisodeResult]]
    best_epoch: int  # of the meta stage, from 1; 0: no meta stage
    temperature: float
    seed: int
    settings: TuneSettings
    notes: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> nn.Module | None:
        """The tuned encoder (its ``state_dict()`` can be saved); None where frozen features were given."""
        return self.model.encoder

    def to_dict(self) -> dict:
        """Plain types, for JSON; without weights and per-episode values."""
        episode = ("mean", "ci95", "episodes", "way", "shot", "queries")
        return {
            "method": self.method,
            "losses": self.losses,
            "validation": self.validation,
            "test": {
                stage: {str(shot): {k: getattr(r, k) for k in episode} for shot, r in by_shot.items()}
                for stage, by_shot in self.test.items()
            },
            "best_epoch": self.best_epoch,
            "temperature": self.temperature,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "notes": list(self.notes),
        }


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Part:
    """Base, validation or novel classes. ``labels`` int64 ``[n]`` from 0 without gaps; ``fetch(rows)`` gives clips
    uint8 ``[B, 3, F, S, S]`` or features float32 ``[B, d]``; ``key`` names the content.
    """

    role: str
    name: str
    labels: np.ndarray
    fetch: Callable[[np.ndarray], Tensor] = field(repr=False)
    key: object = field(repr=False)
    ids: tuple[int, ...] = ()  # the numbers that the classes have in the source
    features: bool = False

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def take(self, rows: np.ndarray) -> Part:
        """Some samples of it, under the same role; labels counted anew."""
        kept, labels = np.unique(self.labels[rows], return_inverse=True)
        ids = tuple(self.ids[k] for k in kept)
        return replace(self, labels=labels.reshape(-1), fetch=lambda i: self.fetch(rows[i]), ids=ids)


def part_of(source, role: str, encoder: nn.Module | None, workers: int = 0, view=(None, None, None)) -> Part:
    """The Part of a ClipSet, a data.Manifest (which needs ``encoder``, for its view) or Features.

    ``view``: num_frames, crop_size and frame_step of a manifest's clips, None as the encoder was trained.

    Raises DataError: no samples, one class only, features that are not finite, clips that are not square.
    """
    name = f"{role} part {source.name}"
    raw = np.asarray(source.y if isinstance(source, Features) else source.labels).reshape(-1)
    if not len(raw):
        raise DataError(f"{name}: no samples")
    ids, labels = np.unique(raw, return_inverse=True)
    ids, labels = tuple(ids.tolist()), labels.reshape(-1)
    if len(ids) == 1:
        raise DataError(f"{name}: one class only; few-shot tuning needs at least two")
    if isinstance(source, Features):
        _finite(source.x, name)
        x = torch.from_numpy(np.ascontiguousarray(source.x))
        key = hashlib.sha256(x.numpy().tobytes()).hexdigest()
        return Part(role, source.name, labels, lambda rows: x[torch.as_tensor(rows)], key, ids, True)
    if encoder is None:
        raise DataError(f"{name}: clips need an encoder; without one give Features")
    if isinstance(source, ClipSet):
        clips = source.clips
        if clips.dtype != torch.uint8 or clips.dim() != 5 or clips.shape[-1] != clips.shape[-2]:
            raise DataError(f"{name}: clips must be uint8 [n,3,F,S,S], got {clips.dtype} {tuple(clips.shape)}")
        return Part(role, source.name, labels, lambda rows: clips[torch.as_tensor(rows)], source.hash, ids)
    view = _view(encoder, *view)
    frames, crop = view.pop("num_frames"), view.pop("crop_size")
    if len(source) * 3 * frames * crop * crop <= IN_MEMORY:
        return part_of(decode_clips(source, num_frames=frames, crop_size=crop, **view), role, encoder)

    def fetch(rows):
        from vjepa_fast.data import eval_clip

        def one(row):
            return eval_clip(source.paths[row], frames, crop, **view)

        if workers < 1:
            return torch.stack([one(r) for r in rows])
        with ThreadPoolExecutor(workers) as pool:
            return torch.stack(list(pool.map(one, rows)))

    return Part(role, source.name, labels, fetch, str(source.hash), ids)


def parts_of(encoder, base, val, novel, settings: TuneSettings, seed: int) -> tuple[Part, Part, Part, list[str]]:
    """(base, val, novel, notes), looked at as a whole before anything is trained.

    ``val`` None: a fifth of the base classes, but at least ``meta.val_way``, is set aside for it.

    Raises DataError: as :func:`part_of`; too few classes or samples per class for the episodes of a part; two parts
    that are the same data; features of unequal width.
    """
    meta, notes = settings.meta, []
    how = encoder, settings.workers, (settings.num_frames, settings.crop_size, settings.frame_step)
    base, novel = part_of(base, "base", *how), part_of(novel, "novel", *how)
    if val is None:
        count = max(meta.val_way, base.classes // 5)
        if base.classes - count < 2:
            raise DataError(
                f"base part {base.name}: no validation classes given and only {base.classes} base classes, of which "
                f"{count} would have to be set aside; give validation classes or lower val_way"
            )
        held = np.random.default_rng(seed).permutation(base.classes)[:count]
        val_rows, base_rows = (np.flatnonzero(np.isin(base.labels, held) == side) for side in (True, False))
        val, base = base.take(val_rows), base.take(base_rows)
        val = replace(val, role="val", key=None)
        base = replace(base, name=f"{base.name} less {count} classes set aside for validation")
        notes.append(f"{count} of the base classes were set aside as validation classes")
    else:
        val = part_of(val, "val", *how)
    parts = base, val, novel
    for one, other in ((base, novel), (val, novel), (base, val)):
        if one.key == other.key:
            raise DataError(f"{one.role} and {other.role} part are the same data ({one.name}); classes must be apart")
        if one.features != other.features:
            raise DataError(f"{one.role} and {other.role} part: give clips for all parts or features for all")
        if shared := sorted(set(one.ids) & set(other.ids)):
            notes.append(
                f"{one.role} and {other.role} part share class numbers ({', '.join(map(str, shared[:8]))}"
                f"{', ...' if len(shared) > 8 else ''}): taken for numberings of their own; if these are the same "
                "classes, the accuracy is not one on unseen classes"
            )
            log.warning(notes[-1])
    widths = {p.role: p.fetch(np.array([0])).shape[1:] for p in parts}
    if len(set(widths.values())) > 1:
        shapes = ", ".join(f"{k} {tuple(v)}" for k, v in widths.items())
        raise DataError(f"few-shot tuning: samples of unequal shape: {shapes}")
    check_counts(base, val, novel, settings)
    if meta.reduce_way and base.classes < meta.way:
        notes.append(f"meta stage: {meta.way}-way asked for, but {base.classes} base classes; {base.classes}-way taken")
        log.warning(notes[-1])
    return base, val, novel, notes


def check_counts(base, val, novel, settings: TuneSettings) -> None:
    """DataError where a part (anything with ``labels`` and ``name``; ``val`` may be None) has too few classes or
    samples for its episodes.
    """
    meta, classes = settings.meta, len(np.unique(base.labels))
    asked = [("base", base, min(meta.way, classes) if meta.reduce_way else meta.way, meta.shot, meta.queries)]
    asked += [] if val is None else [("val", val, meta.val_way, meta.shot, meta.val_queries)]
    asked += [("novel", novel, settings.way, shot, settings.queries) for shot in settings.shots]
    for role, part, way, shot, queries in asked:
        try:
            sample_episodes(part.labels, way, shot, queries, 1, 0)
        except DataError as error:
            raise DataError(f"{role} part {part.name}: {error}") from None


def _finite(x: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise DataError(f"{name}: features of {int(bad.sum())} of {len(x)} samples are NaN or infinite")


# ---------------------------------------------------------------- model


class Embedder(nn.Module):
    """The features that prototypes are made of: encoder, projection and pooling.

    ``per_token``: the projection acts on tokens ``[B, N, D]``, not on pooled features ``[B, d]``. Called with features
    ``[B, d]`` instead of clips it leaves the encoder out.
    """

    def __init__(self, encoder=None, projection=None, pooling="time", level="last", per_token=False):
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.pooling, self.level, self.per_token = pooling, level, per_token

    def tokens(self, clips: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Tokens float32 ``[B, N, D]`` and their grid, of clips uint8 ``[B, 3, F, S, S]``."""
        z, grid = encode(self.encoder, clips, level=self.level)
        z = z.float()
        return (self.projection(z) if self.per_token and self.projection is not None else z), grid

    def pooled(self, z: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Features ``[B, d]`` of tokens."""
        x = pool_tokens(z, grid, self.pooling)
        return x if self.per_token or self.projection is None else self.projection(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x if self.projection is None else self.projection(x)
        return self.pooled(*self.tokens(x))


def identity_projection(width: int) -> nn.Linear:
    """A linear layer of ``width`` that changes nothing yet."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
    return layer


def parse_trunk(trunk: str | int) -> str | int:
    """ "all", "head", or a number of last blocks (also as text: "2", "last 2 blocks"). ConfigError otherwise."""
    text = str(trunk).strip().lower()
    if text in ("all", "head"):
        return text
    number = text.removeprefix("last").removesuffix("s").removesuffix("block").strip()
    if number.isdigit() and int(number):
        return int(number)
    raise ConfigError(f"trunk: {trunk!r}; accepted: all, head, or the number of last blocks to train")


def build_embedder(encoder, base: Part, settings: TuneSettings, device, *, per_token: bool = False) -> Embedder:
    """A copy of ``encoder`` (the caller's stays as it is) in an Embedder, with gradients for ``settings.trunk`` alone.

    ConfigError: more last blocks than there are, or a trunk of an encoder where features were given.
    """
    trunk = parse_trunk(settings.trunk)
    if base.features:
        if encoder is not None and trunk != "head":
            raise ConfigError(f"trunk: {trunk!r} cannot be trained on frozen features; use head, or give clips")
        return Embedder(None, identity_projection(base.fetch(np.array([0])).shape[1])).to(device)
    encoder = copy.deepcopy(encoder).to(device).float().eval().requires_grad_(trunk == "all")
    if hasattr(encoder, "pos_embed"):
        encoder.pos_embed.requires_grad_(False)  # fixed sine-cosine positions
    model = Embedder(encoder, None, settings.pooling, settings.level, per_token)
    if trunk == "head":
        with torch.no_grad():
            z, grid = model.tokens(base.fetch(np.array([0])).to(device))
            width = z.shape[-1] if per_token else model.pooled(z, grid).shape[-1]
        model.projection = identity_projection(width)
    elif trunk != "all":
        blocks = getattr(encoder, "blocks", ())
        if trunk > len(blocks):
            raise ConfigError(f"trunk: last {trunk} blocks of an encoder with {len(blocks)}")
        norms = encoder.norms_block if settings.level == "all" else encoder.norms_block[-1:]
        for module in (*blocks[-trunk:], *norms):
            module.requires_grad_(True)
    return model.to(device)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``model`` with gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def new_head(width: int, classes: int, seed: int, device) -> nn.Linear:
    """A linear classifier whose weights ``seed`` draws; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, classes).to(device)


def amp(device: torch.device):
    """bfloat16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def embed(model: Embedder, part: Part, chunk: int, device) -> Features:
    """Features of all samples of a part, in order. DataError where they are not finite."""
    rows = []
    for index in np.array_split(np.arange(len(part.labels)), max(1, math.ceil(len(part.labels) / chunk))):
        with amp(device):
            rows.append(model(part.fetch(index).to(device)).float().cpu())
    x = torch.cat(rows).numpy()
    _finite(x, f"{part.role} part {part.name}")
    return Features(x, part.labels, part.name)


# ---------------------------------------------------------------- loop


def fit(
    parameters: list[nn.Parameter],
    samples: int,
    settings: FitSettings,
    loss_of: Callable[[np.ndarray], Tensor],
    *,
    chunk: int,
    seed: int,
    what: str,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Minimise the mean of ``loss_of(rows)`` over batches of ``samples`` samples; returns the mean loss per epoch.

    A batch above ``chunk`` is taken in portions whose gradients are added: the same step in less memory. Raises
    TrainingError when an epoch's loss is not finite.
    """
    if settings.optimizer == "sgd":
        decay = {"momentum": settings.momentum, "weight_decay": settings.weight_decay}
        optimizer = torch.optim.SGD(parameters, lr=settings.lr, **decay)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    steps, losses = math.ceil(samples / settings.batch_size), []
    for epoch in range(settings.epochs):
        total = 0.0
        for step, rows in enumerate(torch.randperm(samples, generator=generator).split(settings.batch_size)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.rate(epoch, step, steps)
            optimizer.zero_grad(set_to_none=True)
            for part in rows.split(chunk):
                loss = loss_of(part.numpy()) * (len(part) / len(rows))
                loss.backward()
                total = total + loss.detach().double() * len(rows)
            optimizer.step()
        losses.append(finite_loss(total / samples, what, epoch))
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    return losses


def finite_loss(value: Tensor, what: str, epoch: int) -> float:
    """``value`` as a float; TrainingError where it is NaN or infinite."""
    value = float(value)
    if not math.isfinite(value):
        raise TrainingError(f"{what}: the loss is {value} in epoch {epoch + 1}; lower lr")
    return value


def novel_episodes(model: Embedder, novel: Part, settings: TuneSettings, seed: int, device) -> dict[int, EpisodeResult]:
    """EpisodeResult by shots on the novel classes; the episodes depend on labels and ``seed`` alone."""
    features = embed(model, novel, settings.chunk, device)
    return {
        shot: prototype_episodes(features, settings.way, shot, settings.queries, settings.episodes, seed)
        for shot in settings.shots
    }
