"""Small trees of data sets in the forms of their official downloads. Every frame carries its number as painted bits."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np

HEIGHT, WIDTH, BITS = 32, 64, 8


def painted(numbers, height=HEIGHT, width=WIDTH) -> np.ndarray:
    """uint8 ``[F, height, width, 3]``: stripes from left to right, white where a bit of the number is set."""
    bits = (np.asarray(numbers)[:, None] >> np.arange(BITS)) & 1
    stripes = np.repeat(bits, width // BITS, axis=1).astype(np.uint8) * 200 + 20
    return np.ascontiguousarray(np.broadcast_to(stripes[:, None, :, None], (len(stripes), height, width, 3)))


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that frames carry."""
    stripes = frames.mean((1, 3)).reshape(len(frames), BITS, -1).mean(-1) > 120
    return (stripes << np.arange(BITS)).sum(1).tolist()


def film(path: Path, frames=10, fps=10, codec="libx264", gop=5, times=None, size=(HEIGHT, WIDTH)) -> Path:
    """A video; ``times`` (in ms) makes its rate vary."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, 1000 if times is not None else fps)
        for i, picture in enumerate(painted(range(frames), *size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = i if times is None else int(times[i])
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class Trees:
    """Makes trees below a folder; each kind of film is encoded once and then copied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Path] = {}

    def film(self, path: Path) -> Path:
        """A film of 10 frames in the container of ``path``."""
        codecs = {".avi": "mpeg4", ".mp4": "libx264", ".webm": "libvpx"}
        if path.suffix not in self._made:
            self._made[path.suffix] = film(self.folder / "films" / f"film{path.suffix}", codec=codecs[path.suffix])
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._made[path.suffix], path)
        with path.open("ab") as file:  # no two have the same content
            file.write(os.fsencode(path) if path.suffix != ".webm" else b"")
        return path

    def ucf101(self, root: Path, classes=("Biking", "HandstandPushups"), groups=4, flat=False) -> Path:
        lists = root / "ucfTrainTestlist"
        lists.mkdir(parents=True)
        # as published: CRLF, and one class whose files spell it otherwise
        (lists / "classInd.txt").write_bytes("".join(f"{i} {c}\r\n" for i, c in enumerate(classes, 1)).encode())
        for split in (1, 2, 3):
            rows: dict[str, list[str]] = {"train": [], "test": []}
            for number, name in enumerate(classes, 1):
                for group in range(1, groups + 1):
                    spelled = name.replace("Handstand", "HandStand")
                    video = f"{name}/v_{spelled}_g{group:02d}_c01.avi"
                    if group % 3 == split % 3:
                        rows["test"].append(video)
                    else:
                        rows["train"].append(f"{video} {number}")
                    if split == 1:
                        self.film(root / "UCF-101" / (video.rpartition("/")[2] if flat else video))
            for part, lines in rows.items():
                (lists / f"{part}list{split:02d}.txt").write_bytes("".join(f"{x}\r\n" for x in lines).encode())
        return root

    def hmdb51(self, root: Path, classes=("brush_hair", "cartwheel")) -> Path:
        lists = root / "testTrainMulti_7030_splits"
        lists.mkdir(parents=True)
        for name in classes:
            lines = []
            for i, part in enumerate((1, 1, 1, 2, 2, 0)):
                video = f"(Rad)Schlag_die_Bank! #{i}_{name}_f_cm_np1_le_med_{i}.avi"
                self.film(root / name / video)
                lines.append(f"{video} {part} \n")
            for split in (1, 2, 3):
                (lists / f"{name}_test_split{split}.txt").write_text("".join(lines))
        return root

    def ssv2(self, root: Path, each=3) -> Path:
        labels = root / "labels"
        labels.mkdir(parents=True)
        templates = ("Putting [something] on [something]", "Pulling [something] from left to right")
        plain = [t.replace("[", "").replace("]", "") for t in templates]
        (labels / "labels.json").write_text(json.dumps({name: str(i) for i, name in enumerate(plain)}))
        number = 1
        for part, count in (("train", each), ("validation", 2)):
            rows = []
            for template, _ in ((t, i) for t in templates for i in range(count)):
                words = {"placeholders": ["a cup", "a table"], "label": "putting a cup on a table"}
                rows.append({"id": str(number), "template": template, **words})
                self.film(root / "20bn-something-something-v2" / f"{number}.webm")
                number += 1
            (labels / f"{part}.json").write_text(json.dumps(rows))
        (labels / "test.json").write_text(json.dumps([{"id": "999"}]))
        return root

    def diving48(self, root: Path) -> Path:
        root.mkdir(parents=True)
        vocabulary = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"]]
        (root / "Diving48_vocab.json").write_text(json.dumps(vocabulary))
        for part, count in (("train", 3), ("test", 2)):
            rows = []
            for label in (0, 1):
                for i in range(count):
                    video = f"_8Vy3dlHg2w_{label}{'train test'.index(part)}{i:03d}"
                    rows.append({"vid_name": video, "label": label, "start_frame": 0, "end_frame": 10})
                    self.film(root / "rgb" / f"{video}.mp4")
            (root / f"Diving48_V2_{part}.json").write_text(json.dumps(rows))
        return root

    def kinetics400(self, root: Path) -> Path:
        (root / "annotations").mkdir(parents=True)
        for part, split, count in (("train", "train", 3), ("val", "validate", 2)):
            table = io.StringIO()
            rows = csv.writer(table)
            rows.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
            for number, name in enumerate(("abseiling", "air drumming")):
                for i in range(count):
                    video = f"-{part[0]}KzYxM{number}{i:03d}"
                    rows.writerow([name, video, 20 + i, 30 + i, split, 0])
                    self.film(root / part / f"{video}_{20 + i:06d}_{30 + i:06d}.mp4")
            (root / "annotations" / f"{part}.csv").write_text(table.getvalue())
        return root

    def imagenet100(self, root: Path, wnids=("n01558993", "n01692333"), strange="n99999999") -> Path:
        from PIL import Image

        for part, count in (("train", 3), ("val", 2)):
            for number, wnid in enumerate((*wnids, strange)):
                for i in range(count):
                    path = root / part / wnid / f"{wnid}_{part}_{i}.JPEG"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(painted([40 * number + i])[0]).save(path, format="JPEG")
        (root / "classes.txt").write_text("".join(f"{w}\n" for w in reversed(wnids)))
        return root

    def shards(self, root: Path, each=3) -> Path:
        root.mkdir(parents=True)
        for part in ("train", "val"):
            with tarfile.open(root / f"{part}-000000.tar", "w") as archive:
                for i in range(2 * each):
                    content = {"mp4": self.film(root.parent / "scratch" / f"{part}{i}.mp4").read_bytes()}
                    content |= {"cls": str(i % 2).encode(), "json": json.dumps({"caption": "a film"}).encode()}
                    for suffix, blob in content.items():
                        member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                        member.size = len(blob)
                        archive.addfile(member, io.BytesIO(blob))
        return root
