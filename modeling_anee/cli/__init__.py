"""The `anee` command. Part of the workshop: never shipped in an artifact."""
