"""Samples in .tar shards: the same clips in the same order as from files, and what is wrong with shards."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from vjepa_fast.cli import main
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import ClipLoader, load_manifest, members, read_image
from vjepa_fast.data.decoders import DECODERS
from vjepa_fast.data.manifests import pipes, shards
from vjepa_fast.errors import DataError


def write_shard(path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample(key: str, film: str, label: int) -> list[tuple[str, bytes]]:
    """A film and its label, in one of the forms that labels have."""
    forms = [("cls", str(label)), ("json", json.dumps({"label": label, "fps": 8})), ("json", str(label))]
    suffix, text = forms[label % 3]
    with open(film, "rb") as file:
        files = [(f"{key}.mp4", file.read()), (f"{key}.{suffix}", text.encode())]
    return files if label % 2 else files[::-1]


@pytest.fixture(scope="module")
def films(tiny_suites):
    return load_manifest(tiny_suites["motion8"]["train"])


@pytest.fixture
def tars(films, tmp_path):
    """Pattern of three shards with the 12 films in the manifest's order."""
    for number in range(3):
        rows = range(4 * number, 4 * number + 4)
        files = [file for i in rows for file in sample(f"part/{i:03}", films.paths[i], int(films.labels[i]))]
        write_shard(tmp_path / f"train-{number:06}.tar", [("._000.mp4", b"of macOS"), ("readme.txt", b"x"), *files])
    return str(tmp_path / "train-{000000..000002}.tar")


def take(cfg, number, **options):
    with ClipLoader(cfg, **options) as loader:
        return [next(loader).groups[0] for _ in range(number)], loader


def test_clips_are_those_of_files_in_the_same_order(films, tars, make_config, tmp_path):
    plain, _ = take(make_config(films.path), 3)
    found, loader = take(make_config(tars), 3)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.labels, b.labels)
    assert loader.manifests[0].labels.tolist() == films.labels.tolist() and loader.manifests[0].kind == "video"
    memory = fsspec.filesystem("memory")
    for name in os.listdir(tmp_path):
        memory.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    (tmp_path / "home").mkdir()
    distant, _ = take(make_config(tars.replace(str(tmp_path), "memory://shards"), num_workers=2), 3)
    assert all(torch.equal(a.clip, b.clip) for a, b in zip(plain, distant, strict=True))


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """The indices of shards behind URLs are kept here."""
    monkeypatch.setattr(shards, "_REMOTE", str(tmp_path / "home"))
    monkeypatch.setattr(pipes, "FOLDER", str(tmp_path / "pipes"))


def test_two_ranks_with_two_threads_share_an_epoch_and_resume(films, tars, make_config):
    cfg = make_config(tars, batch_size=2, num_workers=2)
    parts = [take(cfg, 3, rank=rank, world=2)[0] for rank in range(2)]
    paths = [path for part in parts for group in part for path in group.paths]
    assert len(paths) == 12 and set(paths) == set(load_manifest(tars).paths)
    assert paths != sorted(paths)
    for rank, part in enumerate(parts):
        rest, _ = take(cfg, 2, rank=rank, world=2, start_step=1)
        for a, b in zip(part[1:], rest, strict=True):
            assert torch.equal(a.clip, b.clip) and a.paths == b.paths
    later = [path for rank in range(2) for g in take(cfg, 3, rank=rank, world=2, start_step=3)[0] for path in g.paths]
    assert sorted(later) == sorted(paths) and later != paths  # the next epoch has another order


def test_shards_are_mixed_in_proportion(films, tars, make_config):
    cfg = make_config(tars, films.path, datasets_weights=(0.25, 0.75))
    with ClipLoader(cfg) as loader:
        assert sum(loader._sampler(position)[0] == 0 for position in range(2000)) == 500


