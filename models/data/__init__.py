"""Images from an ImageNet-style folder, by DALI or by torchvision, behind one interface."""

from models.data.check import find_corrupt
from models.data.digits import write_digits
from models.data.folder import ImageList, check_folder, list_images
from models.data.loader import AUGMENTATIONS, SHUFFLES, Loader, LoaderOptions

LOADERS = ("dali", "torch")


def open_loader(kind: str, images: ImageList, options: LoaderOptions) -> Loader:
    """Makes the loader of the given kind, "dali" or "torch".

    Raises:
        UserError: DALI is asked for and not installed, or there are too few images.
    """
    # Imported here because either may be missing, and DALI takes a second to load.
    if kind == "dali":
        from models.data.dali import DaliLoader

        return DaliLoader(images, options)
    if kind == "torch":
        from models.data.torch_loader import TorchLoader

        return TorchLoader(images, options)
    raise ValueError(f"Invalid kind={kind!r}. Must be one of {LOADERS}.")


__all__ = [
    "AUGMENTATIONS",
    "LOADERS",
    "SHUFFLES",
    "ImageList",
    "Loader",
    "LoaderOptions",
    "check_folder",
    "find_corrupt",
    "list_images",
    "open_loader",
    "write_digits",
]
