"""A stand-in for the capture of a CUDA graph on the CPU, true to it in what matters.

The operators of a function are written down with the tensors they read and wrote; a replay runs them again on the same
tensors. So Python's numbers are frozen, as in a graph: what should change from step to step and does not come from a
tensor stays as it was. As in a capture nothing has happened when it ends: what was changed in place is put back.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

VIEWS = ("unsqueeze_", "squeeze_", "transpose_", "t_", "detach_", "as_strided_")  # in place, but of the shape alone
VALUES = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def key(x):
    return x.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.kept, self.own = [], [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name().split(".")[0] in VALUES:
            raise RuntimeError(f"{func.name()}: operation not permitted when stream is capturing")
        given = func._schema.arguments
        named = dict(zip((a.name for a in given), args)) | kwargs
        written = [named[a.name] for a in given if a.alias_info is not None and a.alias_info.is_write]
        for x in tensors(written):
            if key(x) not in self.own:
                self.before.append((x, x.clone()))
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))  # of the shape that they have now
        out = func(*args, **kwargs)
        read = {key(x) for x in tensors((args, kwargs))}
        made = [x.detach() for x in tensors(out) if key(x) not in read]
        self.own |= {key(x) for x in made}
        self.kept += made  # nothing of a graph is freed, so that no address is used twice
        if func.name().split("::")[1].split(".")[0] not in VIEWS and (made or written):
            self.calls.append((func, *kept, made if not written else []))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                if func.name().startswith(("aten::empty", "aten::new_empty")):
                    continue
                out = func(*args, **kwargs)
                read = {key(x) for x in tensors((args, kwargs))}
                for mine, new in zip(made, [x for x in tensors(out) if key(x) not in read], strict=True):
                    mine.copy_(new)


def capture(run, device, pool):
    """As `graphs.Graphs` wants it."""
    recorder = Recorder()
    with recorder:
        result = run()
    for x, before in reversed(recorder.before):
        with torch.no_grad():
            x.copy_(before)
    return result, recorder.replay
