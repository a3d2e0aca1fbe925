"""Checkpoint files that ask for more than they hold, written by hand: torch.save writes none of these."""

import pickle
import struct
import zipfile

import torch


def number(value: int) -> bytes:
    """An integer in a pickle."""
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value: str) -> bytes:
    """A text in a pickle."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def archive(path, program: bytes, storage: bytes = b"", packed: bool = False) -> None:
    """A file in the form of torch.save: the pickle ``program``, and one storage."""
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
        if storage:
            file.writestr("archive/data/0", storage)


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """``{"target_encoder": {"w": tensor}}`` of a storage that is said to have ``numel`` numbers."""
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    made = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(offset)
        + shape
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + text("target_encoder") + b"}" + text("w") + made + b"ss."


def write_all(folder) -> dict[str, str]:
    """Files in ``folder``, and for each the words of its refusal (empty: any)."""
    small = bytes(64)
    archive(folder / "claims.pt", tensor(10**11, (10**11,), (1,)), small)
    archive(folder / "outside.pt", tensor(16, (10**11,), (1,)), small)
    archive(folder / "expanded.pt", tensor(16, (10**5, 10**5), (0, 0)), small)
    archive(folder / "before.pt", tensor(16, (4,), (1,), offset=-100), small)
    archive(folder / "packed.pt", tensor(10**8, (10**8,), (1,)), bytes(4 * 10**8), packed=True)
    archive(folder / "deep.pt", b"\x80\x02}" + text("config") + b"]" * 50_000 + b"a" * 49_999 + b"s.")
    values = [0] * 10
    for _ in range(9):
        values = [values] * 10
    archive(folder / "laugh.pt", pickle.dumps({"config": {"data": values, "model": {}}}, 2))
    archive(folder / "bytes.pt", b"\x80\x02cbuiltins\nbytearray\n" + number(10**12) + b"\x85R.")
    archive(
        folder / "digits.pt", b"\x80\x02}" + text("step") + b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b"s."
    )
    same = torch.zeros(10**6)
    torch.save({"target_encoder": {f"w{i}": same for i in range(2000)}}, folder / "repeated.pt")
    head = b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (folder / "claims.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + small)
    (folder / "head.safetensors").write_bytes(struct.pack("<Q", 2**40) + b'{"' + small)
    head = b'{"w":' + b"[" * 50_000 + b"}"
    (folder / "deep.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    return {
        "claims.pt": "", "outside.pt": "", "expanded.pt": "w: .*the tensors take", "before.pt": "",
        "packed.pt": "is compressed; it would take", "deep.pt": "in one another", "laugh.pt": "holds more than",
        "bytes.pt": "", "digits.pt": "", "repeated.pt": "the tensors take", "claims.safetensors": "",
        "head.safetensors": "", "deep.safetensors": "",
    }  # fmt: skip
