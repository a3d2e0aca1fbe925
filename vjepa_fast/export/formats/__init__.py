"""One file per kind of format; each registers itself in ``export.FORMATS``."""
