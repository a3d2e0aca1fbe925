"""Triton kernels. The folder lies beside the package and is installed as ``vjepa_fast.kernels``."""

if __name__ != "vjepa_fast.kernels":
    raise ImportError("import this package as vjepa_fast.kernels")
