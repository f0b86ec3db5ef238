"""`ia3 serve` as a deployment of Ray Serve: as many replicas as ray_serve.yaml beside this file says.

serve run ray_serve.yaml
"""

import os
from typing import Any

from ray import serve

from ia3.serve.app import create_app
from ia3.serve.start import open_server


@serve.deployment
@serve.ingress()
class Adapters:
    """A replica: one model, and all adapters.

    Args:
        **options: those of `open_server`.
    """

    def __init__(self, **options: Any) -> None:
        self.server = open_server(token=os.environ.get("IA3_SERVE_TOKEN"), **options)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.server, in_background=False)

    def check_health(self) -> None:
        """Let Ray replace a replica whose engine has ended."""
        if self.server.failed:
            raise RuntimeError("The engine has ended; the replica's log says why.")


def app(options: dict[str, Any]) -> serve.Application:
    """The application, from `args` in the file."""
    return Adapters.bind(**options)
