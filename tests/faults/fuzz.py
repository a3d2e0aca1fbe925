"""Recipes, manifests and caches changed at random, and read: each is used or refused in one line.

    python tests/faults/fuzz.py                     # 700 recipes, 250 manifests, 50 caches
    python tests/faults/fuzz.py --configs 7 --manifests 5 --caches 5 --out /tmp/fuzz.json

A case is a function of its kind and number, so one that went wrong can be had again: ``--only configs:123``.
"""

import argparse
import contextlib
import copy
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.data.test_fuzz_lists import mutated as mutated_list  # noqa: E402
from vjepa_fast import config, trainer  # noqa: E402
from vjepa_fast.config.load import RECIPES  # noqa: E402
from vjepa_fast.data import load_manifest  # noqa: E402
from vjepa_fast.errors import UserError  # noqa: E402
from vjepa_fast.evaluation.extract.features import Features, load_cache, save_cache  # noqa: E402
from vjepa_fast.evaluation.extract.shards import ShardStore  # noqa: E402
from vjepa_fast.evaluation.extract.tokens import open_tokens  # noqa: E402

SECONDS = 10  # after which a case hangs
LONGEST = 2000  # characters of a refusal
TINY = {  # so that what is read can be checked as `train` would
    "model": {"embed_dim": 48, "depth": 2, "num_heads": 3, "levels": 2, "pred_embed_dim": 24, "pred_depth": 1,
              "pred_num_heads": 2},
    "data": {"crop_size": 32, "patch_size": 8, "dataset_fpcs": [4]},
    "runtime": {"device": "cpu", "dtype": "float32"},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.5, 1e-30, 1e30, 2**31, 2**63, 2**64, -(2**63), 10**30, float("inf"),
    float("nan"), "", " ", "auto", "x", "x" * 3000, "💥\u202e", "\0", "../..", "/dev/zero", "*a", "&a", "null", "1e3",
    [], {}, [[]], [None], [0, 0], [1, 2, 3], {"a": 1}, {"a": {"b": []}}, {1: 2}, [1e9] * 50, "2001-13-45", "${HOME}",
]  # fmt: skip
SNIPPETS = [
    "&a [*a]", "*b", "<<: *b", "!!binary x", "[" * 60, "{a: " * 60, "- " * 60, "\t", "\0", "---\n", "...\n", "? ", ": ",
    "%YAML 9.9\n", "!!python/object/apply:os.system [id]", "é\u2028", "9" * 5000, "0x", "0b2", "1:60:99", "'", '"', "#",
    "|\n", ">\n", "\n  ", "\ud83d".encode("utf-8", "surrogatepass").decode("latin1"), "@", "`", "~", "=", "\x1b[31m",
]  # fmt: skip


