"""Images from a folder, a zip or an npz. What is larger than half a gigabyte is streamed."""

from qdeploy.data.arrays import read_npy
from qdeploy.data.decode import as_png, read_picture
from qdeploy.data.images import (
    Batch,
    Images,
    Preprocessing,
    images_from_array,
    open_images,
    open_labelled_images,
    shape_of_images,
)
from qdeploy.data.reach import require_within, resolved

__all__ = [
    "Batch",
    "Images",
    "Preprocessing",
    "as_png",
    "images_from_array",
    "open_images",
    "open_labelled_images",
    "read_npy",
    "read_picture",
    "require_within",
    "resolved",
    "shape_of_images",
]
