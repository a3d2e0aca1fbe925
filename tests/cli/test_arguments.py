"""Argument types and flags that commands share."""

from argparse import ArgumentParser, ArgumentTypeError

import pytest

from vjepa_fast.cli import _arguments as arguments
from vjepa_fast.errors import UserError


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.positive, "3", 3),
        (arguments.at_least(0), "0", 0),
        (arguments.positive_real, "1e-4", 1e-4),
        (arguments.names, " a, b ,,c", ["a", "b", "c"]),
        (arguments.names, "", []),
        (arguments.some_names, "a", ["a"]),
    ],
)
def test_types_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (arguments.positive, "0", "0 is not a positive number"),
        (arguments.positive, "two", "'two' is not an integer"),
        (arguments.at_least(2), "1", "1 is less than 2"),
        (arguments.positive_real, "0", "0 is not a positive number"),
        (arguments.positive_real, "inf", "inf is not a positive number"),
        (arguments.positive_real, "nan", "nan is not a positive number"),
        (arguments.positive_real, "x", "x is not a positive number"),
        (arguments.some_names, " , ", "expected names with commas between, got none"),
        (arguments.manifest_file, "no.csv", "no.csv: no such manifest; `vjepa-fast data manifest DIR`"),
        (arguments.writable_file, "no/such/x.json", "no/such/x.json: cannot be written; choose a file"),
        (arguments.writable_file, ".", "cannot be written"),
    ],
)
def test_types_refuse(kind, text, message):
    with pytest.raises(ArgumentTypeError) as error:
        kind(text)
    assert message in str(error.value)


def test_flags_have_the_defaults_of_evaluation():
    from vjepa_fast.evaluation.extract.features import POOLINGS
    from vjepa_fast.evaluation.run.encoders import WHICH
    from vjepa_fast.evaluation.run.sources import AS_TRAINED

    parser = ArgumentParser()
    for add in (arguments.add_encoders, arguments.add_clips, arguments.add_features, arguments.add_device):
        add(parser)
    args = parser.parse_args(["runs/mine"])
    shared = {k: v for k, v in vars(AS_TRAINED).items() if hasattr(args, k)}
    assert shared == {k: getattr(args, k) for k in shared} and len(shared) == 8
    assert arguments.subject_of(args)["which"] == WHICH
    assert arguments.subject_of(parser.parse_args(["runs/mine", "--which", "encoder"]))["which"] == ("encoder",)
    assert tuple(POOLINGS) == arguments.POOLINGS


def test_devices():
    assert arguments.device_of("auto").type in ("cpu", "cuda") and arguments.device_of("cpu").type == "cpu"
    for name in ("cuda:77", "abacus"):
        with pytest.raises(UserError, match=f"--device {name}: cannot be used here"):
            arguments.device_of(name)
