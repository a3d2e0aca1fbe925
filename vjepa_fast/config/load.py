"""From a file or recipe name and ``--set`` overrides to a checked `Config`."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjepa_fast.config import evaluations, fair
from vjepa_fast.config.checks import check
from vjepa_fast.config.convert import from_dict, named, read, to_dict, unknown_key
from vjepa_fast.config.fields import show
from vjepa_fast.config.given import blamed, flag_of
from vjepa_fast.config.schema import Config
from vjepa_fast.config.text import LARGEST, parse
from vjepa_fast.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_LONGEST_CHAIN = 16  # files that are the base of one another


def load(path_or_recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path_or_recipe: a YAML file (ours, or a published one with ``app: vjepa_2_1`` or ``vjepa``), a run folder with a
            ``config.yaml``, or the name of a recipe that comes with the package (`list_recipes`); None: the defaults.
        overrides: ``"section.key=value"`` texts, applied in order; values are YAML, list entries are reached by index
            (``masks.specs.0.num_blocks=4``), ``objectives.context=null`` takes a term out. A `Given` says by which
            flag it came.

    Raises:
        ConfigError: one line that names the file or override, the key, and what is accepted.
    """
    path = None if path_or_recipe is None else _resolve(path_or_recipe)
    config = Config() if path is None else from_dict(_read_merged(path, ()), source=str(path), checked=False)
    for text in overrides:
        with named(flag_of(text)):
            config = _override(config, text)
    with blamed("defaults" if path is None else str(path), overrides):
        check(config)
    return _settle_mask_tokens(config)


def _settle_mask_tokens(config: Config) -> Config:
    """The published predictor has a mask token per mask and dataset, of which it uses the first only."""
    if config.method != "vjepa":  # no predictor
        return config
    model, published = config.model, config.compat == "published"
    number, index = model.num_mask_tokens, model.mask_token_index
    if number is None and published:
        number = len(config.masks.specs) * len(config.data.dataset_fpcs)
    if index is None:
        index = "zero" if published else "mask"
    return dataclasses.replace(config, model=dataclasses.replace(model, num_mask_tokens=number, mask_token_index=index))


def dump_yaml(config: Config) -> str:
    """``config`` as YAML that `load` reads back to an equal one."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Sections in lines, lists of scalars in brackets."""

    def sequence(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
        flow = not any(isinstance(v, (dict, list)) for v in values)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)

    Dumper.add_representer(list, sequence)
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of recipe ``name``; `ConfigError` with the nearest names if there is none."""
    path = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, list_recipes(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`vjepa-fast config list` names them"
        raise ConfigError(f"{name}: no such file, and no recipe of that name; {hint}")
    return path


def _resolve(where: str | Path, beside: Path | None = None) -> Path:
    given = Path(where).expanduser()
    candidates = [beside / given, given] if beside is not None else [given]
    for path in candidates:
        if path.is_file():
            return path
        if path.is_dir() and (path / "config.yaml").is_file():
            return path / "config.yaml"
    if given.is_dir():
        raise ConfigError(f"{where}: is a folder without config.yaml; name a YAML file or a recipe")
    if len(given.parts) > 1:
        raise ConfigError(f"{where}: no such file")
    return recipe_path(str(where))


def _read_merged(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values over those of its ``base``, in our own keys."""
    path_id = path.resolve()
    if path_id in seen:
        raise ConfigError(f"{path}: base: the file is its own base")
    if len(seen) == _LONGEST_CHAIN:
        raise ConfigError(f"{path}: base: more than {_LONGEST_CHAIN} files are the base of one another")
    values = _read_yaml(path)
    if evaluations.is_evaluation(values):
        raise ConfigError(f"{path}: {evaluations.answer(values)}")
    if "app" in values:  # in the published format; ours names none
        return fair.translate(values, source=str(path))
    base = values.pop("base", None)
    if base is None:
        from_dict(values, source=str(path), checked=False)
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected a file or recipe name, got {show(base)}")
    below = _read_merged(_resolve(base, beside=path.parent), (*seen, path_id))
    return _merge_file(below, values, str(path))


def _merge_file(below: dict[str, Any], values: dict[str, Any], source: str) -> dict[str, Any]:
    terms: Any = values.get("objectives")
    removed = [t for t, fields in terms.items() if fields is None] if isinstance(terms, dict) else []
    for term in removed:
        if term not in below.get("objectives", {}):
            raise ConfigError(
                f"{source}: objectives.{term}: null removes a term of the base, which has none of that "
                "name; write {} for a term with its defaults"
            )
    kept = {**values, "objectives": {t: v for t, v in terms.items() if v is not None}} if removed else values
    from_dict(kept, source=source, checked=False)  # errors name the file that holds the key
    merged = _merge(below, kept)
    for term in removed:
        del merged["objectives"][term]
    return merged


def _merge(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    out = copy.deepcopy(below)
    for key, value in above.items():
        out[key] = _merge(out[key], value) if key in out else copy.deepcopy(value)
    return out


def _override(config: Config, text: str) -> Config:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError("expected section.key=value, such as optimization.lr=3e-4")
    value = parse(value_text)
    values = to_dict(config)
    parts = key.split(".")
    if parts[0] == "objectives" and len(parts) == 2 and value is None:
        if parts[1] not in values["objectives"]:
            raise unknown_key("objectives", parts[1], values["objectives"])
        del values["objectives"][parts[1]]
    else:
        _place(values, parts, value)
    return read(Config, values)


def _place(values: dict[str, Any], parts: list[str], value: object) -> None:
    node: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[: depth + 1])
        place: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{where}: no such entry; the list has {len(node)} (0 to {len(node) - 1})")
            place = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(parts[:depth])}: is a single value and has no keys")
        if last:
            node[place] = value
        else:
            if isinstance(node, dict) and node.get(place) is None:
                node[place] = {}  # a section not given so far (img_data), a new term, or a key that is refused below
            node = node[place]


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as `text.parse` reads it."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    with named(str(path)):
        values = parse(text)
        if not isinstance(values, dict):
            found = "the file is empty" if values is None else "the file holds something else"
            raise ConfigError(f"expected a YAML mapping of sections; {found}")
    return values
