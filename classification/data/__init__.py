"""Image data: folders, lists, image files, preprocessing and batches."""

from classification.data.folders import read_folder
from classification.data.images import read_image

__all__ = ["read_folder", "read_image"]