def test_the_index_is_kept_until_a_shard_changes(films, tars, tmp_path, monkeypatch):
    first = load_manifest(tars)
    assert (tmp_path / "train-000001.tar.samples.json").is_file()
    scans = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda file: scans.append(file) or scan(file))
    assert load_manifest(tars).paths == first.paths and not scans
    write_shard(tmp_path / "train-000001.tar", sample("new", films.paths[0], 3))
    assert len(load_manifest(tars)) == 9 and len(scans) == 1
    assert first.hash != load_manifest(tars).hash


def test_an_index_beside_a_url_is_used(tars, tmp_path, monkeypatch):
    paths = load_manifest(tars).paths
    memory = fsspec.filesystem("memory")
    for path in tmp_path.glob("train-*"):  # shards with their indices
        memory.pipe(f"/indexed/{path.name}", path.read_bytes())
    monkeypatch.setattr(shards, "_scan", None)
    distant = load_manifest(tars.replace(str(tmp_path), "memory://indexed")).paths
    assert [p.replace("memory://indexed", str(tmp_path)) for p in distant] == paths
    assert len(list((tmp_path / "home").iterdir())) == 3


def test_a_server_without_parts_of_files_is_named(tars, tmp_path, monkeypatch):
    blob = (tmp_path / "train-000000.tar").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/whole/train.tar", blob)
    path = load_manifest("memory://whole/train.tar").paths[0]
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=None, end=None, **_: blob)
    with pytest.raises(OSError, match="sends whole files; copy"):
        members.read_bytes(path)


