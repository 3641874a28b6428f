"""Stub until the native module lands."""
from sma_fast import _dispatch
def implementation(backend, op):
    raise _dispatch.Unavailable("not built")
def build_info():
    return {}
