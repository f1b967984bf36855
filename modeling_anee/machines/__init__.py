"""What plans cost on machines: this one, as it was measured, and others, as they are described."""
