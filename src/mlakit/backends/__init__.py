"""What the bench can run: one small file a backend. docs/adding-a-backend.md shows how to add one."""

from mlakit.backends.base import Available as Available
from mlakit.backends.base import Backend as Backend
from mlakit.backends.base import Parameter as Parameter
from mlakit.backends.base import Unavailable as Unavailable
from mlakit.backends.base import UnsupportedError as UnsupportedError
