"""Plans as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from .. import modeling_skywork, modeling_skywork_moe
from ..configuration_skywork import SkyworkConfig
from ..quantization.config import SkyworkFp8Config, SkyworkInt8Config
from ..untrusted import read_json
from .calibration import Calibration
from .devices import Device
from .problem import Placement, Request, Solution
from .speed import Expected, Reading, Seconds
from .usage import ExpertUsage

_FORMAT = "skywork_hf placement plan 3"
_PLAIN = ("name", "context_tokens", "batch_size", "strategy", "stream_from_rows", "kv_cache_dtype")  # of a request
_QUANTIZATION_CLASSES = {kind.__name__: kind for kind in (SkyworkFp8Config, SkyworkInt8Config, BitsAndBytesConfig)}
_MODEL_CLASSES = {
    name: getattr(module, name) for module in (modeling_skywork, modeling_skywork_moe) for name in module.__all__
}


def save(plan: Solution, path: str | Path) -> None:
    """Write `plan`. Dicts whose keys are devices are written as lists of pairs, as JSON's keys are strings."""
    request, placement = plan.request, plan.placement
    content = {
        "format": _FORMAT,
        **{name: getattr(request, name) for name in _PLAIN},
        "config": json.loads(request.config.to_json_string()),
        "model_class": request.model_class.__name__,
        "devices": [asdict(device) for device in request.devices],
        "quantization": _quantization_to_json(request.quantization),
        "dtype": str(request.precision.dtype).removeprefix("torch."),
        "usage": request.usage and request.usage.to_dict(),
        "calibration": request.calibration and request.calibration.to_dict(),
        "device_map": _pairs(placement.device_map),
        "dense": placement.dense,
        "experts": placement.experts,
        "bytes": _pairs(placement.nbytes),
        "bytes_read_per_token": _pairs(placement.reading.nbytes),
        "seconds_per_step": placement.reading.seconds and _pairs(placement.reading.seconds),
        "expected": placement.expected and _expected_to_json(placement.expected),
        "streams_from_rows": placement.stream_from_rows,
    }
    Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")


def load(path: str | Path) -> tuple[Request, Placement]:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        content = read_json(Path(path))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}: plan again")
        return _request(content), _placement(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no placement plan ({error}): write one with `plan.save`.") from error


def _request(content: dict[str, Any]) -> Request:
    return Request(
        **{name: content[name] for name in _PLAIN} | {"name": content["name"] or content["model_class"]},
        config=SkyworkConfig.from_dict(content["config"]),
        model_class=_MODEL_CLASSES[content["model_class"]],
        devices=tuple(Device(**device) for device in content["devices"]),
        quantization=_quantization_from_json(content["quantization"]),
        dtype=getattr(torch, content["dtype"]),
        usage=content["usage"] and ExpertUsage.from_dict(content["usage"]),
        calibration=content["calibration"] and Calibration.from_dict(content["calibration"]),
    )


def _placement(content: dict[str, Any]) -> Placement:
    seconds, expected = content["seconds_per_step"], content["expected"]
    return Placement(
        dict(content["device_map"]),
        content["dense"],
        content["experts"],
        dict(content["bytes"]),
        Reading(dict(content["bytes_read_per_token"]), seconds and _seconds(seconds)),
        expected and Expected(**expected | {name: _seconds(expected[name]) for name in ("decode", "prompt")}),
        content["streams_from_rows"],
    )


def _expected_to_json(expected: Expected) -> dict[str, Any]:
    return {**vars(expected), "decode": _pairs(expected.decode), "prompt": _pairs(expected.prompt)}


def _seconds(pairs: list[Any]) -> Seconds:
    return {(kind, key): value for (kind, key), value in pairs}


def _pairs(values: dict[Any, Any]) -> list[list[Any]]:
    return [[key, value] for key, value in values.items()]


def _quantization_to_json(quantization: Any) -> Any:
    if quantization is None or isinstance(quantization, str):
        return quantization
    if isinstance(quantization, dict):
        return {"pairs": _pairs(quantization)}
    ours = {name: value for name, value in vars(quantization).items() if name != "quant_method"}
    arguments = quantization.to_dict() if isinstance(quantization, BitsAndBytesConfig) else ours
    return {"class": type(quantization).__name__, "arguments": arguments}


def _quantization_from_json(written: Any) -> Any:
    if not isinstance(written, dict):
        return written
    if "pairs" in written:
        return dict(written["pairs"])
    kind: Any = _QUANTIZATION_CLASSES[written["class"]]
    return kind.from_dict(written["arguments"]) if kind is BitsAndBytesConfig else kind(**written["arguments"])
