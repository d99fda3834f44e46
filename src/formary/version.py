"""The version of Formary, as installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("formary")
except PackageNotFoundError:  # running from source without installing
    __version__ = "0"
