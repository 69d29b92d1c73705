"""Photographs: folders, lists, image files, what networks see of them, batches."""

from classification.data.folders import read_folder
from classification.data.images import read_image

__all__ = ["read_folder", "read_image"]