class Hang(BaseException):
    """A case takes longer than `SECONDS`."""


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """(container, key) of everything in nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key  # pyright: ignore[reportReturnType]  # a dict or list, by the line above
        yield from places(item)


def recipe(rng: random.Random, file: Path) -> Callable[[], object]:
    """A changed recipe in ``file``, and a function that reads and checks it."""
    base = yaml.safe_load(rng.choice(sorted(RECIPES.glob("*.yaml"))).read_text())
    base.pop("base", None)
    for section, values in TINY.items():
        if isinstance(base.get(section, {}), dict):
            base[section] = {**base.get(section, {}), **copy.deepcopy(values)}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(places(base)))
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            name = rng.choice(["x", "Seed", "crop-size", "é", 3, "data", "model", "x" * 300])
            holder[name] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 1:
            del holder[key]  # pyright: ignore[reportArgumentType]
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))  # pyright: ignore[reportArgumentType, reportCallIssue]
        if not base:
            break
    content = yaml.safe_dump(base, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([None, True, False]))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice(SNIPPETS) + content[at + rng.choice((0, 0, 5)) :]
    file.write_bytes(content.encode("utf-8", "surrogatepass"))

    def read() -> None:
        cfg = config.load(file)
        again = file.with_name("again.yaml")
        again.write_text(config.dump_yaml(cfg))
        assert config.load(again) == cfg, "what is read is not what was written"
        trainer.check(cfg)

    return read


def listing(rng: random.Random, file: Path) -> Callable[[], object]:
    """A changed manifest, and a function that reads it."""
    plain = "".join(f"folder {i % 3}/film_{i}.mp4 {i % 4}\n" for i in range(12))
    quoted = "".join(f'"folder/film ""{i}"".mp4" {i % 4}\n' for i in range(12))
    shards = "a-{000..003}.tar\nb.tar\n"
    content = mutated_list(rng.choice((plain, plain.replace(".mp4 ", ".mp4,"), quoted, shards)).encode(), rng)
    file.write_bytes(content)

    def read() -> None:
        manifest = load_manifest(file)
        assert len(manifest.paths) == len(manifest.labels) > 0 and manifest.labels.min() >= 0
        assert manifest.hash

    return read


def features(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A changed cache of features or tokens, and a function that reads it and compares with what was written."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    x, y = numbers.normal(size=(20, 8)).astype(np.float32), numbers.integers(0, 4, 20)
    key = {"encoder": "e" * 64, "data": "d", "view": {"num_frames": 4}, "pooling": "mean"}
    tokens = rng.random() < 0.5
    if tokens:
        key["views"] = [1, 1]
        store = ShardStore(folder / "set-tokens-0", key, "set")
        for i in range(0, 20, 5):
            z = torch.from_numpy(x[i : i + 5].reshape(5, 1, 4, 2))
            store.add(z, torch.from_numpy(y[i : i + 5]), i + 5, (1, 2, 2), 20, shard_bytes=1)
        store.finish(20)
    else:
        save_cache(folder / "set-0.safetensors", key, Features(x, y, "set"))
    damage(rng, rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())))

    def read() -> None:
        if tokens:
            found = open_tokens(folder / "set-tokens-0")
            same = np.array_equal(found.rows(range(len(found))).numpy().reshape(-1, 8), x)
        else:
            found = load_cache(folder / "set-0.safetensors", key, "set")
            if found is None:
                raise UserError("made anew")
            same = np.array_equal(found.x, x)
        assert same and np.array_equal(found.y, y), "a changed cache is taken for the right one"

    return read


def damage(rng: random.Random, path: Path) -> None:
    """Change a file: bits, bytes, its length; or of JSON a value."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(("bits", "cut", "zeros", "insert", "other") + ("value",) * 5 * (path.suffix == ".json"))
    at = rng.randrange(len(data))
    if kind == "bits":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 8] = bytes(len(data[at : at + 8]))
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == "other":
        others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
        data = bytearray(rng.choice(others).read_bytes()) if others else data[::-1]
    else:
        content = json.loads(data)
        holder, key = rng.choice(list(places(content)))
        if rng.random() < 0.3:
            del holder[key]  # pyright: ignore[reportArgumentType]
        else:
            holder[key] = rng.choice([v for v in VALUES if not isinstance(v, dict) or 1 not in v])  # pyright: ignore
        data = bytearray(json.dumps(content).encode("utf-8", "surrogatepass"))
    path.write_bytes(data)


KINDS = {"configs": recipe, "manifests": listing, "caches": features}


def attempt(kind: str, number: int, folder: Path) -> tuple[str, str]:
    """(``read``, ``refused``, ``traceback``, ``hang``, ``unclear`` or ``changed``; text) of one case."""
    rng = random.Random(f"{kind} {number}")
    place = folder if kind == "caches" else folder / ("recipe.yaml" if kind == "configs" else "m.csv")
    read = KINDS[kind](rng, place)

    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the CPU's time: other processes do not count
    try:
        read()
    except UserError as error:
        said = str(error)
        return ("refused" if "\n" not in said and len(said) < LONGEST else "unclear"), said
    except Hang:
        return "hang", ""
    except AssertionError as error:
        return "changed", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return "read", ""


def run(kind: str, numbers: range, folder: Path) -> tuple[dict[str, int], list[str]]:
    """(how many cases ended how, those that should not have)."""
    counts: dict[str, int] = dict.fromkeys(("read", "refused", "traceback", "hang", "unclear", "changed"), 0)
    bad: list[str] = []
    for number in numbers:
        place = folder / kind / str(number)
        place.mkdir(parents=True)
        outcome, text = attempt(kind, number, place)
        counts[outcome] += 1
        if outcome not in ("read", "refused"):
            bad.append(f"{kind}:{number}: {outcome}: {text[:300]}")
        shutil.rmtree(place)
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, number in (("configs", 700), ("manifests", 250), ("caches", 50)):
        parser.add_argument(f"--{kind}", type=int, default=number)
    parser.add_argument("--only", help="KIND:NUMBER, a single case, whose outcome is printed")
    parser.add_argument("--out", default=str(Path(__file__).with_name("fuzz.json")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        if args.only:
            kind, number = args.only.split(":")
            print(*attempt(kind, int(number), Path(scratch)))
            if (file := Path(scratch) / "recipe.yaml").is_file():
                print(file.read_text(errors="replace"))
            return 0
        begin, found, bad = time.process_time(), {}, []
        for kind in KINDS:
            with contextlib.redirect_stdout(None):
                found[kind], wrong = run(kind, range(getattr(args, kind)), Path(scratch))
            bad += wrong
            print(kind, found[kind], flush=True)
    command = (
        f"python tests/faults/fuzz.py --configs {args.configs} --manifests {args.manifests} --caches {args.caches}"
    )
    result = {"command": command, "limit_s": SECONDS, **found, "cpu_s": round(time.process_time() - begin)}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
