"""Who is sent now, who waits and who is refused: the gateway's own admission, and others' as they are published."""
