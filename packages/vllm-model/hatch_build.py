"""Compiles the CPU kernels into the package when it is built or installed; without a C compiler there are none."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """The libraries are plain C, called through ctypes: one wheel a platform, for every Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and put what there is into the wheel."""
        if self.target_name != "wheel":
            return
        native = Path(self.root, "src", "vllm_model", "native")
        built = runpy.run_path(str(native / "build.py"))["build"]()
        if built:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"] += [f"/src/vllm_model/native/{path.name}" for path in built]
