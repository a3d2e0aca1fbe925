"""The shape of the house: imports run one way, siblings do not know each other, files stay short."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vjepa_fast"

# A room may import rooms of the tiers above its own; rooms of one tier ignore each other.
TIERS = (
    "errors imagenet _moved",
    "files registry",
    "locks",
    "config kernels",
    "ops",
    "layers",
    "metrics",
    "models masks objectives data",
    "trainer evaluation export patch timm_models",
    "study bench",
    "cli",
    "__main__ __init__",
)
# The same between the parts (folders or modules) of one room; parts that are not named here import each other freely.
INSIDE = {
    "ops": (
        "_capture _check _backend _philox",
        "_cpp _fastest _triton",
        "adamw add_norm attention block_masks distance gelu linear norm patchify rope",
        "packed_attention saliency _latent_rows",
        "_latent_kernels _latent_powers",
        "latent",
    ),
    "config": ("fields given text", "schema", "checks length", "convert evaluations", "fair", "load", "recipes"),
    "layers": ("attention channels fp8", "linear packed", "block"),
    "metrics": ("flops geometry hardware profile", "collapse"),
    "models": (
        "digests ema names parts rope",
        "limits",
        "weights",
        "vit",
        "describe predictor timm_names reading",
        "build",
        "interop",
        "initial",
    ),
    "data": (
        "members processes",
        "media sampling mixing",
        "decoders",
        "manifests synthetic",
        "bad_samples source prepare",
        "views",
        "loader",
        "fastest survey gather",
    ),
    "masks": ("drawn", "api", "blocks", "motion"),
    "evaluation": ("choices", "intervals tasks extract", "probes", "controls fewshot", "readout", "run"),
    "patch": ("compare masks nested", "losses", "forms", "modules"),
    "export": ("remote", "plain", "api", "formats"),
    "study": ("figures pages power records jobs", "instrument", "run", "stats", "demo report claims sheet", "show"),
    "bench": ("cases errors memory results trace", "process providers timing", "batches", "step"),
}
REFERENCE_USERS = {"bench/providers.py"}
REFERENCE_MAY_IMPORT = {"torch", "numpy"}
LIGHT = (
    "__init__.py",
    "errors.py",
    "registry.py",
    "files.py",
    "locks.py",
    "imagenet.py",
    "cli",
    "config",
)  # no heavy import at module level
HEAVY_EVERYWHERE = {"timm", "torchvision", "av", "matplotlib", "sklearn", "pandas", "tensorboard", "rich", "xformers"}


RANK = {room: i for i, tier in enumerate(TIERS) for room in tier.split()}


def against_the_stream(tiers, importer, imported):
    rank = {room: i for i, tier in enumerate(tiers) for room in tier.split()}
    known = importer in rank and imported in rank and importer != imported
    return known and rank[imported] >= rank[importer]


def sources():
    return sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def module_of(path):
    """Dotted module path below vjepa_fast, () for the package itself."""
    if path.is_relative_to(ROOT / "kernels"):
        parts = ("kernels", *path.relative_to(ROOT / "kernels").with_suffix("").parts)
    else:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree, module, is_package):
    """(dotted name, line, at module level) of everything imported; ``from x import y`` gives x.y."""
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    typing_only = {
        n for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        top = node not in inside and node not in typing_only
        if isinstance(node, ast.Import):
            for a in node.names:
                yield a.name, node.lineno, top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("vjepa_fast", *module) if is_package else ("vjepa_fast", *module)[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(filter(None, (*package, base)))
            for a in node.names:
                yield f"{base}.{a.name}", node.lineno, top
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            for a in node.args[:1]:
                if isinstance(a, ast.Constant) and isinstance(a.value, str):
                    yield a.value, node.lineno, top


def violations(path, text):
    """Everything in one file that goes against the rules, as lines of text."""
    module = module_of(path)
    if not module:
        part = "__init__"
    else:
        part = module[0]
    relative = path.relative_to(ROOT if part == "kernels" else PACKAGE).as_posix()
    found, tree = [], ast.parse(text)
    for name, line, top in imports(tree, module, path.name == "__init__.py"):
        first, *rest = name.split(".")
        if first == "kernels":
            found.append(f"{relative}:{line}: import it as vjepa_fast.kernels")
        if top and (first in HEAVY_EVERYWHERE or (first in ("torch", "numpy", "yaml") and relative.startswith(LIGHT))):
            found.append(f"{relative}:{line}: {first} must not be imported at module level here")
        if first != "vjepa_fast":
            if part == "reference" and first not in REFERENCE_MAY_IMPORT | sys.stdlib_module_names:
                found.append(f"{relative}:{line}: reference must not import {first}")
            continue
        target = rest[0] if rest else ""
        if target in ("", "__version__"):
            continue
        if part == "reference":
            if target != part:
                found.append(f"{relative}:{line}: reference must not import {name}")
        elif target == "reference":
            if relative not in REFERENCE_USERS:
                found.append(f"{relative}:{line}: only tests, benchmarks and vjepa-fast bench import the reference")
        elif target == part:
            inner, other = (x[1] if len(x) > 1 else "" for x in (module, rest))
            if against_the_stream(INSIDE.get(part, ()), inner, other):
                found.append(f"{relative}:{line}: {part}/{inner} must not import {part}/{other}")
        elif not {target, part} <= set(RANK):
            found.append(f"{relative}:{line}: {part} imports {target}, which has no place in the order")
        elif against_the_stream(TIERS, part, target):
            found.append(f"{relative}:{line}: {part} must not import {target}")
    lines = text.count("\n")
    limit = 250 if relative == "trainer/trainer.py" else 500
    if lines > limit:
        found.append(f"{relative}: {lines} lines, at most {limit}")
    return found


def test_files_keep_the_rules():
    found = [line for path in sources() for line in violations(path, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_long_files(folder):
    lengths = {str(p): p.read_text(encoding="utf-8").count("\n") for p in (ROOT / folder).rglob("*.py")}
    assert not {p: n for p, n in lengths.items() if n > 500}


def test_every_part_of_the_package_has_a_rank():
    parts = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    assert parts - {"reference"} <= set(RANK)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("ops/x.py", "from vjepa_fast.models import vit"),
        ("ops/x.py", "from ..models import vit"),
        ("ops/x.py", "from .. import models"),
        ("ops/x.py", "def f():\n    import vjepa_fast.data.manifests.manifest"),
        ("models/x.py", "from vjepa_fast import masks"),
        ("objectives/terms/x.py", "from ...data.manifest import load_manifest"),
        ("masks/__init__.py", "from ..trainer import train"),
        ("trainer/x.py", "from vjepa_fast.evaluation import linear_probe"),
        ("evaluation/x.py", "import importlib\nm = importlib.import_module('vjepa_fast.trainer')"),
        ("errors.py", "from vjepa_fast.config import load"),
        ("layers/x.py", "from vjepa_fast.metrics import flops"),
        ("layers/attention/x.py", "from vjepa_fast.layers.block import Block"),
        ("bench/x.py", "from vjepa_fast.study import stats"),
        ("evaluation/probes/x.py", "from vjepa_fast.evaluation.run.rows import Row"),
        ("study/run/x.py", "from vjepa_fast.study.demo import plan"),
        ("study/jobs/x.py", "from vjepa_fast.study import run"),
        ("study/report/x.py", "from vjepa_fast.study.demo.page import table"),
        ("bench/results.py", "from vjepa_fast.bench.step import about"),
        ("patch/nested.py", "from vjepa_fast.patch.losses import Loss"),
        ("study/x.py", "from vjepa_fast.cli import main"),
        ("study/x.py", "from vjepa_fast.reference import step"),
        ("reference/x.py", "from vjepa_fast.ops import mask_distance"),
        ("reference/x.py", "import scipy"),
        ("ops/x.py", "import kernels"),
        ("cli/x.py", "import torch"),
        ("config/load.py", "import yaml"),
        ("data/x.py", "import av"),
        ("models/x.py", "\n" * 501),
        ("trainer/trainer.py", "\n" * 251),
    ],
)
def test_the_check_sees(where, text):
    assert len(violations(PACKAGE / where, text)) == 1


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (
            "ops/x.py",
            "import torch\nfrom vjepa_fast.ops import _cpp\nfrom ..errors import UserError\nfrom . import norm",
        ),
        ("models/x.py", "from vjepa_fast import ops, __version__\nfrom ..config.schema import Config"),
        ("bench/providers.py", "import torch\nfrom vjepa_fast.reference import step"),
        ("config/load.py", "from ..errors import ConfigError\ndef f():\n    import yaml"),
        ("reference/x.py", "import math\nimport torch.nn as nn\nfrom . import masks"),
        ("trainer/trainer.py", "\n" * 250),
    ],
)
def test_the_check_lets_pass(where, text):
    assert not violations(PACKAGE / where, text)
