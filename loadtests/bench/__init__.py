"""The project's bench: this gateway beside nginx, a naive gateway and other routers, on one core, in one run."""
