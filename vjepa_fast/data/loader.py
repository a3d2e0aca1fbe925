"""Batches for training: endless, resumable, the same for any number of reading threads.

Shapes: B clips, F frames, S crop size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from vjepa_fast.config.checks import check_stream
from vjepa_fast.config.schema import Config
from vjepa_fast.data.bad_samples import BadSamples
from vjepa_fast.data.decoders import Facts, Request, Video, choose_decoder
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.media import ReadOptions, read_bytes
from vjepa_fast.data.mixing import MixedSampler
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.data.source import SourceReader
from vjepa_fast.data.views.augment import apply_view, random_view
from vjepa_fast.data.views.multi import multi_views
from vjepa_fast.errors import ConfigError, DataError

_ATTEMPTS = 20  # unreadable samples in a row before a run stops whatever the share allowed
_AHEAD = 2  # batches read ahead


@dataclass
class ClipGroup:
    """Clips of one length.

    Attributes:
        clip: uint8 ``[B, 3, F, S, S]``. labels, dataset: int64 ``[B]``. paths: of each clip.
        fpc: frames per clip. modality: "video" or "image" (the image stream, and clips of one frame).
        first_sample: global number of the first clip; the clips count on from it.
        local: under ``method: levjepa`` uint8 ``[B, V, 3, F, s, s]``, V local views of each clip; else None.
    """

    clip: torch.Tensor
    labels: torch.Tensor
    dataset: torch.Tensor
    paths: list[str]
    fpc: int
    modality: str
    first_sample: int
    local: torch.Tensor | None = None


@dataclass
class Batch:
    """What one step reads: one group per clip length."""

    groups: list[ClipGroup]
    step: int


@dataclass(frozen=True)
class Share:
    """Which batches of an optimiser step one process reads: those numbered ``own`` of the ``of`` of all processes."""

    own: tuple[int, ...]
    of: int


@dataclass
class _Sample:
    dataset: int
    index: int
    position: int
    clip: torch.Tensor | None = None  # [3, F or 1, S, S]
    local: torch.Tensor | None = None  # [V, 3, F or 1, s, s]
    request: Request | None = None  # in place of a clip that is decoded with its batch
    failed: list[tuple[int, str]] = field(default_factory=list)  # (index, reason) of what it stands in for


class ClipLoader:
    """Iterable of ``Batch``, without an end.

    The sample of (seed, step, slot) is a pure function, slot being the place in the batch of all processes together;
    so ``start_step`` resumes exactly. An unreadable sample is replaced by another of its dataset, which one being a
    function of the same.

    Args:
        cfg: ``data``, ``data_aug``, ``seed`` and ``compat`` are used; with ``img`` ``img_data`` in place of ``data``;
            with ``method: levjepa`` ``levjepa`` too.
        rank, world: this process and the number of processes; each reads ``batch_size`` clips a step.
        start_step: step of the first batch.
        start_sample: first sample of the first batch of all processes; None: all batches before were as large.
        img: read the image stream.
        share: the batches of an optimiser step that this process reads, one after another, each of them a step here.
            None: one, the one of its rank. Empty: none, and it must not be iterated.

    Attributes:
        bad: ``BadSamples``. manifests: one per dataset. step: the next batch's.

    Raises:
        DataError: a manifest cannot be used; or, while iterating, too many samples cannot be read.
        ConfigError: settings that do not fit one another.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        start_sample: int | None = None,
        img: bool = False,
        share: Share | None = None,
    ):
        self.section = "img_data" if img else "data"
        data = cfg.img_data if img else cfg.data
        if data is None or not data.datasets:
            raise ConfigError(f"{self.section}.datasets: name at least one manifest (vjepa-fast data manifest FOLDER)")
        check_stream(self.section, data)
        self.data, self.aug, self.img = data, cfg.data_aug, img
        self.levjepa = cfg.levjepa if cfg.method == "levjepa" else None
        self.share, self.step = share or Share((rank,), world), start_step
        self._before = 0
        regular = self.sample_at(start_step // max(1, len(self.share.own)))
        self._before = 0 if start_sample is None else start_sample - regular
        self.manifests = [load_manifest(path, Root.of(data)) for path in data.datasets]
        for manifest in self.manifests:
            if img and manifest.kind != "image":
                raise DataError(f"{manifest.path}: lists videos, {self.section} is for images")
        self.fpcs = data.dataset_fpcs * (len(data.datasets) if len(data.dataset_fpcs) == 1 else 1)
        self.bad = BadSamples(self.manifests, data.max_bad_fraction)
        self._sampler = MixedSampler([len(m) for m in self.manifests], data.datasets_weights, (cfg.seed, int(img)))
        spread = "published" if cfg.compat == "published" else "even"
        sampling = Sampling(data.frame_sample_rate, data.fps, data.duration, spread)
        options = ReadOptions.of(data)
        decoder = choose_decoder(data.decoder, f"{self.section}.decoder", options)
        self._reader = SourceReader(sampling, data.cache_mb, decoder, options)
        self._seed = (cfg.seed, int(img), 4)
        cuda = cfg.runtime.device != "cpu" and torch.cuda.is_available()
        self._pin = data.pin_mem and cuda
        self._pool = ThreadPoolExecutor(data.num_workers, "vjepa-fast-data") if data.num_workers > 0 else None
        self._batches = None  # a decoder of whole batches cuts one view of each clip
        if self.levjepa is None:
            self._batches = decoder.batches("cuda" if cuda else "cpu", data.batch_size, data.num_workers)
        self._one = ThreadPoolExecutor(1, "vjepa-fast-batches")  # batches that are decoded as a whole, one at a time
        self._queue: deque[Callable[[], list[_Sample]]] = deque()

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> Batch:
        size = self.data.batch_size
        first = self._first(self.step)
        if self._pool is None:
            samples = self._decode([self._load(first + slot) for slot in range(size)])
        else:
            while len(self._queue) <= _AHEAD:
                begin = self._first(self.step + len(self._queue))
                self._queue.append(self._start(self._pool, range(begin, begin + size)))
            samples = self._queue.popleft()()
        for sample in samples:
            self._account(sample)
        batch = Batch(self._group(samples, first), self.step)
        self.step += 1
        return batch

    def sample_at(self, step: int) -> int:
        """The first sample of an optimiser step, of all processes: how many were taken before it."""
        return self._before + step * self.share.of * self.data.batch_size

    def _first(self, step: int) -> int:
        """The first sample of this process at a step of its own."""
        whole, part = divmod(step, len(self.share.own))
        return self.sample_at(whole) + self.share.own[part] * self.data.batch_size

    def close(self) -> None:
        """Stop reading ahead. The loader cannot be used after it."""
        if self._pool is not None:
            self._one.shutdown(wait=False, cancel_futures=True)
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._one.shutdown(wait=True)
            self._queue.clear()
        if self._batches is not None:
            self._batches.close()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _numbers(self, path: str, dataset: int, video: Video | Facts, generator: np.random.Generator) -> np.ndarray:
        info, frames = video.info, self.fpcs[dataset]
        sampling = self._reader.sampling
        return sampling.indices(path, info["frames"], info["fps"], frames, "random", generator, video.times)

    def _start(self, pool: ThreadPoolExecutor, positions: range) -> Callable[[], list[_Sample]]:
        """Begin to read these samples; what is returned waits for them."""
        futures = [pool.submit(self._load, position) for position in positions]
        if self._batches is None:
            return lambda: [future.result() for future in futures]
        return self._one.submit(lambda: self._decode([future.result() for future in futures])).result

    def _load(self, position: int, whole: bool = True) -> _Sample:
        """The sample at a position, read or (``whole``) ready to be decoded with its batch."""
        dataset, index = self._sampler(position)
        sample = _Sample(dataset, index, position)
        for attempt in range(_ATTEMPTS):
            try:
                sample.request = self._request(sample, attempt) if whole and self._batches is not None else None
                if sample.request is None:
                    self._read(sample, attempt)
                break
            except DataError as error:
                sample.failed.append((sample.index, str(error)))
                sample.index = self._sampler.replacement(position, attempt, dataset)
        return sample

    def _read(self, sample: _Sample, attempt: int) -> None:
        generator = np.random.default_rng([*self._seed, sample.position, attempt])
        manifest, frames = self.manifests[sample.dataset], self.fpcs[sample.dataset]
        clip = self._reader.read(manifest.paths[sample.index], manifest.kind, frames, "random", generator)
        if self.levjepa is not None:
            views = multi_views(clip, generator, self.aug, self.levjepa, self.data.crop_size)
            sample.clip, sample.local = views
            return
        view = random_view(generator, clip.shape[1], clip.shape[2], self.aug)
        sample.clip = apply_view(clip, view, self.data.crop_size)

    def _request(self, sample: _Sample, attempt: int) -> Request | None:
        """What `_read` would read, drawn from the same generator in the same order; None if it has to."""
        assert self._batches is not None
        manifest = self.manifests[sample.dataset]
        path, image = manifest.paths[sample.index], manifest.kind == "image"
        facts = self._batches.look(path, manifest.kind)
        if facts is None:
            return None
        generator = np.random.default_rng([*self._seed, sample.position, attempt])
        info = facts.info
        numbers = np.zeros(1, np.int64) if image else self._numbers(path, sample.dataset, facts, generator)
        view = random_view(generator, info["height"], info["width"], self.aug)
        box = view.top, view.left, view.height, view.width
        return Request(path, facts.kind, read_bytes(path), image, numbers, box, view.flip)

    def _decode(self, samples: list[_Sample]) -> list[_Sample]:
        """Decode those that are only ready for it, the clips of one length together."""
        if self._batches is None:
            return samples
        asked = [(i, s.request) for i, s in enumerate(samples) if s.request is not None]
        for group in dict.fromkeys((r.image, len(r.numbers)) for _, r in asked):
            members = [(i, r) for i, r in asked if (r.image, len(r.numbers)) == group]
            clips = self._batches.decode([r for _, r in members], self.data.crop_size)
            for (i, request), clip in zip(members, clips, strict=True):
                if clip is not None and not self._batches.doubts(request):
                    samples[i].clip, samples[i].request = clip, None
                    continue
                usual = self._load(samples[i].position, whole=False)
                same = usual.index == samples[i].index  # it was not found to be damaged
                if clip is not None and usual.clip is not None and same:
                    usual.clip = clip if self._batches.compare(request, clip, usual.clip) else usual.clip
                samples[i] = usual
        return samples

    def _account(self, sample: _Sample) -> None:
        paths = self.manifests[sample.dataset].paths
        for index, reason in sample.failed:
            self.bad.add(sample.dataset, index, paths[index], reason)
        if sample.clip is None:
            raise DataError(
                f"{self.manifests[sample.dataset].path}: {_ATTEMPTS} samples in a row cannot be read; "
                f"the last: {sample.failed[-1][1]}"
            )
        self.bad.add(sample.dataset, sample.index, paths[sample.index], None)

    def _group(self, samples: list[_Sample], first: int) -> list[ClipGroup]:
        groups, done = [], 0
        for fpc in dict.fromkeys(self.fpcs):
            members = [s for s in samples if self.fpcs[s.dataset] == fpc]
            if not members:
                continue
            clip = self._stacked([s.clip for s in members], fpc)
            local = None if self.levjepa is None else self._stacked([s.local for s in members], fpc)
            manifests = [self.manifests[s.dataset] for s in members]
            labels = torch.tensor([int(m.labels[s.index]) for m, s in zip(manifests, members)])
            datasets = torch.tensor([s.dataset for s in members])
            paths = [m.paths[s.index] for m, s in zip(manifests, members)]
            modality = "image" if self.img or fpc == 1 else "video"
            groups.append(ClipGroup(clip, labels, datasets, paths, fpc, modality, first + done, local))
            done += len(members)
        return groups

    def _stacked(self, clips: Sequence[torch.Tensor | None], frames: int) -> torch.Tensor:
        """``[..., 3, F or 1, S, S]`` of each sample as one tensor; a single image is repeated over the frames."""
        read = [clip for clip in clips if clip is not None]
        assert len(read) == len(clips), "_account has raised"
        *before, _, height, width = read[0].shape
        shape = (len(read), *before, frames, height, width)
        if any(clip.is_cuda for clip in read):
            out = torch.empty(shape, dtype=torch.uint8, device="cuda")
            for row, clip in zip(out, read):
                row.copy_(clip)
            return out
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        for row, clip in zip(out.numpy(), read):
            row[:] = clip.numpy()
        return out
