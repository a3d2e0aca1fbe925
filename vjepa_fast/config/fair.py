"""The published YAML (``app: vjepa_2_1``, ``app: vjepa``) in our own keys.

The FAIR V-JEPA 2.1 app, the study's fork of it (arXiv:2605.17165) and, with fewer keys, the V-JEPA 2 app share one
format. `translate` reads it unchanged:
most keys keep their names, the keys that objectives name as ``published`` become entries of ``objectives``, keys that
change nothing here are named in one warning, and keys that would change the result but are not supported are refused.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from vjepa_fast.config.convert import named, number, read, unknown_key
from vjepa_fast.config.fields import quoted
from vjepa_fast.config.schema import Config, MaskConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.registry import registry_of

_log = logging.getLogger("vjepa_fast")

# Keys taken over under the same name; their types are checked by our own schema.
_SAME = {
    "data": (
        "datasets", "datasets_weights", "dataset_fpcs", "batch_size", "crop_size", "patch_size", "tubelet_size",
        "fps", "frame_sample_rate", "duration", "num_workers", "pin_mem"
    ),
    "data_aug": ("random_resize_aspect_ratio", "random_resize_scale"),
    "model": (
        "model_name", "pred_depth", "pred_embed_dim", "pred_num_heads", "uniform_power", "zero_init_mask_tokens",
        "use_rope", "interpolate_rope", "use_silu", "wide_silu", "img_temporal_dim_size", "modality_embedding",
        "normalize_predictor", "use_activation_checkpointing"
    ),
    "optimization": (
        "epochs", "ipe", "ipe_scale", "lr", "start_lr", "final_lr", "warmup", "weight_decay", "final_weight_decay",
        "betas", "eps"
    ),
    "img_data": ("datasets", "datasets_weights", "dataset_fpcs", "batch_size", "crop_size", "num_workers"),
}  # fmt: skip
# Those of the loss regulation, as keys of our section optimization, and what applies when they are absent.
_SPIKES: dict[str, tuple[str, Any]] = {
    "loss_reg_std_mult": ("spike_std", None),
    "loss_reg_num_tracking_steps": ("spike_window", 300),
    "loss_reg_min_epoch": ("spike_after_epoch", 50),
}
# Keys read by the code below.
_READ = {
    "loss": ("predict_all",),
    "meta": ("dtype", "seed", "load_checkpoint", "read_checkpoint", "pretrain_checkpoint", "load_predictor"),
    "model": ("use_pred_silu", "levels_predictor", "compile_model"),
    "optimization": ("ema", "disable_ema", "is_anneal", "anneal_ckpt", *_SPIKES),
    "img_data": ("rank_ratio",),
}
# What applies when a key is absent, where that is not our own default.
_ABSENT = {
    "data": {"num_workers": 1, "pin_mem": False},
    "data_aug": {"random_resize_aspect_ratio": [3 / 4, 4 / 3]},
    "model": {
        "uniform_power": False, "use_rope": False, "interpolate_rope": False, "img_temporal_dim_size": None,
        "modality_embedding": False
    },
    "optimization": {},
    "img_data": {"crop_size": 512},
}  # fmt: skip
_REQUIRED = {
    "data": ("datasets", "dataset_fpcs", "batch_size", "patch_size", "tubelet_size"),
    "loss": ("loss_exp",),
    "meta": ("dtype",),
    "model": ("model_name", "pred_depth", "pred_embed_dim"),
    "optimization": (
        "ema", "epochs", "lr", "start_lr", "final_lr", "warmup", "weight_decay", "final_weight_decay"
    ),
    "img_data": ("datasets", "dataset_fpcs", "batch_size"),
}  # fmt: skip
# Launching, logging and loading: without effect here, whatever the value.
_NO_EFFECT = {
    "": ("nodes", "tasks_per_node", "cpus_per_task", "mem_per_gpu", "exclusive", "evals"),
    "data": ("dataset_type", "persistent_workers"),
    "meta": ("eval_freq", "save_every_freq", "use_sdpa", "sync_gc", "skip_batches"),
    "loss": ("gram_HighRes", "gram_ckpt", "gram_loss_weight"),
    "optimization": ("resume_anneal",),
    "img_data": ("dataset_type", "persistent_workers", "pin_mem"),
}
# Without effect at these values; another value would change the result and is refused.
_OFF = {
    "data_aug": {"auto_augment": (False,), "motion_shift": (False,), "reprob": (0,)},
    "loss": {"reg_coeff": (0,), "shift_by_n": (0, None), "computing_gram_loss": (False,)},
    "model": {
        "has_cls_first": (False,), "is_causal": (False,), "pred_is_causal": (False,), "n_registers": (0,),
        "n_registers_predictor": (0,), "vit_conv": (False,), "use_mask_tokens": (True,), "init_type": ("default",),
        "local_window": ([-1, -1, -1],), "pred_local_window": ([-1, -1, -1],)
    },
    "optimization": {"use_radamw": (False,)},
}  # fmt: skip
# What the V-JEPA 2 app does not have, and its models' values for it.
_V2_IDLE = ("img_data", "img_mask")
_V2 = {
    "loss": {"predict_all": False},
    "model": {
        "levels_predictor": 1, "modality_embedding": False, "img_temporal_dim_size": None, "interpolate_rope": False,
        "normalize_predictor": False
    },
}  # fmt: skip
APPS = ("vjepa_2_1", "vjepa")
_OTHER_APPS = {"vjepa_droid": "trains a predictor of actions on robot data, which this package does not have"}
# The order in which the published code adds its terms up; others follow.
_ORDER = (
    "pred", "context", "hw", "fwm_static", "fwm_orth", "ld", "delta", "ltc", "spectral", "ac", "kinematic",
    "velgate", "hamiltonian", "sigreg"
)  # fmt: skip
_MASK_KEYS = tuple(f.name for f in dataclasses.fields(MaskConfig))
_SECTIONS = ("data", "data_aug", "loss", "mask", "model", "meta", "optimization", "img_data", "img_mask")
_ENCODER_HEADS = {
    "vit_tiny": 3,
    "vit_small": 6,
    "vit_base": 12,
    "vit_large": 16,
    "vit_huge": 16,
    "vit_giant": 16,
    "vit_giant_xformers": 22,
    "vit_gigantic_xformers": 26,
}


def translate(values: dict[str, Any], *, source: str = "config") -> dict[str, Any]:
    """Published keys to ours: a dictionary for `from_dict`.

    Keys without effect are logged in one warning, an ``img_data.rank_ratio`` without all its effect in others.
    ``compat`` (ours) may stand at the top; it defaults to ``intended``.

    Raises:
        ConfigError: unknown key (with a suggestion), missing section or key, wrong type, unsupported setting.
    """
    translation = _Translation(values)
    with named(source):
        out = translation.run()
    if translation.idle:
        _log.warning("%s: keys without effect here: %s", source, ", ".join(translation.idle))
    for note in translation.notes:
        _log.warning("%s: %s", source, note)
    return out


class _Translation:
    def __init__(self, values: dict[str, Any]) -> None:
        known = registry_of("objective")
        names = dict.fromkeys([*_ORDER, *known])
        self.terms: dict[str, Any] = {name: known[name] for name in names if known[name].published}
        self.v2 = values["app"] == "vjepa"
        self.values = _as_2_1(values) if self.v2 else values
        self.idle: list[str] = [key for key in _V2_IDLE if self.v2 and key in values]  # keys without effect
        self.notes: list[str] = []  # on keys with less effect than there

    def run(self) -> dict[str, Any]:
        self._top()
        objectives = self._objectives()
        out: dict[str, Any] = {
            "data": self._same("data"),
            "data_aug": self._same("data_aug"),
            "masks": self._masks("mask"),
            "model": self._model(),
            "objectives": objectives,
            "target": {
                "mode": "online" if self._flag("optimization", "disable_ema", False) else "ema",
                "ema": self._get("optimization", "ema"),
            },
            "optimization": self._optimization(),
            "init": self._init(),
            "runtime": {"dtype": self._dtype()},
            "compat": self.values.get("compat", "intended"),
            "seed": self._get("meta", "seed", 0),
        }
        if self.v2:
            out["model"]["rope_variant"] = "v2"
        if "compile_model" in self.values["model"]:
            out["runtime"]["compile"] = self._flag("model", "compile_model", False)
        if self.values.get("folder") is not None:
            out["folder"] = self.values["folder"]
        if self.values.get("img_data") is not None:
            out["img_data"] = self._images(out)
            if self.values.get("img_mask") is not None:
                out["img_masks"] = self._masks("img_mask")
        try:
            read(Config, out)
        except ConfigError as error:
            raise ConfigError(_published_names(str(error))) from None
        return out

    def _top(self) -> None:
        app = self.values["app"]
        if app not in APPS:
            why = f"; it {_OTHER_APPS[app]}" if app in _OTHER_APPS else ""
            raise ConfigError(f"app: {quoted(app)} is not read, only {' and '.join(APPS)} are{why}")
        accepted = ("app", "folder", "compat", *_SECTIONS, *_NO_EFFECT[""])
        for key in self.values:
            if key not in accepted:
                raise unknown_key("", key, accepted)
        self.idle += [key for key in self.values if key in _NO_EFFECT[""]]
        for section in _SECTIONS:
            if section in ("mask", "img_mask"):
                continue
            values = self.values.get(section)
            if values is None and section == "img_data":
                continue
            if not isinstance(values, dict):
                raise ConfigError(f"{section}: missing; expected a section of keys")
            self._section(section, values)

    def _section(self, section: str, values: dict[str, Any]) -> None:
        off = _OFF.get(section, {})
        idle = _NO_EFFECT.get(section, ())
        used = [*_SAME.get(section, ()), *_READ.get(section, ()), *self._term_keys(section)]
        for key, value in values.items():
            if key in idle:
                self.idle.append(f"{section}.{key}")
            elif key in off:
                if value not in off[key]:
                    raise ConfigError(f"{section}.{key}: {quoted(value)} is not supported; only {off[key][0]!r} is")
                self.idle.append(f"{section}.{key}")
            elif key not in used:
                raise unknown_key(section, key, (*used, *off, *idle))
        for key in _REQUIRED.get(section, ()):
            if values.get(key) is None:
                raise ConfigError(f"{section}.{key}: missing")

    def _term_keys(self, section: str) -> list[str]:
        keys = dict.fromkeys(key for term in self.terms.values() for key in term.published.values())
        return [key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")]

    def _get(self, section: str, key: str, default: Any = None) -> Any:
        return self.values[section].get(key, default)

    def _flag(self, section: str, key: str, default: bool) -> bool:
        value = self._get(section, key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{section}.{key}: expected true or false, got {quoted(value)}")
        return value

    def _value(self, section: str, key: str, default: float) -> float:
        value = self._get(section, key, default)
        value = default if value is None else value
        parsed = None if isinstance(value, bool) else number(value)
        if parsed is None:
            raise ConfigError(f"{section}.{key}: expected a number, got {quoted(value)}")
        return parsed

    def _same(self, section: str) -> dict[str, Any]:
        given = self.values[section]
        out = dict(_ABSENT.get(section, {}))
        out.update({key: given[key] for key in _SAME[section] if key in given})
        return out

    def _optimization(self) -> dict[str, Any]:
        out = self._same("optimization")
        if out.get("ipe") is None:
            out["ipe"] = 0  # one pass over the data, there as here
        if self._flag("optimization", "is_anneal", False):
            out["schedule"] = "linear"
        if self._get("optimization", "loss_reg_std_mult") is not None:
            out |= {ours: self._get("optimization", key, absent) for key, (ours, absent) in _SPIKES.items()}
        else:
            self.idle += [f"optimization.{key}" for key in _SPIKES if key in self.values["optimization"]]
        return out

    def _init(self) -> dict[str, Any]:
        """The weights to start from: a cooldown's ``anneal_ckpt``, or ``read_checkpoint``, ``pretrain_checkpoint``."""
        anneal, load = (self._flag(*key, False) for key in (("optimization", "is_anneal"), ("meta", "load_checkpoint")))
        key = ("optimization", "anneal_ckpt") if anneal else ("meta", "read_checkpoint")
        path, name = self._get(*key), ".".join(key)
        if anneal and path is None:
            raise ConfigError(f"{name}: missing; a cooldown (optimization.is_anneal) starts from it")
        if path is not None and not load:
            self.notes.append(f"{name}: not read, since meta.load_checkpoint is off; --init PATH starts from weights")
            return {}
        if path is not None:
            if not anneal:
                self.notes.append(f"{name}: weights and moments are taken, the schedule begins at step 0")
            return {"path": path, "optimizer": True}
        path = self._get("meta", "pretrain_checkpoint")
        taken = self._flag("meta", "load_predictor", True)
        return {} if path is None else {"path": path, "predictor": "auto" if taken else "new"}

    def _dtype(self) -> str:
        dtype = self._get("meta", "dtype")
        accepted = ("bfloat16", "float16", "float32")
        if not isinstance(dtype, str) or dtype.lower() not in accepted:
            raise ConfigError(f"meta.dtype: {quoted(dtype)} is not supported; accepted: {', '.join(accepted)}")
        return dtype.lower()

    def _model(self) -> dict[str, Any]:
        model = self._same("model")
        model["pred_use_silu"] = self._flag("model", "use_pred_silu", False)
        model["levels"] = self._get("model", "levels_predictor", 4)
        model["predict_all"] = self._flag("loss", "predict_all", True)
        if model.get("pred_num_heads") is None:
            if model["model_name"] not in _ENCODER_HEADS:
                raise ConfigError("model.pred_num_heads: missing")
            model["pred_num_heads"] = _ENCODER_HEADS[model["model_name"]]
        return model

    def _masks(self, section: str) -> dict[str, Any]:
        specs = self.values.get(section)
        if not isinstance(specs, list) or not specs:
            raise ConfigError(f"{section}: missing; expected a list of masks")
        for i, spec in enumerate(specs):
            if not isinstance(spec, dict):
                raise ConfigError(f"{section}.{i}: expected a section of keys, got {quoted(spec)}")
            for key in spec:
                if key not in _MASK_KEYS:
                    raise unknown_key(f"{section}.{i}", key, _MASK_KEYS)
            for key in ("num_blocks", "spatial_scale", "temporal_scale", "aspect_ratio"):
                if spec.get(key) is None:
                    raise ConfigError(f"{section}.{i}.{key}: missing")
        return {"specs": [dict(spec) for spec in specs]}

    def _images(self, out: dict[str, Any]) -> dict[str, Any]:
        """A share ``rank_ratio`` of the published ranks reads images; here each process reads its share of them."""
        images = self._same("img_data")
        ratio = self._value("img_data", "rank_ratio", 0.25)
        if not 0 < ratio < 1:
            raise ConfigError(f"img_data.rank_ratio: must lie between 0 and 1, got {ratio:g}")
        images.setdefault("num_workers", out["data"]["num_workers"])
        images["pin_mem"] = out["data"]["pin_mem"]
        images["patch_size"] = out["data"]["patch_size"]
        images["tubelet_size"] = out["data"]["tubelet_size"] if out["model"]["img_temporal_dim_size"] is None else 1
        if isinstance(images["batch_size"], int):
            batch = images["batch_size"]
            images["batch_size"] = max(1, round(batch * ratio))
            if images["batch_size"] == batch:
                self.notes.append(
                    f"img_data.rank_ratio: {ratio:g} has no effect, that share of {batch} images rounds to {batch}; "
                    f"give img_data.batch_size {round(1 / ratio) * batch} or more"
                )
        if ratio != 0.5:
            self.notes.append(
                f"img_data.rank_ratio: {ratio:g} has no effect on the weight of images, which is that of videos here, "
                "as at 0.5; it sets the images of a process alone; for the published split of processes set "
                f"img_data.rank_ratio={ratio:g} and img_data.batch_size={self._value('img_data', 'batch_size', 1)}"
            )
        return images

    def _objectives(self) -> dict[str, dict[str, Any]]:
        """The terms that the file turns on, each from the keys that its class names as ``published``."""
        file: dict[str, Any] = {name: self.values[name] for name in _SECTIONS if self.values.get(name) is not None}
        for section, values in list(file.items()):
            if isinstance(values, dict):
                file |= {f"{section}.{key}": value for key, value in values.items() if value is not None}
        found = {name: self._fields_of(term, file) for name, term in self.terms.items()}
        for name, term in self.terms.items():  # numbers that were written as text
            file |= {term.published[field]: value for field, value in found[name].items()}
        out: dict[str, dict[str, Any]] = {}
        used: set[str] = set()
        for name, term in self.terms.items():
            fields = term.from_published(found[name], file)
            if fields is not None:
                out[name] = {f.name: fields[f.name] for f in dataclasses.fields(term) if f.name in fields}
                used |= {term.published[field] for field in fields if field in term.published}
        known = dict.fromkeys(key for term in self.terms.values() for key in term.published.values())
        self.idle += [key for key in known if key in file and key not in used]
        return out

    def _fields_of(self, term: Any, file: dict[str, Any]) -> dict[str, Any]:
        """The fields of ``term`` whose published keys the file has; numbers and flags are checked."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(term):
            path = term.published.get(field.name)
            if path in file:
                out[field.name] = file[path]
                section, _, key = path.partition(".")
                if isinstance(field.default, bool):
                    out[field.name] = self._flag(section, key, False)
                elif field.type in (float, "float", "float | None"):
                    out[field.name] = self._value(section, key, 0.0)
        return out


def _as_2_1(values: dict[str, Any]) -> dict[str, Any]:
    """A file of the V-JEPA 2 app as one of the 2.1 app that makes the same models and loss."""
    out = {key: value for key, value in values.items() if key not in _V2_IDLE}
    for section, fixed in _V2.items():
        if isinstance(out.get(section), dict):
            out[section] = {**out[section], **fixed}
    return out


def _published_names(message: str) -> str:
    for ours, theirs in (
        ("img_masks.specs", "img_mask"),
        ("masks.specs", "mask"),
        ("seed", "meta.seed"),
        ("target.ema", "optimization.ema"),
        ("model.levels", "model.levels_predictor"),
        *((f"optimization.{ours}", f"optimization.{key}") for key, (ours, _) in _SPIKES.items()),
    ):
        if message.startswith(ours):
            return theirs + message.removeprefix(ours)
    return message
