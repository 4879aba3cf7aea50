# mypy: disable-error-code="no-untyped-call, attr-defined, import-not-found, import-untyped, unused-ignore"
"""Triton 3.6 compiles a C function to launch each kernel, one after the other on first use: here it is built with the kernel.

It is only put into Triton's cache on disk; Triton loads it itself.
"""

import hashlib
import sysconfig
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAME = "__triton_launcher"


def build_launcher(kernel: Any) -> None:
    """Build what launches this compiled kernel. Where Triton does it another way, nothing is done."""
    with suppress(Exception):  # a cache that is not filled costs time alone
        _build(_source(kernel))


def _source(kernel: Any) -> str:
    from triton.backends.nvidia.driver import make_launcher

    names = kernel.src.fn.arg_names
    constants = {(names.index(key),) if isinstance(key, str) else key: value for key, value in kernel.src.constants.items()}
    return str(make_launcher(constants, dict(kernel.src.signature.items()), getattr(kernel.metadata, "tensordesc_meta", None)))


def _build(source: str) -> None:
    from triton.backends.nvidia import driver
    from triton.runtime import build
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256((source + build.platform_key()).encode()).hexdigest())
    file = f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file) is not None:
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{NAME}.c"
        path.write_text(source)
        built = build._build(
            NAME, str(path), folder, driver.library_dirs(), driver.include_dirs, driver.libraries, ["-O0"]
        )  # half the time
        cache.put(Path(built).read_bytes(), file, binary=True)
