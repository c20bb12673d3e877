"""The models: `from models import MaskGIT`."""

from models.maskgit import MaskGIT

__all__ = ["MaskGIT"]
