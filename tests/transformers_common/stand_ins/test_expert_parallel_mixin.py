"""Stand-in for a module of transformers' tests that begins after 5.19."""

from __future__ import annotations


class ExpertParallelTesterMixin:
    """No tests."""
