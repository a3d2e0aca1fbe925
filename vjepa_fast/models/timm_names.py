"""The encoders under timm's names."""

from __future__ import annotations

from vjepa_fast.models.vit import SIZES, build_encoder


def register_timm() -> list[str]:
    """Make ``timm.create_model("vjepa_fast_vit_base", img_size=..., ...)`` work; returns the names registered.

    Keyword arguments go to ``build_encoder``. timm is imported here only. ``pretrained=True`` is refused: weights come
    from ``load_encoder``.
    """
    from timm.models import is_model, register_model

    names = []
    for size in SIZES:
        name = f"vjepa_fast_{size}"
        if not is_model(name):
            register_model(_entry(name, size))
        names.append(name)
    return names


def _entry(name: str, size: str):
    def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        if pretrained:
            raise ValueError(f"{name}: no weights are attached to this name; use vjepa_fast.models.load_encoder(path)")
        return build_encoder(size, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"V-JEPA 2.1 encoder {size}; keyword arguments of ``build_encoder``."
    return create
