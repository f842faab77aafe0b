"""Experts and attention at one byte a weight: FP8 as released, and int8."""

from .config import SkyworkFp8Config, SkyworkInt8Config

__all__ = ["SkyworkFp8Config", "SkyworkInt8Config"]
