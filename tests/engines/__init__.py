"""Engines: how one is installed, started, minded and spoken to."""
