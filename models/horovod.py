"""Imports Horovod, or raises the library's error that says how to get it."""

from __future__ import annotations

from aadl_hvd import HorovodMissingError

try:
    import horovod.torch as hvd
except Exception as error:  # not installed, built without torch, or a library is missing
    raise HorovodMissingError.because(error) from error

__all__ = ["hvd"]
