"""Shape sets of real models; the package has them, because its command line needs them, too."""

from loft_kernels.shapes import SHAPE_SETS, ShapeSet

__all__ = ["SHAPE_SETS", "ShapeSet"]
