"""The gateway's policies and models of engines in one discrete-event loop: no sockets, no waiting."""
