"""A ranker as an ONNX model: the program of `program`, for any number of rows.

Needs the packages of the extra `onnx`, which are imported when they are used.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import torch

from mtl_ranker.errors import ProjectError
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.program import NAMES, Run, checked, save_description, trace

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INT64 = 7  # onnx.TensorProto.INT64


def check_installed() -> None:
    """Raise ProjectError that names the extra if one of its packages is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ProjectError(
            f"--format onnx: not installed: {', '.join(missing)}; "
            "run `pip install 'mtl_ranker[onnx]'`"
        )


def export_onnx(artifact: RankerArtifact, rows: pl.DataFrame, folder: Path) -> float:
    """Write the model, its description and the encoder; returns the largest difference.

    That is from `RankerArtifact.predict`, as onnxruntime computes the model. Raises ProjectError as
    `program.checked` and `check_installed` do.

    Args:
        rows: at least two feature rows.
        folder: an existing one.
    """
    check_installed()
    traced = trace(artifact, rows)
    with _quiet():
        converted = torch.onnx.export(
            traced.program,
            (),
            dynamo=True,
            input_names=list(NAMES),
            output_names=["predictions"],
            custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted},
            verbose=False,
        )
    assert converted is not None
    converted.save(folder / FILE)
    save_description(artifact, traced, folder)
    return checked(load_onnx(folder), artifact, rows, traced.inputs)


def load_onnx(folder: Path) -> Run:
    """The model that `export_onnx` wrote, on the CPU with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / FILE, options, providers=["CPUExecutionProvider"]
    )
    # An input that the model does not read, such as a surface without maps of its own, is absent.
    used = {given.name for given in session.get_inputs()}

    def run(inputs: Any) -> Any:
        named = zip(NAMES, inputs, strict=True)
        feed = {name: tensor.numpy() for name, tensor in named if name in used}
        return session.run(None, feed)[0]

    return run


def _searchsorted(points: Any, values: Any, **ignored: Any) -> Any:
    """`torch.searchsorted` in ONNX: for each of the values [B], how many of [P] points are below.

    ONNX has no binary search.
    """
    import onnxscript

    op: Any = onnxscript.opset18
    last = op.Constant(value_ints=[-1])
    below = op.Less(points, op.Unsqueeze(values, last))
    return op.ReduceSum(op.Cast(below, to=INT64), last, keepdims=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's notes on packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)
