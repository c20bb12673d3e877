"""The models: `from models import MaskGIT`; installed, the package is called `maskgit_inpainting`."""

from .maskgit import MaskGIT

__all__ = ["MaskGIT"]
