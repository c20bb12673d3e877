"""The models: `from models import MaskGIT`."""

from .maskgit import MaskGIT

__all__ = ["MaskGIT"]
