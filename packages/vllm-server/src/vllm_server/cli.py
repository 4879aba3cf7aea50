"""The program ``vllm-server``."""

import logging
import os
import sys

from vllm_server import __version__
from vllm_server.config import parse_config
from vllm_traits.errors import VllmError


def main() -> None:
    """Parse the command line, load the model, serve."""
    try:
        config = parse_config(sys.argv[1:], os.environ, __version__)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=config.log_level.upper())
        # Imported here, so that --help and a wrong flag do not wait for torch.
        from vllm_server.server import build_service, run

        run(build_service(config, __version__))
    except VllmError as error:
        sys.exit(f"vllm-server: {error.message}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
