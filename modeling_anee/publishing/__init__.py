"""The card of an artifact, its self-contained folder, and the Hub. Part of the workshop: never shipped in an artifact."""
