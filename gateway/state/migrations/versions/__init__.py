"""One file a migration: expand first, contract one release later."""
