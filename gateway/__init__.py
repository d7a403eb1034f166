"""The gateway: one ASGI service in front of inference engines."""