def test_patterns_and_lists(tars, tmp_path, monkeypatch):
    paths = load_manifest(tars).paths
    (tmp_path / "list.txt").write_text("train-{000000..000001}.tar\n\ntrain-000002.tar\n")
    monkeypatch.chdir(tmp_path)
    for entry in (tmp_path / "train-*.tar", tmp_path / "list.txt", "train-00000{0,1,2}.tar"):
        assert load_manifest(entry).paths == paths
    for entry, message in (
        (tars.replace("2}", "7}"), "5 of 8 shards are missing, the first: .*000003.tar"),
        (tmp_path / "none-*.tar", "no shard fits"),
        (tars.replace("0..", "9.."), "must count up"),
        ("pipe:cat x.tar", "the command ended with code 1: .*x.tar"),
        ("pipe:true", "the command wrote nothing"),
        ("pipe: ", "names no command"),
        ("nowhere://x.tar", "nowhere"),
        ("memory://none.tar", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            load_manifest(entry)


def test_what_a_command_writes_is_kept_and_read_in_any_order(films, tars, tmp_path, make_config):
    folder, spool = tmp_path / "once", tmp_path / "pipes"
    folder.mkdir()
    command = f"pipe:touch {folder}/$(date +%s%N) && gzip -c {tmp_path}/train-{{000000..000002}}.tar | gunzip"
    plain, _ = take(make_config(films.path), 3)
    piped, _ = take(make_config(command), 3)
    assert all(
        torch.equal(a.clip, b.clip) and torch.equal(a.labels, b.labels) for a, b in zip(plain, piped, strict=True)
    )
    assert len(os.listdir(folder)) == 3  # each command was run once
    rest, _ = take(make_config(command), 2, start_step=1)
    assert all(torch.equal(a.clip, b.clip) for a, b in zip(plain[1:], rest, strict=True))
    assert len(os.listdir(folder)) == 3
    assert not [name for name in os.listdir(spool) if name.endswith(".tmp")]
    with pytest.raises(DataError, match="ended with code 3: no such host"):
        load_manifest(f"pipe:cat {tmp_path}/train-000000.tar; echo no such host >&2; exit 3")
    assert len([name for name in os.listdir(spool) if name.endswith(".tar")]) == 3  # half a shard is not kept
    (tmp_path / "list.txt").write_text(f"train-000000.tar\npipe:touch {tmp_path}/ran\n")
    with pytest.raises(DataError, match="list.txt: pipe:touch .* not run from a file"):
        load_manifest(tmp_path / "list.txt")
    assert not (tmp_path / "ran").exists()


def test_braces_of_a_command_that_are_no_span_stay():
    text = "pipe:awk '{print $1,$2}' part-{08..09} | sed s/{a,b}//"
    assert shards._expanded(text, words=False) == [text.replace("{08..09}", n) for n in ("08", "09")]


def test_bad_members_are_counted_not_fatal(films, tmp_path, make_config, capsys):
    good = [sample(f"{i}", films.paths[i], 3) for i in range(4)]
    film = good[0][0][1]
    write_shard(tmp_path / "a.tar", [*good[0], ("no.mp4", film), ("word.cls", b"cat"), ("word.mp4", film)])
    write_shard(tmp_path / "b.tar", [*good[1], ("zero.mp4", b""), ("zero.cls", b"1"), *good[2], *good[3]])
    blob = (tmp_path / "b.tar").read_bytes()
    at = load_manifest(tmp_path / "b.tar").paths[-1].split("[")[1].split("+")[0]
    (tmp_path / "c.tar").write_bytes(blob[: int(at) + 700])  # ends within the last film
    (tmp_path / "d.tar").write_bytes(blob[: int(at) - 512] + b"rubbish" * 200)  # in place of its header
    (tmp_path / "e.tar").write_bytes(b"no archive" * 100)
    manifest = load_manifest(tmp_path / "*.tar")
    (_, *_), loader = take(make_config(manifest.path, max_bad_fraction=0.8), 12)
    reasons = {path.rsplit("/", 2)[-2][:5] + "/" + path.rsplit("/", 1)[1]: why for path, why in loader.bad.samples}
    for name, why in {
        "a.tar/no.mp4": "no .cls or .json",
        "a.tar/word.mp4": "its .cls or .json holds no label",
        "b.tar/zero.mp4": "is empty",
        "c.tar/zero.mp4": "is empty",
        "c.tar/3.mp4": "the shard ends here",
        "d.tar/zero.mp4": "is empty",
        "d.tar/the rest of the shard": "damaged from here on",
        "e.tar/no samples": "is no .tar file",
    }.items():
        assert why in reasons.pop(name)
    assert not reasons and loader.bad.tried == len(manifest)
    assert main(["data", "check", manifest.path, "--speed", "0"]) == 2
    assert "8 of 16 samples cannot be read" in capsys.readouterr().err


def test_shards_without_any_label_and_shards_of_images(films, tiny_suites, tmp_path, make_config):
    write_shard(tmp_path / "plain.tar", [sample("a", films.paths[0], 1)[0], sample("b", films.paths[1], 1)[0]])
    assert load_manifest(tmp_path / "plain.tar").labels.tolist() == [0, 0]
    groups, loader = take(make_config(tmp_path / "plain.tar"), 2)
    assert loader.bad.count == 0 and len(groups) == 2
    images = load_manifest(tiny_suites["objects"]["train"]).paths[:3]
    files = [(f"{i}.jpg", Path(path).read_bytes()) for i, path in enumerate(images)]
    write_shard(tmp_path / "images.tar", [x for i, f in enumerate(files) for x in (f, (f"{i}.cls", b"2"))])
    manifest = load_manifest(tmp_path / "images.tar")
    assert manifest.kind == "image" and manifest.labels.tolist() == [2, 2, 2]
    assert all(np.array_equal(read_image(a), read_image(b)) for a, b in zip(manifest.paths, images))
    cfg = make_config(films.path)
    still = DataConfig(datasets=(manifest.path,), dataset_fpcs=(1,), batch_size=3, crop_size=32)
    (group,), _ = take(dataclasses.replace(cfg, img_data=still), 1, img=True)
    assert group.modality == "image" and len(set(group.paths)) == 3


@pytest.mark.parametrize("name", [name for name, kind in DECODERS.items() if not kind.objections()])
def test_every_decoder_reads_members(name, films, tars, make_config):
    plain, _ = take(make_config(films.path, decoder=name), 2)
    found, loader = take(make_config(tars, decoder=name), 2)
    assert loader.bad.count == 0
    assert all(torch.equal(a.clip.cpu(), b.clip.cpu()) for a, b in zip(plain, found, strict=True))
